"""The device code compiles with nvcc alone, on a machine without a GPU, and nothing spills. The figures are printed: pytest -s."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from sparse_attention import _build_cuda
from sparse_attention._build import BuildError


def compiled(source, capability, folder) -> str:
    target = folder / f"{source.stem}-{capability[0]}{capability[1]}.o"
    command = [*_build_cuda.compile_command(capability), "-Xptxas=-v", "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


@pytest.mark.parametrize("capability", _build_cuda.TARGETS, ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_no_kernel_spills(capability, tmp_path):
    try:
        _build_cuda.nvcc()
    except BuildError as error:
        pytest.skip(str(error))
    with ThreadPoolExecutor(2) as pool:
        said = "".join(pool.map(lambda source: compiled(source, capability, tmp_path), _build_cuda.sources()))
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
