"""The device code compiles with nvcc alone, on a machine without a GPU, and nothing spills. The figures are printed: pytest -s."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from sparse_attention import _build_cuda
from sparse_attention._build import BuildError


def compiled(source, capability, folder) -> str:
    target = folder / f"{source.parent.name}-{source.stem}.o"
    command = [*_build_cuda.compile_command(capability), "-Xptxas=-v", "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def sources(capability):
    """For 9.0 the tier that only it has, and of what 8.0 compiles as well the kernels of one dtype: minutes matter in CI."""
    return [path for path in _build_cuda.sources(capability) if capability == (8, 0) or path.parent.name == "sm90" or "_bf16" in path.name]


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_no_kernel_spills(capability, tmp_path):
    try:
        _build_cuda.nvcc()
    except BuildError as error:
        pytest.skip(str(error))
    with ThreadPoolExecutor(2) as pool:
        said = "".join(pool.map(lambda source: compiled(source, capability, tmp_path), sources(capability)))
    kernels = re.findall(r"Compiling entry function '(\w+)'", said)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", said)]
    print(f"\n{len(kernels)} kernels, at most {max(registers)} registers")
    assert len(kernels) == len(spills) == len(registers) > 0
    assert not [(name, bytes_) for name, bytes_ in zip(kernels, spills) if any(map(int, bytes_))]
    assert "C7510" not in said, "ptxas runs matrix products one after the other"


def test_a_missing_nvcc_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(BuildError, match=r"no nvcc in .*CUDA_HOME.*impl='dense'"):
        _build_cuda.nvcc()


def test_each_device_gets_the_tiers_that_it_runs(monkeypatch):
    monkeypatch.delenv("SPARSE_ATTENTION_CUDA", raising=False)
    assert _build_cuda.tiers((9, 0)) == ["sm90", "sm80"]
    assert _build_cuda.tier((9, 0)) == "sm90"
    for capability in [(8, 0), (8, 6), (8, 9), (10, 0), (12, 0)]:
        assert _build_cuda.tier(capability) == "sm80"
        assert not [path for path in _build_cuda.sources(capability) if path.parent.name == "sm90"]
    assert {path.parent.name for path in _build_cuda.sources((9, 0))} >= {"sm90", "sm80"}


def test_a_tier_can_be_forced(monkeypatch):
    monkeypatch.setenv("SPARSE_ATTENTION_CUDA", "sm80")
    assert _build_cuda.tier((9, 0)) == "sm80"
    monkeypatch.setenv("SPARSE_ATTENTION_CUDA", "sm90")
    with pytest.raises(ValueError, match=r"SPARSE_ATTENTION_CUDA is 'sm90', expected one of .*: sm80$"):
        _build_cuda.tier((8, 0))
    monkeypatch.setenv("SPARSE_ATTENTION_CUDA", "sm100")
    with pytest.raises(ValueError, match=r"SPARSE_ATTENTION_CUDA is 'sm100', expected one of .*: sm90, sm80$"):
        _build_cuda.tier((9, 0))


def test_an_older_device_is_told():
    assert "7.5" in _build_cuda.obstacle((7, 5)) and "8.0 and later" in _build_cuda.obstacle((7, 5))
