"""The GPU's table of cases: every row can be built where there is a GPU, and says why not where there is none."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch

from perf import cuda_workloads
from perf.cuda_cases import CASES
from sparse_attention.breakeven import Unavailable, device


def test_ids_differ():
    ids = [case.id for case in CASES]
    assert len(set(ids)) == len(ids) > 40


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_row_names_a_builder_and_its_arguments(case):
    module, function = case.build.split(":")
    assert module.startswith("perf.") and (module == "perf.cuda_workloads") == ("eagle" not in case.tags)
    inspect.signature(getattr(importlib.import_module(module), function)).bind(**case.args)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("case", CASES[::4], ids=lambda case: case.id)
def test_without_a_gpu_a_row_says_so(case, monkeypatch):
    monkeypatch.setattr(device, "_current", "cuda")
    with pytest.raises(Unavailable, match="needs a CUDA device"):
        case.load()


def test_patterns_by_name():
    q = torch.empty(1, 2, 400, 8)
    assert cuda_workloads.named("SlidingWindow(4)", q).pairs(400, 400) == 4 * 400 - 6
    assert cuda_workloads.named("csr", q).pairs(400, 400) == 4 * 400
    blocks = cuda_workloads.named("blocks 64", q)
    assert blocks.block_mask.shape == (2, 7, 7) and 0 < blocks.pairs(400, 400, 2) < 2 * 400 * 400 / 4


def test_the_check_finds_a_wrong_row():
    q, k, v = (torch.randn(1, 4, 64, 16) for _ in range(3))
    pattern = cuda_workloads.parse("SlidingWindow(9)")
    mask = pattern.mask(64, 64)
    right = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    cuda_workloads.check(right, q, k, v, pattern)
    with pytest.raises(AssertionError, match="PyTorch's own error"):
        for _ in range(20):
            cuda_workloads.check(right * 1.001, q, k, v, pattern)
