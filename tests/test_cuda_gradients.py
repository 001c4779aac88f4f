"""Gradients on a CUDA device: the sparse engines have none and say which impl has, at the backward and on every way to it."""

from __future__ import annotations

import pytest
import torch

import sparse_attention as sa

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if torch.cuda.get_device_capability() < (8, 0):
    pytest.skip(f"needs compute capability 8.0, this is {torch.cuda.get_device_capability()}", allow_module_level=True)

from tests.cuda_calls import tensors

pytestmark = pytest.mark.cuda


def live():
    return sa.LiveBlocks(torch.ones(5, 5, dtype=torch.bool, device="cuda"), 64)


WITHOUT = {
    "tile": (lambda: sa.SlidingWindow(70), "tile", 300, torch.bfloat16),
    "several parts": (lambda: sa.MultiScale(16, (1, 2)), "tile", 300, torch.float16),
    "live blocks": (live, "tile", 300, torch.bfloat16),
    "live blocks, auto": (live, "auto", 300, torch.bfloat16),
    "gather": (lambda: sa.LogSparse(), "gather", 300, torch.float32),
    "auto, tile": (lambda: sa.SlidingWindow(256), "auto", 16384, torch.bfloat16),
    "auto, gather": (lambda: sa.LogSparse(), "auto", 16384, torch.float32),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_the_sparse_engines_say_that_they_have_none(name):
    make, impl, length, dtype = WITHOUT[name]
    pattern, given = make(), [x.requires_grad_() for x in tensors(1, 2, 2, length, length, 64, dtype)]
    if impl == "auto" and not pattern.live:
        assert sa.plan(*given, pattern).impl == name.split()[-1]
    with pytest.raises(NotImplementedError, match="impl='dense'"):
        sa.attention(*given, pattern, impl=impl).sum().backward()
    out, lse = sa.attention(*given, pattern, impl=impl, return_lse=True)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all(), "the forward pass is there"
    with pytest.raises(NotImplementedError, match="impl='dense'"):
        lse.sum().backward()
    assert all(x.grad is None for x in given)


def test_under_a_compiler():
    given = [x.requires_grad_() for x in tensors(1, 2, 2, 300, 300, 64)]
    pattern = sa.SlidingWindow(70)
    compiled = torch.compile(lambda q, k, v: sa.attention(q, k, v, pattern, impl="tile"), backend="aot_eager", fullgraph=True)
    with pytest.raises(NotImplementedError, match="impl='dense'"):
        compiled(*given).sum().backward()


@pytest.mark.parametrize("pattern, lengths", [
    (sa.SlidingWindow(70), (300, 300)), (sa.LogSparse(), (200, 300)), (sa.BigBird(64, 1, 1, 1), (320, 320)),
], ids=str)  # fmt: skip
def test_dense_has_them(pattern, lengths):
    grads = []
    for impl in ("dense", "reference"):
        given = [x.double().requires_grad_() for x in tensors(1, 4, 2, *lengths, 64)]
        weights = torch.linspace(-1, 1, 4 * lengths[0] * 64, device="cuda", dtype=torch.float64).view(1, 4, lengths[0], 64)
        grads.append(torch.autograd.grad((sa.attention(*given, pattern, impl=impl) * weights).sum(), given))
    for mine, true in zip(*grads):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-9)
