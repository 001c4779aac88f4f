"""Compiles csrc/cuda with nvcc at first use, for the device present. The kernels hold no torch; only the bindings do.

`CUDA_HOME` names the toolkit (default: what `nvcc` on the PATH belongs to, or /usr/local/cuda).
`SPARSE_ATTENTION_NVCC_FLAGS` are further flags for the kernels, such as `-lineinfo` for profilers and tests/sanitize.py.
`SPARSE_ATTENTION_CUDA` is `sm90` or `sm80`, for a tile engine that uses less than the device has; it is read when a call is first
planned.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sysconfig
import threading
from pathlib import Path
from types import ModuleType

import torch

from sparse_attention._build import STILL_WORKS, BuildError, built, compiler, escape, link_command, load, ninja_text, source_folder

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
    name = f"cuda-sm{capability[0]}{capability[1]}"
    return load(built(f"{name}-{key(capability)}.so", name, lambda target: _ninja_file(target, capability)))


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


def key(capability: tuple[int, int]) -> str:
    """What a library depends on, as a short hash."""
    digest = hashlib.sha256()
    version = subprocess.run([nvcc(), "--version"], capture_output=True, text=True).stdout
    abi = sysconfig.get_config_var("SOABI") or ""
    for text in [torch.__version__, abi, version, *compile_command(capability), *HOST_FLAGS]:
        digest.update(text.encode() + b"\0")
    root = source_folder() / "cuda"
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".h", ".cuh", ".cu", ".cpp")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _ninja_file(target: str, capability: tuple[int, int]) -> str:
    from torch.utils.cpp_extension import include_paths, library_paths

    home = Path(nvcc()).resolve().parents[1]
    paths = [*include_paths(), str(home / "include"), sysconfig.get_paths()["include"]]
    host = [*compiler(), *HOST_FLAGS, *(f"-isystem{path}" for path in paths), f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    host += [f"-DSPARSE_ATTENTION_{name.upper()}" for name in tiers(capability)]
    libraries = [f"-L{path}" for path in [*library_paths(), str(home / "lib64")]]
    libraries += ["-ltorch_python", "-ltorch_cuda", "-ltorch_cpu", "-ltorch", "-lc10_cuda", "-lc10", "-lcudart"]
    rules = {
        "device": f"{escape(shlex.join(compile_command(capability)))} -c $in -o $out",
        "host": f"{escape(shlex.join(host))} -c $in -o $out",
        "link": link_command(libraries),
    }
    bindings = sorted((source_folder() / "cuda").rglob("*.cpp"))
    return ninja_text(target, rules, [*(("device", source) for source in sources(capability)), *(("host", source) for source in bindings)])
