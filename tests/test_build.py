"""The build at first use: one library for each key, built once, with errors that say what to do.

Most tests compile a source of a few lines in place of csrc: the machinery is the same and takes a second.
"""

import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import sparse_attention as sa
from sparse_attention import _build

MODULE = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_kernels", nullptr, -1, nullptr};
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__kernels() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "answer", ANSWER);
  return module;
}
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A csrc of one file and an empty cache; returns the folder of sources."""
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "bindings.cpp").write_text(MODULE.replace("ANSWER", "42"))
    monkeypatch.setenv("SPARSE_ATTENTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_build, "source_folder", lambda: sources)
    _build._load.cache_clear()
    yield sources
    _build._load.cache_clear()


def in_process(sources: Path, environment: dict[str, str], **kwargs) -> subprocess.Popen:
    """Another process that loads the library of `sources`."""
    script = f"""
    from pathlib import Path
    from sparse_attention import _build
    _build.source_folder = lambda: Path({str(sources)!r})
    print("ready", flush=True)
    print(_build.kernels().answer, flush=True)
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def libraries() -> list[Path]:
    return sorted(_build.cache_folder().glob("*.so"))


def test_builds_with_progress_then_loads_in_silence(small, capfd):
    assert _build.kernels().answer == 42
    shown = capfd.readouterr().err.splitlines()
    assert "compiling" in shown[0]
    assert [line.split()[-1] for line in shown[1:]] == ["bindings.cpp", libraries()[0].name]
    _build._load.cache_clear()
    assert _build.kernels().answer == 42
    assert capfd.readouterr().err == ""


def test_a_changed_source_or_header_is_another_library(small):
    first = _build.library()
    (small / "cpu").mkdir()
    (small / "cpu" / "unused.h").write_text("#pragma once\n")
    second = _build.library()
    (small / "bindings.cpp").write_text(MODULE.replace("ANSWER", "43"))
    third = _build.library()
    assert libraries() == sorted([first, second, third])
    assert _build.kernels().answer == 43


def test_what_holds_no_vectors_is_compiled_once_for_all_instruction_sets(small, monkeypatch, capfd):
    (small / "cpu").mkdir()
    (small / "cpu" / "vectors.cpp").write_text("int lanes() { return 1; }\n")
    order = list(_build.TIERS)
    tiers = order[: order.index(_build.tier()) + 1]
    if len(tiers) < 2:
        pytest.skip("this processor, or SPARSE_ATTENTION_CPU, has the narrowest vectors")
    compiled = []
    for tier in tiers[:2]:
        monkeypatch.setenv("SPARSE_ATTENTION_CPU", tier)
        _build.library()
        said = capfd.readouterr().err
        compiled.append([name for name in ("bindings.cpp", "vectors.cpp") if name in said])
    assert compiled == [["bindings.cpp", "vectors.cpp"], ["vectors.cpp"]]
    for header in ("unused.h", "used.h"):
        (small / "cpu" / header).write_text("")
        _build.library()
        assert "bindings.cpp" not in capfd.readouterr().err
    (small / "bindings.cpp").write_text('#include "cpu/used.h"' + MODULE.replace("ANSWER", "42"))
    _build.library()
    (small / "cpu" / "used.h").write_text("#pragma once\n")
    capfd.readouterr()
    _build.library()
    assert "bindings.cpp" in capfd.readouterr().err
    assert not [path for path in _build.cache_folder().iterdir() if path.suffix not in (".so", ".lock", ".o")]


def test_key_depends_on_flags_torch_and_processor(small, monkeypatch):
    keys = {_build.key()}
    with monkeypatch.context() as patch:
        patch.setattr(_build, "FLAGS", [*_build.FLAGS, "-DX"])
        keys.add(_build.key())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.99.0")
        keys.add(_build.key())
    if _build.tier() != "baseline":
        monkeypatch.setenv("SPARSE_ATTENTION_CPU", "baseline")
        keys.add(_build.key())
    assert len(keys) == 3 + (_build.tier() == "baseline")


