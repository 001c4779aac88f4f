"""Objects of device code are kept: each is compiled again only if what it is made of changes. The compiler here is a script that copies."""

from __future__ import annotations

import sys

import pytest

from sparse_attention import _build, _build_cuda

FILES = {
    "bindings.cpp": "",
    "cuda/params.h": "#pragma once\n#include <cstdint>\n",
    "cuda/alone/alone.cu": '#include <cuda_runtime.h>\n#include "no_such_file.h"\n',
    "cuda/sm80/forward.cu": '#include "forward.cuh"\n',
    "cuda/sm80/forward.cuh": '#pragma once\n# include "../params.h"\n#include "forward.cuh"\n',
    "cuda/sm90/forward.cu": '  #include "../params.h"\n#include "../sm80/forward.cuh"  // the common part\n',
}
NVCC = """#!/bin/sh
[ "$1" = --version ] && echo "release {release}" && exit
while [ "$1" != -c ]; do shift; done
echo "$2" >> "$(dirname "$0")/compiled"
[ -n "$FAIL" ] && exit 1
cp "$2" "$4"
"""


def machine(monkeypatch, home, release="13.0"):
    """csrc and a toolkit in the folder `home`; the cache stays what it is."""
    for name, text in FILES.items():
        path = home / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (home / "bin").mkdir(exist_ok=True)
    (home / "bin" / "nvcc").write_text(NVCC.replace("{release}", release))
    (home / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    for module in (_build, _build_cuda):
        monkeypatch.setattr(module, "source_folder", lambda: home / "csrc")
    return home


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSE_ATTENTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SPARSE_ATTENTION_NVCC_FLAGS", raising=False)
    return machine(monkeypatch, tmp_path / "here")


def compiled(home, capability=(9, 0)):
    """The folders of the sources that are compiled when all objects are asked for."""
    log = home / "bin" / "compiled"
    log.write_text("")
    _build_cuda.compile_objects(capability)
    kept = _build_cuda.objects(capability)
    assert all(path.read_text() == source.read_text() for source, path in kept.items())
    assert {path.suffix for path in _build.cache_folder().iterdir()} == {".o"}, "nothing half made is left"
    return sorted(line.split("/")[-2] for line in log.read_text().splitlines())


def test_nothing_is_compiled_twice(here):
    assert compiled(here) == ["alone", "sm80", "sm90"]
    assert compiled(here) == []
    assert compiled(here, (8, 0)) == ["alone", "sm80"], "for another device"
    assert compiled(here, (8, 0)) == compiled(here) == []


@pytest.mark.parametrize(
    "changed, expected",
    [
        ("sm90/forward.cu", ["sm90"]),
        ("alone/alone.cu", ["alone"]),
        ("sm80/forward.cuh", ["sm80", "sm90"]),
        ("params.h", ["sm80", "sm90"]),
        ("alone/no_such_file.h", ["alone"]),
        ("sm90/unused.h", []),
    ],
)
def test_a_change_compiles_exactly_what_includes_it(here, changed, expected):
    compiled(here)
    path = here / "csrc" / "cuda" / changed
    before = path.read_text() if path.exists() else None
    path.write_text("// changed\n" + (before or ""))
    assert compiled(here) == expected
    path.unlink() if before is None else path.write_text(before)
    assert compiled(here) == [], "what was before is still there"


def test_flags_and_nvccs_version_are_other_objects(here, monkeypatch, tmp_path):
    compiled(here)
    monkeypatch.setenv("SPARSE_ATTENTION_NVCC_FLAGS", "-lineinfo")
    assert compiled(here) == ["alone", "sm80", "sm90"]
    monkeypatch.delenv("SPARSE_ATTENTION_NVCC_FLAGS")
    assert compiled(machine(monkeypatch, here, "13.1")) == ["alone", "sm80", "sm90"]


def test_objects_of_another_machine_fit(here, monkeypatch, tmp_path):
    compiled(here)
    monkeypatch.setattr("torch.__version__", "2.99.0")
    assert compiled(machine(monkeypatch, tmp_path / "there")) == []


def test_a_failed_compilation_leaves_nothing(here, monkeypatch):
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(_build.BuildError, match="compiling the kernels failed"):
        compiled(here)
    assert list(_build.cache_folder().iterdir()) == []


def test_a_library_is_linked_from_what_is_kept(here):
    first = _build_cuda._ninja_file("cuda.so", (9, 0))
    compiled(here)
    second = _build_cuda._ninja_file("cuda.so", (9, 0))
    assert (first.count(": device "), second.count(": device ")) == (3, 0)
    (link,) = [line for line in second.splitlines() if line.startswith("build cuda.so: link ")]
    assert sorted(link.split()[3:]) == sorted(map(str, _build_cuda.objects((9, 0)).values()))


def test_both_libraries_are_linked_with_the_shared_libstdcxx(here, monkeypatch):
    monkeypatch.setattr(_build, "standard_library", lambda: ["/some where/libstdc++.so.6"])
    for text in (_build._ninja_file("kernels.so"), _build_cuda._ninja_file("cuda.so", (9, 0))):
        (link,) = [line for line in text.splitlines() if " -shared " in line]
        assert link.endswith(" '/some where/libstdc++.so.6'")


def test_the_command_compiles(here, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["_build_cuda", "8.0"])
    _build_cuda.main()
    shown = capsys.readouterr().err.splitlines()
    assert "compiling for cuda-sm80" in shown[0] and sorted(line.split()[-1] for line in shown[1:]) == ["alone.cu", "forward.cu"]
    assert compiled(here, (8, 0)) == []


@pytest.mark.parametrize("word, said", [("7.5", "8.0 and later"), ("H100", "two numbers, such as 9.0"), ("9.0", "no nvcc in /nowhere/bin")])
def test_the_command_refuses_what_it_cannot_compile(monkeypatch, capsys, word, said):
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    monkeypatch.setattr(sys, "argv", ["_build_cuda", word])
    with pytest.raises(SystemExit):
        _build_cuda.main()
    assert said in capsys.readouterr().err
