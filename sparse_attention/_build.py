"""Compiles csrc at first use and loads the result: one shared library for each combination of sources, torch and processor. What
is beside csrc/cpu holds no vectors, and takes as long to compile as what does: its objects are kept for all instruction sets.
Like libraries, they stay until someone empties the folder.

`SPARSE_ATTENTION_CACHE` names the folder that holds the libraries (default: `sparse_attention` in the user's cache folder).
`SPARSE_ATTENTION_CPU` is `avx512`, `avx2` or `baseline`, for a library that uses less than the processor has.
`CXX` is the compiler (default `c++`).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType

import torch

FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fopenmp", "-fvisibility=hidden"]
# Not -ffast-math: infinities and NaNs mean something here.
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]

_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
TIERS = {
    "baseline": [],
    "avx2": _AVX2,
    "avx512": [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512cd"],
}

STILL_WORKS = "impl='dense' and impl='reference' work without compiled kernels."


class BuildError(RuntimeError):
    """The kernels cannot be compiled or loaded here; the message says what to install."""


_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)

_loading = threading.Lock()


def kernels() -> ModuleType:
    """The compiled module; compiled first if the cache does not hold it. Raises BuildError."""
    with _loading:
        return _load()


@functools.cache
def _load() -> ModuleType:
    return load(library())


def load(path: Path) -> ModuleType:
    """The extension module in a compiled library. Raises BuildError."""
    # pybind11 gives out a module that it knows by name, whatever the file: another library needs another name.
    loader = ExtensionFileLoader(f"sparse_attention.{path.stem}._kernels", str(path))
    spec = importlib.util.spec_from_file_location(loader.name, path, loader=loader)
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise BuildError(f"{path} does not load ({error}); delete it to compile it again. {STILL_WORKS}") from error
    return module


def library() -> Path:
    """The path of the compiled library, which exists on return. Processes that ask at once compile once."""
    return built(f"kernels-{tier()}-{key()}.so", tier(), _ninja_file)


def built(name: str, what_for: str, ninja_file: Callable[[str], str]) -> Path:
    """The path of the library `name` in the cache, made by `ninja_file(name)` unless it is there."""
    from filelock import FileLock

    folder = cache_folder()
    path = folder / name
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))  # the system drops it when its holder dies
        with lock:
            if not path.exists():
                run_ninja(what_for, lambda: ninja_file(name), name)
    except OSError as error:
        raise BuildError(
            f"cannot write the compiled kernels to {folder} ({error}); set SPARSE_ATTENTION_CACHE to a writable folder. "
            f"{STILL_WORKS}"
        ) from error
    return path


def cache_folder() -> Path:
    """Where compiled libraries and objects are kept."""
    chosen = os.environ.get("SPARSE_ATTENTION_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "sparse_attention"


def tier() -> str:
    """The instruction set to compile for: the processor's best, or SPARSE_ATTENTION_CPU."""
    best = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "baseline")
    chosen = os.environ.get("SPARSE_ATTENTION_CPU") or best
    order = list(TIERS)
    if chosen not in order or order.index(chosen) > order.index(best):
        possible = ", ".join(order[: order.index(best) + 1])
        raise ValueError(f"SPARSE_ATTENTION_CPU is {chosen!r}, expected one of what this processor has: {possible}")
    return chosen


def key() -> str:
    """What a library depends on, as a short hash: sources, flags, torch, Python's ABI and the instruction set."""
    root = source_folder()
    return digest([*_facts(), tier(), *TIERS[tier()]], _sources(root, "*.h") + _sources(root, "*.cpp"))


def _facts() -> list[str]:
    """What every object for the CPU depends on, beside sources."""
    return [torch.__version__, python_abi(), *FLAGS, *compiler()]


def python_abi() -> str:
    return sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag


