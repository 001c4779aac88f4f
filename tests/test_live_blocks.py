"""A live block mask on the CPU: each call sees what the tensor holds by then, and nothing that is kept goes stale."""

from __future__ import annotations

import pytest
import torch

import sparse_attention as sa
from sparse_attention.layout import layout
from sparse_attention.rows import rows


def sizes(heads=2, length=256):
    return [torch.randn(1, heads, length, 32, generator=torch.Generator().manual_seed(n)) for n in range(3)]


@pytest.mark.parametrize("impl", ("auto", "tile", "gather", "dense", "reference"))
@pytest.mark.parametrize("composed", (False, True))
def test_calls_follow_the_mask(impl, composed):
    q, k, v = sizes()
    mask = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    live = sa.LiveBlocks(mask, 64)
    pattern = live & sa.Causal() if composed else live
    for change in range(3):
        still = sa.BlockSparse(mask, 64)
        want = sa.attention(q, k, v, still & sa.Causal() if composed else still, impl="reference")
        torch.testing.assert_close(sa.attention(q, k, v, pattern, impl=impl), want, atol=2e-5, rtol=2e-5)
        mask[:, change] = ~mask[:, change]


def test_nothing_kept_is_stale():
    mask = torch.zeros(4, 4, dtype=torch.bool)
    pattern = sa.LiveBlocks(mask, 64) & sa.Causal()
    q, k, v = sizes()
    for found in (pattern, sa.LiveBlocks(mask, 64)):
        mask.zero_()
        assert found.pairs(256, 256) == 0 and layout(found, 256, 256).counts.pairs == 0
        assert len(rows(found, 256, 256).columns) == 0 and sa.plan(q, k, v, found).cost.pairs == 0
        mask[2, 1] = True
        assert found.pairs(256, 256, 2) == 2 * 64 * 64 and layout(found, 256, 256).counts.pairs == 64 * 64
        assert len(rows(found, 256, 256).columns) == 64 * 64 and sa.plan(q, k, v, found).cost.pairs == 2 * 64 * 64
        assert found.mask(256, 256).sum() == 64 * 64 and found.sparsity(256, 256) == 1 - 1 / 16


def test_gradients():
    q, k, v = (x.requires_grad_() for x in sizes())
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    got = torch.autograd.grad(sa.attention(q, k, v, sa.LiveBlocks(mask, 64)).sum(), (q, k, v))
    want = torch.autograd.grad(sa.attention(q, k, v, sa.BlockSparse(mask, 64)).sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_equal_when_they_hold_the_same_tensor():
    mask = torch.ones(4, 4, dtype=torch.bool)
    assert sa.LiveBlocks(mask, 64) == sa.LiveBlocks(mask, 64) and hash(sa.LiveBlocks(mask, 64)) == hash(sa.LiveBlocks(mask, 64))
    assert sa.LiveBlocks(mask, 64) != sa.LiveBlocks(mask.clone(), 64) and sa.LiveBlocks(mask, 64) != sa.LiveBlocks(mask, 128)
    assert sa.LiveBlocks(mask, 64) != sa.BlockSparse(mask, 64)


@pytest.mark.parametrize("mask, block, message", [
    (torch.ones(4, 4), 64, "block_mask is torch.float32 tensor"),
    (torch.ones(4, 4, dtype=torch.bool), 48, "block is 48; expected one of"),
    (torch.ones(4, dtype=torch.bool), 64, "expected a bool tensor"),
])
def test_what_is_no_mask_is_refused(mask, block, message):
    with pytest.raises(ValueError, match=message):
        sa.LiveBlocks(mask, block)


def test_a_mask_of_another_size_is_refused():
    q, k, v = sizes()
    with pytest.raises(ValueError, match=r"block_mask has shape \(3, 4\); expected \(4, 4\) blocks of 64"):
        sa.attention(q, k, v, sa.LiveBlocks(torch.ones(3, 4, dtype=torch.bool), 64))