def test_two_processes_that_start_at_once_build_once(small):
    started = [in_process(small, {}) for _ in range(2)]
    ended = [process.communicate(timeout=120) for process in started]
    assert [out.split()[-1] for out, _ in ended] == ["42", "42"]
    assert sum("compiling" in err for _, err in ended) == 1
    assert len(libraries()) == 1


def test_a_killed_build_leaves_no_lock_and_no_library(small, tmp_path):
    compiler = tmp_path / "slow-compiler"
    compiler.write_text('#!/bin/sh\ncase "$HANG $*" in "1 "*" -c "*) sleep 20;; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    hanging = in_process(small, {"CXX": str(compiler), "HANG": "1"}, start_new_session=True)
    assert hanging.stdout.readline() == "ready\n"
    while not list(_build.cache_folder().glob("build-*/build.ninja")):
        time.sleep(0.01)
    os.killpg(hanging.pid, signal.SIGKILL)
    hanging.wait()
    assert libraries() == []
    out, _ = in_process(small, {"CXX": str(compiler)}).communicate(timeout=120)
    assert out.split()[-1] == "42"


def test_a_compile_error_is_shown_and_leaves_nothing(small):
    (small / "bindings.cpp").write_text("this is no C++\n")
    with pytest.raises(sa.BuildError, match="(?s)compiling the kernels failed.*this is no C\\+\\+.*impl='dense'"):
        _build.kernels()
    assert [path.suffix for path in _build.cache_folder().iterdir()] in ([], [".lock"])


def test_no_compiler_says_what_to_install_and_dense_still_works(small, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    q = torch.randn(1, 2, 9, 8)
    pattern = sa.SlidingWindow(3)
    with pytest.raises(sa.BuildError, match="no C\\+\\+ compiler: 'no-such-compiler'.*apt install g\\+\\+"):
        sa.attention(q[..., :5, :], q, q, pattern, impl="tile")
    dense = sa.attention(q, q, q, pattern, impl="dense")
    torch.testing.assert_close(dense, sa.attention(q, q, q, pattern, impl="reference"))


def test_no_ninja_says_what_to_install(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "ninja", None)
    real = _build.shutil.which
    monkeypatch.setattr(_build.shutil, "which", lambda name, **options: None if name == "ninja" else real(name, **options))
    with pytest.raises(sa.BuildError, match="pip install ninja"):
        _build.kernels()


def test_no_python_headers_says_what_to_install(small, monkeypatch, tmp_path):
    monkeypatch.setattr(_build.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(sa.BuildError, match="apt install python3-dev"):
        _build.kernels()


def test_a_cache_that_cannot_be_written_says_which(small, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSE_ATTENTION_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(sa.BuildError, match="cannot write .*SPARSE_ATTENTION_CACHE"):
        _build.kernels()


def test_a_library_that_does_not_load_says_which(small):
    path = _build.library()
    path.write_bytes(b"not a library")
    with pytest.raises(sa.BuildError, match=f"{path} does not load"):
        _build.kernels()


def test_unknown_instruction_set(small, monkeypatch):
    monkeypatch.setenv("SPARSE_ATTENTION_CPU", "avx1024")
    with pytest.raises(ValueError, match="SPARSE_ATTENTION_CPU is 'avx1024', expected one of .*baseline"):
        _build.kernels()


PRINTS = """
#include <sstream>
extern "C" __attribute__((visibility("default"))) long length(long number) {
  std::ostringstream text;
  text << number;
  return text.str().size();
}
"""


def defines_streams(library: Path) -> bool:
    """Whether the library holds libstdc++'s code that prints a number."""
    if not shutil.which("nm"):
        pytest.skip("no nm, which lists a library's symbols")
    symbols = subprocess.run(["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True).stdout
    assert "PyInit__kernels" in symbols
    return "_ZNSo9_M_insertIlEERSoT_" in symbols


def test_the_kernels_hold_no_libstdcxx():
    assert not defines_streams(_build.library())


@pytest.mark.parametrize("asked", ["the compiler", "/proc/self/maps"])
def test_a_static_libstdcxx_that_the_linker_finds_first_stays_out(small, monkeypatch, tmp_path, asked):
    archive = subprocess.run([*_build.compiler(), "-print-file-name=libstdc++.a"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(archive) or not Path("/proc/self/maps").exists():
        pytest.skip("no libstdc++.a, or not Linux")
    folder = tmp_path / "archives"
    folder.mkdir()
    (folder / "libstdc++.a").symlink_to(archive)
    command = f"{shlex.join(_build.compiler())} -L{folder}"
    unknowing = tmp_path / "compiler"  # it names no shared one
    unknowing.write_text(f'#!/bin/sh\n[ "$1" = -print-file-name=libstdc++.so.6 ] && echo libstdc++.so.6 && exit\nexec {command} "$@"\n')
    unknowing.chmod(0o755)
    monkeypatch.setenv("CXX", command if asked == "the compiler" else str(unknowing))
    (small / "prints.cpp").write_text(PRINTS)
    fixed = _build.library()
    assert not defines_streams(fixed)
    assert ctypes.CDLL(str(fixed)).length(-1234) == 5

    monkeypatch.setattr(_build, "standard_library", lambda: [])
    fixed.unlink()
    assert defines_streams(_build.library()), "nothing was to be kept out"


def test_no_fast_math():
    assert not {"-ffast-math", "-Ofast", "-ffinite-math-only"} & set(_build.FLAGS)


def test_lower_instruction_sets_agree(tmp_path):
    """Every library below the processor's best gives the same attention, in every dtype and both directions."""
    script = """
    import torch, sparse_attention as sa
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        for head_dim in (24, 64):
            q, k, v = (torch.randn(1, h, 70, head_dim, dtype=dtype, requires_grad=True) for h in (4, 2, 2))
            for pattern in (sa.SlidingWindow(20), sa.LogSparse()):
                expected = sa.attention(q, k, v, pattern, impl="reference")
                gradients = torch.autograd.grad(expected.square().sum(), (q, k, v))
                for impl in ("tile", "gather"):
                    out = sa.attention(q, k, v, pattern, impl=impl)
                    assert (out - expected).abs().max() < tolerance, (dtype, head_dim, pattern, impl)
                    for got, want in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), gradients):
                        assert (got - want).abs().max() < 20 * tolerance * want.abs().max(), (dtype, head_dim, pattern, impl)
    from sparse_attention import _build
    print(_build.tier())
    """
    best = list(_build.TIERS).index(_build.tier())
    for tier in list(_build.TIERS)[:best]:
        ran = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            env={**os.environ, "SPARSE_ATTENTION_CPU": tier},
            capture_output=True,
            text=True,
        )
        assert ran.stdout == f"{tier}\n", ran.stderr


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_torch_and_the_kernels_share_one_pool_of_threads():
    script = """
    import os, torch, sparse_attention as sa
    q = torch.randn(1, 4, 2000, 64)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        torch.randn(4_000_000).sum()
        before = len(os.listdir("/proc/self/task"))
        for impl in ("tile", "gather"):
            sa.attention(q, q, q, sa.SlidingWindow(50), impl=impl)
        print(len(os.listdir("/proc/self/task")) - before)
    print(len({line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rsplit("/", 1)[-1]}))
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["0", "0", "1"]


def test_the_wheel_holds_every_package_and_the_sources():
    tomllib = pytest.importorskip("tomllib")
    root = Path(__file__).parents[1]
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {".".join(path.parent.relative_to(root).parts) for path in (root / "sparse_attention").rglob("__init__.py")}
    sources = [root / "csrc", *(path for path in (root / "csrc").rglob("*") if path.is_dir())]
    assert set(settings["packages"]) == packages | {".".join(("sparse_attention", *path.relative_to(root).parts)) for path in sources}
    for folder in [*((root / name.replace(".", "/")) for name in packages), *sources]:
        name = ".".join(folder.relative_to(root).parts)
        carried = settings["package-data"].get(f"sparse_attention.{name}" if folder in sources else name, [])
        places = {folder, *((folder / pattern).parent for pattern in carried)}
        files = {path for place in places for path in place.iterdir() if path.is_file() and path.suffix not in (".py", ".pyc")}
        assert files == {path for pattern in carried for path in folder.glob(pattern)}
