"""The device code compiles with nvcc alone, on a machine without a GPU, and nothing spills. The figures are printed: pytest -s."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from sparse_attention import _build_cuda
from sparse_attention._build import BuildError


def nvcc(source, capability, target, *options) -> str:
    """What the compiler says; without the host's half, which holds no kernel."""
    done = subprocess.run([*_build_cuda.compile_command(capability), *options, str(source), "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def chosen(capability):
    """(to be compiled, to be read only). bfloat16 and float16 differ in conversions and in the name of the matrix product, so a kernel of
    both is compiled for 8.0 in one and for 9.0 in the other; of the sm90 tier, which only 9.0 has, float16 is read. Minutes matter in CI.
    """
    sources = _build_cuda.sources(capability)
    if capability == (8, 0):
        return [path for path in sources if not path.stem.endswith("_f16")], []
    whole = [path for path in sources if path.stem.endswith("_bf16" if path.parent.name == "sm90" else "_f16")]
    return whole, [path for path in sources if path.parent.name == "sm90" and path not in whole]


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_no_kernel_spills(capability, tmp_path):
    try:
        _build_cuda.nvcc()
    except BuildError as error:
        pytest.skip(str(error))
    whole, read = chosen(capability)
    options = {**dict.fromkeys(whole, ["-cubin", "-Xptxas=-v"]), **dict.fromkeys(read, ["-ptx", "-Xcicc", "-O0"])}

    def compiled(source):
        return nvcc(source, capability, tmp_path / f"{source.parent.name}-{source.stem}.out", *options[source])

    largest_first = sorted(options, key=lambda source: source.parent.name != "sm90")
    with ThreadPoolExecutor(2) as pool:
        said = "".join(pool.map(compiled, largest_first))
    kernels = set(re.findall(r"Compiling entry function '(\w+)'", said))
    properties = r"Function properties for (\w+)\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    functions = re.findall(properties, said)  # of what kernels call too
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", said)]
    print(f"\n{len(kernels)} kernels, at most {max(registers)} registers")
    assert kernels and kernels <= {name for name, *_ in functions} and len(registers) == len(kernels)
    assert not [found for found in functions if any(map(int, found[1:]))]
    assert "instructions are serialized" not in said, "ptxas runs matrix products one after the other"


def test_every_source_is_compiled_or_read():
    taken = [path for capability in [(8, 0), (9, 0)] for paths in chosen(capability) for path in paths]
    assert sorted(taken) == _build_cuda.sources((9, 0)), "each once"


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
