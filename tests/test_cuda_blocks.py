"""Block masks that become layouts on a CUDA device: accuracy, graphs whose mask changes, no wait. Skipped without one."""

from __future__ import annotations

import pytest
import torch

import sparse_attention as sa
from sparse_attention import _build_cuda, cuda_blocks, cuda_tables
from sparse_attention.layout import layout
from sparse_attention.patterns.base import Tile
from tests.cuda_calls import assert_accurate, tensors, tier  # noqa: F401

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.cuda


def random_mask(block, q_len, kv_len, heads=None, density=0.3, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (-(-q_len // block), -(-kv_len // block))
    return torch.rand(*((heads,) if heads else ()), *shape, device="cuda", generator=generator) < density


@pytest.mark.parametrize("head_dim", (64, 128, 192))
@pytest.mark.parametrize("block", (16, 32, 64, 128))
@pytest.mark.parametrize("base", (None, sa.Causal(), sa.SlidingWindow(300) | sa.Sinks(70)), ids=str)
@pytest.mark.parametrize("lengths", ((1000, 1000), (300, 1100), (128, 1536), (1, 200)), ids=str)
def test_live_and_still_masks(head_dim, block, base, lengths):
    q, k, v = tensors(2, 4, 2, *lengths, head_dim)
    for heads in (None, 4):
        mask = random_mask(block, *lengths, heads)
        for kind in (sa.LiveBlocks, sa.BlockSparse):
            pattern = kind(mask, block) if base is None else kind(mask, block) & base
            assert_accurate(q, k, v, pattern.frozen(), *sa.attention(q, k, v, pattern, impl="tile", return_lse=True))


def test_empty_and_full_masks():
    q, k, v = tensors(1, 2, 2, 500, 500, 64)
    mask = torch.zeros(8, 8, dtype=torch.bool, device="cuda")
    out, lse = sa.attention(q, k, v, sa.LiveBlocks(mask, 64), return_lse=True)
    assert not out.any() and (lse == -torch.inf).all()
    mask.fill_(True)
    assert_accurate(q, k, v, sa.Dense(), *sa.attention(q, k, v, sa.LiveBlocks(mask, 64), return_lse=True))


def test_nan_behind_the_mask():
    q, k, v = tensors(1, 2, 2, 512, 512, 64)
    mask = random_mask(64, 512, 512)
    mask[:, 3] = False
    mask[5, 5] = False  # keys of the diagonal that only later rows would see
    mask[6:, 5] = False
    pattern = sa.LiveBlocks(mask, 64) & sa.Causal()
    unseen = ~pattern.mask(512, 512, 2).any(1).cuda()[None, :, :, None]
    clean, bad = ([x.masked_fill(unseen, value) for x in (k, v)] for value in (0.0, torch.nan))
    assert_accurate(q, *bad, pattern.frozen(), *sa.attention(q, *bad, pattern, return_lse=True), clean=clean)


def test_a_graph_replays_with_another_mask():
    q, k, v = tensors(1, 4, 4, 2048, 2048, 128)
    mask = random_mask(128, 2048, 2048, 4)
    pattern = sa.LiveBlocks(mask, 128) & sa.Causal()
    sa.attention(q, k, v, pattern)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sa.attention(q, k, v, pattern)
    for seed in (1, 2, 3):
        mask.copy_(random_mask(128, 2048, 2048, 4, seed=seed))
        graph.replay()
        assert torch.equal(out, sa.attention(q, k, v, pattern))
        still = pattern.frozen()
        assert_accurate(q, k, v, still, out, sa.attention(q, k, v, still, return_lse=True)[1])


def test_no_wait_for_the_device():
    q, k, v = tensors(1, 4, 4, 2048, 2048, 64)
    mask = random_mask(64, 2048, 2048, 4)
    for pattern in (sa.LiveBlocks(mask, 64), sa.LiveBlocks(mask, 64) & sa.Causal()):
        sa.attention(q, k, v, pattern)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            sa.attention(q, k, v, sa.LiveBlocks(mask.clone(), 64) & sa.Causal(), impl="auto")
            sa.attention(q, k, v, sa.LiveBlocks(mask.clone(), 64), impl="auto")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_cannot_hold_what_the_host_reads():
    q, k, v = tensors(1, 2, 2, 256, 256, 64)
    mask = random_mask(32, 256, 256)
    for pattern in (sa.LiveBlocks(mask, 32), sa.LiveBlocks(torch.ones(4, 4, dtype=torch.bool), 64)):
        with pytest.raises(ValueError, match="CUDA graph cannot hold that"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            sa.attention(q, k, v, pattern)


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="items are cut on the sm90 tier")
@pytest.mark.parametrize("heads, blocks, long, parts", ((16, 512, 2, 8), (3, 200, 3, 4), (1, 64, 0, 1), (1, 64, 64, 4), (16, 64, 64, 1)))
def test_long_items_are_cut(heads, blocks, long, parts):
    """Each item is there once, or each of its parts; parts are of several tiles, and their slots do not overlap."""
    length = 64 * blocks
    mask = torch.eye(blocks, dtype=torch.bool, device="cuda").repeat(heads, 1, 1)
    mask[:, :long] = True
    (part,) = cuda_tables.tables(layout(sa.Dense(), length, length, heads, Tile(cuda_tables.QUERIES, 64)), mask.device, 132, halves=True)
    native = _build_cuda.kernels(torch.cuda.get_device_capability())
    made = native.filter(native.Layout([native.Part(*part)], heads, length, length, 64, 90), mask, 64)
    order = made.order[: int(made.n_order)].tolist()
    taken, slots = {}, []
    for piece in order:
        item, cut = piece & (1 << 30) - 1, piece >> 32
        taken.setdefault(item, []).append((0, 1) if cut < 0 else (cut // 32 % 32, cut % 32 + 1))
        if cut >= 0:
            slots.append(cut // 1024 + cut // 32 % 32)
    assert sorted(taken) == list(range(len(part.work)))
    for mine in taken.values():
        assert sorted(mine) == [(n, mine[0][1]) for n in range(mine[0][1])]
    assert sorted(slots) == list(range(len(slots))) and len(slots) <= 8 * 132
    assert max(len(mine) for mine in taken.values()) == parts


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("head_dim, batch", ((128, 1), (64, 2), (192, 1), (128, 60)))
def test_cut_items_mean_the_same(tier, head_dim, batch, causal):
    """Few items of many tiles, which the sm90 tier cuts: in a batch of one and of two, but not in 60, nor in kernels without parts."""
    q, k, v = tensors(batch, 2, 1, 250, 64 * 66 - 5, head_dim)
    mask = random_mask(64, 250, 64 * 66 - 5, 2, 0.6)
    mask[0, 1] = False
    pattern = sa.LiveBlocks(mask, 64) & sa.Causal() if causal else sa.LiveBlocks(mask, 64)
    out, lse = sa.attention(q, k, v, pattern, impl="tile", return_lse=True)
    some = slice(0, 2)
    assert_accurate(q[some], k[some], v[some], pattern.frozen(), out[some], lse[some])
    for _ in range(20):
        assert torch.equal(sa.attention(q, k, v, pattern, impl="tile"), out)


def test_a_graph_replays_with_items_that_become_long():
    q, k, v = tensors(1, 2, 2, 300, 64 * 70, 64)
    mask = torch.eye(5, 70, dtype=torch.bool, device="cuda").repeat(2, 1, 1)
    pattern = sa.LiveBlocks(mask, 64)
    sa.attention(q, k, v, pattern, impl="tile")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sa.attention(q, k, v, pattern, impl="tile")
    for density in (0.1, 1.0, 0.4, 0.0):
        mask.copy_(random_mask(64, 300, 64 * 70, 2, density))
        for _ in range(3):
            graph.replay()
            right = sa.attention(*(x.double() for x in (q, k, v)), pattern.frozen(), impl="reference")
            assert (out.double() - right).abs().max() < 0.02


@pytest.mark.parametrize("heads, blocks, density", ((32, 1024, 0.1), (5, 300, 0.5), (2, 77, 1.0), (130, 32, 0.2)))
def test_bits_and_order(heads, blocks, density):
    """The packed mask is the mask; the order holds each item once, outliers first, then few heads at a time, by length and place, roughly."""
    length = 64 * blocks
    mask = random_mask(64, length, length, heads, density)
    mask[0, :2] = True
    taken = cuda_blocks.split(sa.LiveBlocks(mask, 64) & sa.Causal(), length, length, heads)
    (part,) = cuda_tables.tables(layout(taken.base, length, length, heads, Tile(cuda_tables.QUERIES, 64)), mask.device, 132, halves=True)
    native, items = _build_cuda.kernels(torch.cuda.get_device_capability()), part.work
    made = native.filter(native.Layout([native.Part(*part)], heads, length, length, 64, 80), mask, 64)
    bits = (made.bits.unsqueeze(-1) >> torch.arange(64, device="cuda") & 1).bool().flatten(2)[..., :blocks]
    assert torch.equal(bits[:, :blocks], mask)
    either = made.bits[:, 0::2] | made.bits[:, 1::2]
    used = (made.used.unsqueeze(-1) >> torch.arange(64, device="cuda") & 1).bool().flatten(2)[..., : either.shape[2]]
    assert torch.equal(used, either != 0)
    order = made.order[: int(made.n_order)]
    assert len(order) == len(items) and (order >> 32 == -1).all(), "no item is cut but on the sm90 tier"
    same, order = order >> 30 & 1 != 0, order & (1 << 30) - 1
    assert torch.equal(order.sort().values, torch.arange(len(items), device="cuda"))
    items = items[order].long()
    halves_equal = (made.bits[:, 0::2] == made.bits[:, 1::2]).all(-1)
    assert torch.equal(same, halves_equal[items[:, 0], items[:, 3]])
    below = torch.ones(blocks, blocks, dtype=torch.bool, device="cuda").tril()
    seen = torch.nn.functional.pad(mask & below, (0, 0, 0, blocks % 2)).unflatten(1, (-1, 2)).any(2).sum(-1)
    length_of = seen[items[:, 0], items[:, 3]].double()
    bound = 4 * length_of.mean()
    outlier = length_of > bound
    assert torch.equal(outlier, outlier.sort(descending=True).values)
    heads_a_section = min(4, max(1, (32 << 20) // (512 * length)))
    section = items[~outlier, 0] // heads_a_section
    if heads <= 128 * heads_a_section:
        assert torch.equal(section, section.sort().values)
    tiles = made.bits.shape[1] // 2
    for one in section.unique():
        mine = section == one
        lengths, places = length_of[~outlier][mine], items[~outlier, 3][mine] * 8 // tiles
        assert (lengths.diff() <= bound / 8 + 1).all()
        assert (places.diff()[lengths.diff() == 0] >= 0).all()