def digest(facts: Iterable[str], files: Iterable[Path]) -> str:
    """A short hash of texts, and of files and where in csrc they are."""
    hashed = hashlib.sha256()
    for text in facts:
        hashed.update(text.encode() + b"\0")
    for path in files:
        hashed.update(path.relative_to(source_folder()).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return hashed.hexdigest()[:16]


def kept_objects(sources: Iterable[Path], facts: list[str]) -> dict[Path, Path]:
    """The object of each source, in the cache under a hash of the facts, the source and the headers of csrc that it includes."""
    return {source: cache_folder() / f"{source.parent.name}-{source.stem}-{digest(facts, _with_headers(source))}.o" for source in sources}


def _with_headers(source: Path) -> list[Path]:
    """The source and what it includes by names in quotes, which say where a file is from the one that includes it; these files' too."""
    found, left = set(), [source]
    while left:
        path = left.pop()
        if path not in found and path.is_file():
            found.add(path)
            left += [Path(os.path.normpath(path.parent / name)) for name in _INCLUDE.findall(path.read_text())]
    return sorted(found)


@functools.cache
def source_folder() -> Path:
    """csrc: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "bindings.cpp").exists():
            return folder
    raise BuildError(f"no csrc folder in {package} or beside it: the installation is incomplete. {STILL_WORKS}")


def _sources(root: Path, pattern: str) -> list[Path]:
    return sorted(root.glob(pattern)) + sorted((root / "cpu").glob(pattern))


def compiler() -> list[str]:
    """The C++ compiler: CXX, or c++."""
    return shlex.split(os.environ.get("CXX") or "c++")


def run_ninja(what_for: str, ninja_file: Callable[[], str], target: str | None = None) -> None:
    """Builds in a temporary folder of the cache, which exists, and moves the result into the cache, if it has a name."""
    ninja = _find_tools()
    cache = cache_folder()
    with tempfile.TemporaryDirectory(prefix="build-", dir=cache) as folder:
        (Path(folder) / "build.ninja").write_text(ninja_file())
        print(f"sparse_attention: compiling for {what_for} into {cache} (once)", file=sys.stderr, flush=True)
        environment = {**os.environ, "NINJA_STATUS": "sparse_attention: [%f/%t] "}
        process = subprocess.Popen(
            [ninja, "-C", folder], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        output = []
        for line in process.stdout:
            output.append(line)
            if line.startswith("sparse_attention: "):
                print(line, end="", file=sys.stderr, flush=True)
        if process.wait() != 0:
            raise BuildError(f"compiling the kernels failed; the compiler said:\n{''.join(output[-40:])}{STILL_WORKS}")
        if target:
            os.replace(Path(folder) / target, cache / target)


def _find_tools() -> str:
    """The path of ninja. Raises BuildError unless it and the compiler are there."""
    if shutil.which(compiler()[0]) is None:
        raise BuildError(
            f"no C++ compiler: {compiler()[0]!r} is not on the PATH. Install one (Debian and Ubuntu: apt install g++; "
            f"Fedora: dnf install gcc-c++; conda: conda install cxx-compiler) or point CXX at yours. {STILL_WORKS}"
        )
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").exists():
        raise BuildError(
            f"no Python headers: {headers} holds no Python.h. Install them (Debian and Ubuntu: apt install python3-dev; Fedora: "
            f"dnf install python3-devel). {STILL_WORKS}"
        )
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = None
    found = shutil.which("ninja", path=BIN_DIR) if BIN_DIR else None
    found = found or shutil.which("ninja")
    if found is None:
        raise BuildError(f"no ninja: install it with `pip install ninja`. {STILL_WORKS}")
    return found


def _ninja_file(target: str) -> str:
    from torch.utils.cpp_extension import include_paths, library_paths

    command = shlex.join(compiler())
    includes = [f"-isystem{path}" for path in [*include_paths(), sysconfig.get_paths()["include"]]]
    flags = [*FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", *includes]
    # Linked without -fopenmp: its symbols come with libtorch_cpu, so torch and the kernels share one pool of threads.
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_python", "-ltorch_cpu", "-ltorch", "-lc10"]
    if _is_clang():  # its OpenMP calls are in no library of torch's
        libraries.append("-fopenmp")
    root = source_folder()
    rules = {
        "compile": f"{command} {escape(shlex.join([*flags, *TIERS[tier()]]))} -c $in -o $out",
        "share": keeping_command([*compiler(), *flags]),
        "link": link_command(libraries),
    }
    shared = kept_objects(sorted(root.glob("*.cpp")), _facts())
    sources = [("share" if source in shared else "compile", source) for source in _sources(root, "*.cpp")]
    return ninja_text(target, rules, sources, shared)


def keeping_command(command: list[str]) -> str:
    """The command of a rule whose object lies in the cache: never there in part, though other processes may make the same."""
    return f"{escape(shlex.join(command))} -c $in -o $out.{os.getpid()} && mv -f $out.{os.getpid()} $out"


def link_command(libraries: list[str]) -> str:
    """The command of the rule "link"."""
    return f"{shlex.join(compiler())} -shared $in -o $out {escape(shlex.join([*libraries, *standard_library()]))}"


def standard_library() -> list[str]:
    """The path of the shared libstdc++, or nothing. Links name it before the compiler adds its own, which may be an archive (one in a
    folder of -L is found first): the copy of an archive and what torch has loaded mix up their locales, and crash at a number.
    """
    found = subprocess.run([*compiler(), "-print-file-name=libstdc++.so.6"], capture_output=True, text=True).stdout.strip()
    if os.path.isabs(found) and os.path.exists(found):
        return [found]
    maps = Path("/proc/self/maps")  # an address, permissions, an offset, a device, an inode and, of files, a path
    loaded = [line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines()] if maps.exists() else []
    return [path for path in loaded if "/libstdc++.so.6" in path and os.path.exists(path)][:1]


def ninja_text(target: str | None, rules: dict[str, str], sources: list[tuple[str, Path]], kept: Mapping[Path, Path]) -> str:
    """A ninja file that compiles each source by its rule and links the objects by the rule "link", unless there is no target. `kept`
    says which objects lie in the cache; what is there already is not compiled.
    """
    lines = [f"rule {name}\n  command = {command}\n  description = $desc" for name, command in rules.items()]
    objects = []
    for rule, source in sources:
        objects.append(_path(kept[source]) if source in kept else f"{source.parent.name}-{source.stem}.o")
        if source not in kept or not kept[source].exists():
            lines.append(f"build {objects[-1]}: {rule} {_path(source)}\n  desc = {source.name}")
    if target:
        lines.append(f"build {target}: link {' '.join(objects)}\n  desc = {target}")
    return "\n".join(lines) + "\n"


def _path(path: Path) -> str:
    return escape(str(path)).replace(" ", "$ ").replace(":", "$:")


def escape(text: str) -> str:
    """Text as ninja reads it in a command."""
    return text.replace("$", "$$")


def _is_clang() -> bool:
    version = subprocess.run([*compiler(), "--version"], capture_output=True, text=True)
    return "clang" in version.stdout
