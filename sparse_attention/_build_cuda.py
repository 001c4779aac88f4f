"""Compiles csrc/cuda with nvcc at first use, for the device present. The kernels hold no torch; only the bindings do. So the kernels'
objects depend on nothing but their sources, nvcc and its flags; they are kept, and after a change only what it touches is compiled.

    SPARSE_ATTENTION_CACHE=folder python -m sparse_attention._build_cuda 9.0

makes the objects for compute capability 9.0 on a machine with nvcc and no GPU; with the folder as its cache a machine with the same
nvcc has only the bindings left to compile.

`CUDA_HOME` names the toolkit (default: what `nvcc` on the PATH belongs to, or /usr/local/cuda).
`SPARSE_ATTENTION_NVCC_FLAGS` are further flags for the kernels, such as `-lineinfo` for profilers and tests/sanitize.py.
`SPARSE_ATTENTION_CUDA` is `sm90` or `sm80`, for a tile engine that uses less than the device has; it is read when a call is first
planned.
"""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import shutil
import subprocess
import sysconfig
import threading
from pathlib import Path
from types import ModuleType

import torch

from sparse_attention._build import (
    STILL_WORKS,
    BuildError,
    built,
    cache_folder,
    compiler,
    digest,
    escape,
    keeping_command,
    kept_objects,
    link_command,
    load,
    ninja_text,
    python_abi,
    run_ninja,
    source_folder,
)

# Infinities mean something here; what --use_fast_math would add is written out in the kernels.
FLAGS = ["-std=c++17", "-O3", "--ftz=true", "--prec-div=false", "-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden"]
HOST_FLAGS = ["-O2", "-std=c++20", "-fPIC", "-fvisibility=hidden"]
TIERS = ("sm90", "sm80")  # of the tile engine, the fastest first: for compute capability 9.0, for 8.0 and later

_loading = threading.Lock()


def kernels(capability: tuple[int, int]) -> ModuleType:
    """The compiled module for devices of this compute capability; compiled first if the cache does not hold it. BuildError."""
    with _loading:
        return _load(capability)


@functools.cache
def _load(capability: tuple[int, int]) -> ModuleType:
    name = _name(capability)
    return load(built(f"{name}-{key(capability)}.so", name, lambda target: _ninja_file(target, capability)))


def _name(capability: tuple[int, int]) -> str:
    return f"cuda-sm{capability[0]}{capability[1]}"


def nvcc() -> str:
    """The path of nvcc. Raises BuildError if there is none."""
    home = os.environ.get("CUDA_HOME")
    for folder in [Path(home) / "bin"] if home else [None, "/usr/local/cuda/bin"]:
        found = shutil.which("nvcc", path=folder and str(folder))
        if found:
            return found
    where = f"in {home}/bin (CUDA_HOME)" if home else "on the PATH or in /usr/local/cuda/bin"
    raise BuildError(f"no nvcc {where}: install the CUDA toolkit of torch's version ({torch.version.cuda}) or set CUDA_HOME. {STILL_WORKS}")


def obstacle(capability: tuple[int, int]) -> str | None:
    """Why there are no CUDA kernels for devices of this compute capability, or None."""
    if capability < (8, 0):
        return f"the device has compute capability {capability[0]}.{capability[1]} and the CUDA engines are written for 8.0 and later"
    try:
        nvcc()
    except BuildError as error:
        return f"the CUDA engines cannot be compiled here ({error})"
    return None


def tiers(capability: tuple[int, int]) -> list[str]:
    """The tiers of the tile engine that such a device runs, the fastest first."""
    return [tier for tier in TIERS if tier != "sm90" or capability == (9, 0)]


def tier(capability: tuple[int, int]) -> str:
    """The tier to run: the device's fastest, or SPARSE_ATTENTION_CUDA."""
    possible = tiers(capability)
    chosen = os.environ.get("SPARSE_ATTENTION_CUDA") or possible[0]
    if chosen not in possible:
        raise ValueError(f"SPARSE_ATTENTION_CUDA is {chosen!r}, expected one of what this device runs: {', '.join(possible)}")
    return chosen


def sources(capability: tuple[int, int]) -> list[Path]:
    """Device code: no torch, so that nvcc alone compiles it."""
    others = set(TIERS) - set(tiers(capability))
    return sorted(path for path in (source_folder() / "cuda").rglob("*.cu") if path.parent.name not in others)


def compile_command(capability: tuple[int, int]) -> list[str]:
    """nvcc and its flags, without files."""
    number = f"{capability[0]}{capability[1]}{'a' * ('sm90' in tiers(capability))}"
    return [nvcc(), *FLAGS, *shlex.split(os.environ.get("SPARSE_ATTENTION_NVCC_FLAGS", "")), "-gencode", f"arch=compute_{number},code=sm_{number}"]


def _facts(capability: tuple[int, int]) -> list[str]:
    """What device code depends on beside sources: no path, for objects of another machine to fit."""
    version = subprocess.run([nvcc(), "--version"], capture_output=True, text=True).stdout
    return [version, *compile_command(capability)[1:]]


def key(capability: tuple[int, int]) -> str:
    """What a library depends on, as a short hash."""
    root = source_folder() / "cuda"
    files = sorted(path for path in root.rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".cpp"))
    return digest([torch.__version__, python_abi(), *compiler(), *HOST_FLAGS, *_facts(capability)], files)


def objects(capability: tuple[int, int]) -> dict[Path, Path]:
    """Where the cache has, or will have, the object of each source of device code."""
    return kept_objects(sources(capability), _facts(capability))


def compile_objects(capability: tuple[int, int]) -> None:
    """Makes those objects that the cache lacks. Needs nvcc, but neither a GPU nor torch's CUDA. Raises BuildError."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    rules = {"device": keeping_command(compile_command(capability))}
    device_code = [("device", source) for source in sources(capability)]
    run_ninja(_name(capability), lambda: ninja_text(None, rules, device_code, objects(capability)))


def _ninja_file(target: str, capability: tuple[int, int]) -> str:
    from torch.utils.cpp_extension import include_paths, library_paths

    home = Path(nvcc()).resolve().parents[1]
    paths = [*include_paths(), str(home / "include"), sysconfig.get_paths()["include"]]
    host = [*compiler(), *HOST_FLAGS, *(f"-isystem{path}" for path in paths), f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    host += [f"-DSPARSE_ATTENTION_{name.upper()}" for name in tiers(capability)]
    libraries = [f"-L{path}" for path in [*library_paths(), str(home / "lib64")]]
    libraries += ["-ltorch_python", "-ltorch_cuda", "-ltorch_cpu", "-ltorch", "-lc10_cuda", "-lc10", "-lcudart"]
    rules = {
        "device": keeping_command(compile_command(capability)),
        "host": f"{escape(shlex.join(host))} -c $in -o $out",
        "link": link_command(libraries),
    }
    bindings = [("host", source) for source in sorted((source_folder() / "cuda").rglob("*.cpp"))]
    device_code = [("device", source) for source in sources(capability)]
    return ninja_text(target, rules, device_code + bindings, objects(capability))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sparse_attention._build_cuda", description="Compiles the device code into the cache.")
    parser.add_argument("capability", help="the compute capability to compile for, such as 9.0")
    major, _, minor = parser.parse_args().capability.partition(".")
    if not (major.isdigit() and minor.isdigit()):
        parser.error("the compute capability is two numbers, such as 9.0")
    capability = int(major), int(minor)
    if reason := obstacle(capability):
        parser.error(reason)
    try:
        compile_objects(capability)
    except (BuildError, OSError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
