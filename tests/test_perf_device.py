"""`pytest perf` measures on the GPU of a machine that has one, unless it is told otherwise."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from perf import device


@pytest.fixture
def gpu(monkeypatch):
    """A machine whose torch sees an H100; its compute capability can be changed."""
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability[0])
    monkeypatch.setattr("sparse_attention._build_cuda.nvcc", lambda: "nvcc")
    return capability


def test_a_gpu_that_the_kernels_run_on_is_chosen(gpu, monkeypatch):
    assert device.chosen() == ("cuda", "NVIDIA H100 80GB HBM3")
    gpu[0] = (7, 5)
    with pytest.raises(device.Unfit, match="compute capability 7.5"):
        device.chosen()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.chosen()[0] == "cpu"


def test_a_gpu_without_kernels_is_no_reason_to_race_the_cpu_in_silence(gpu):
    gpu[0] = (7, 5)
    with pytest.raises(pytest.UsageError, match="7.5.*--breakeven-device cpu"):
        configured("perf", None)
    assert configured("perf", "cpu")[0].breakeven_device == "cpu"


@pytest.mark.parametrize("word, given, chosen, budget_s", [
    ("perf", None, "cuda", 420.0), ("perf/tests/test_break_even.py::test_break_even", None, "cuda", 420.0), ("perf", "cpu", "cpu", None),
    ("perf", "cuda-graph", "cuda-graph", 420.0), ("tests", None, None, None), (".", None, "cuda", 420.0),
])  # fmt: skip
def test_pytest_perf_measures_there_unless_it_is_told(gpu, word, given, chosen, budget_s):
    option, said = configured(word, given)
    assert (option.breakeven_device, option.breakeven_budget) == (chosen, budget_s)
    assert ("measured on cuda (NVIDIA H100" in said) if (given, chosen) == (None, "cuda") else said is None


def configured(word, given):
    """The options, and the line above the tests, of `pytest word --breakeven-device given`."""
    root = Path(__file__).parents[1]
    spec = importlib.util.spec_from_file_location("root_conftest", root / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    option = SimpleNamespace(breakeven_device=given, breakeven_budget=None)
    config = SimpleNamespace(option=option, args=[word], invocation_params=SimpleNamespace(dir=root), stash={})
    conftest.pytest_configure(config)
    return option, conftest.pytest_report_header(config)
