"""The tile engine of the sm90 tier, compiled for the host: threads are fibers that run in random order, instructions are functions.

Slow, so sizes are small; it needs no GPU. Shared memory begins as NaN and copies arrive late, so a missing wait or barrier shows.
"""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch

import sparse_attention as sa
from sparse_attention import cuda_tables
from sparse_attention.layout import layout
from sparse_attention.patterns.base import Tile
from tests.test_cuda_decode_on_host import host_library
from tests.test_cuda_on_host import is_right, tensors, whole

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="fibers are ucontext's, on Linux")


@pytest.fixture
def library():
    return host_library("sm90/library.cpp")


def arguments(pointers, tensors, sizes):
    strides = [step for x in tensors for step in x.stride()[:3]]
    pointers = [0 if x is None else x.data_ptr() for x in pointers]
    return (ctypes.c_void_p * len(pointers))(*pointers), (ctypes.c_int64 * len(strides))(*strides), (ctypes.c_int32 * len(sizes))(*sizes)


def forward(library, q, k, v, pattern, keys, bits=None, order=None, seed=0, slots=0):
    batch, heads, q_len, head_dim = q.shape
    parts = cuda_tables.tables(layout(pattern, q_len, k.shape[2], heads, Tile(cuda_tables.QUERIES, keys)), q.device, 3, halves=bits is not None)
    out, lse, partial = torch.full_like(q, 7.0), torch.full(q.shape[:3], 7.0), torch.full(q.shape, torch.nan)
    for part in parts:
        tables = part.work, part.starts, part.runs, part.masks, part.dead, part.marks
        sizes = [len(part.work), batch, heads, k.shape[1], q_len, k.shape[2], head_dim, keys, part.merge]
        sizes += [*((0, 0, 0) if bits is None else bits.shape), part.marks.shape[1] - 1, part.stride, part.has_dead]
        sizes += [0 if order is None else len(order), slots]
        arrays = arguments((q, k, v, out, partial, lse, *tables, bits, order), (q, k, v, out), sizes)
        assert library.forward(*arrays, ctypes.c_float(head_dim**-0.5), 3, seed) == 0
    return out, lse


@pytest.mark.parametrize("pattern, sizes, keys", [
    (sa.SlidingWindow(70), (1, 2, 1, 150, 150, 64), 64),
    (sa.SlidingWindow(70) | sa.Sinks(3), (2, 1, 1, 40, 210, 40), 128),
    (sa.Dilated(20, 7), (1, 1, 1, 200, 200, 64), 64),
    (sa.Dilated(20, (1, 3)), (1, 2, 2, 140, 140, 64), 128),
    (sa.MultiScale(16), (1, 1, 1, 140, 140, 64), 64),
    (sa.Dense(), (1, 1, 1, 130, 67, 200), 64),
    (sa.Causal(), (1, 1, 1, 130, 130, 128), 128),
], ids=str)  # fmt: skip
def test_patterns(library, pattern, sizes, keys):
    q, k, v = tensors(*sizes)
    mask = pattern.mask(q.shape[2], k.shape[2], q.shape[1])
    assert is_right(q, k, v, mask, *forward(library, q, k, v, pattern, keys))


def test_a_block_mask_filters_the_tiles(library):
    q, k, v = tensors(1, 2, 2, 200, 330, 64)
    seen = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(1)) < 0.5  # of each 64 queries
    seen[1, 2:] = False
    words = (seen.long() << torch.arange(6)).sum(2, keepdim=True)
    mask = seen.repeat_interleave(64, 1)[:, :200].repeat_interleave(64, 2)[:, :, :330] & sa.Causal().mask(200, 330, 2)
    order = whole(2, 0, 3, 1)
    assert is_right(q, k, v, mask, *forward(library, q, k, v, sa.Causal(), 64, words, order))


@pytest.mark.parametrize("seed", range(3))
def test_a_half_passes_over_what_the_other_half_sees(library, seed):
    """Long stretches of tiles for one half alone, at the beginning, in between and at the end; more of them than there are stages."""
    tiles = 14
    halves = {"none": (), "all": range(tiles), "first": (0,), "last": (13,), "ends": (0, 13), "even": range(0, tiles, 2), "some": (3, 4, 11)}
    pairs = [("none", "all"), ("all", "first"), ("last", "all"), ("ends", "even"), ("some", "all"), ("even", "some"), ("first", "last"), ("none", "none"), ("all", "all"), ("even", "even")]
    q, k, v = tensors(1, len(pairs), 1, 128, 64 * tiles, 64)
    seen = torch.zeros(len(pairs), 2, tiles, dtype=torch.bool)
    for head, pair in enumerate(pairs):
        for half, name in enumerate(pair):
            seen[head, half, list(halves[name])] = True
    words = (seen.long() << torch.arange(tiles)).sum(2, keepdim=True)
    mask = seen.repeat_interleave(64, 1).repeat_interleave(64, 2)
    same = torch.tensor([upper == lower for upper, lower in pairs]).long() << 30
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    assert is_right(q, k, v, mask, *forward(library, q, k, v, sa.Dense(), 64, words, whole(*(order | same[order]).tolist()), seed))


@pytest.mark.parametrize("seed", range(3))
def test_parts_of_long_items_are_added_up(library, seed):
    """Items cut into 1 to 5 parts, some of them without a tile that is seen, over two requests; whoever comes last adds them up."""
    tiles, heads = 130, 4
    q, k, v = tensors(2, heads, 1, 100, 64 * tiles - 5, 64)
    generator = torch.Generator().manual_seed(seed)
    seen = torch.rand(heads, 2, tiles, generator=generator) < torch.tensor([0.02, 0.1, 0.3, 0.0]).view(4, 1, 1)
    seen[1, 1] = seen[1, 0]
    words = (torch.nn.functional.pad(seen, (0, 192 - tiles)).unflatten(2, (3, 64)).long() << torch.arange(64)).sum(3)
    mask = seen.repeat_interleave(64, 1)[:, :100].repeat_interleave(64, 2)[..., : 64 * tiles - 5]
    pieces, slot = [], 0
    for head, parts in enumerate((1, 5, 3, 2)):
        for part in range(parts):
            cut = -1 if parts == 1 else (slot * 32 + part) * 32 + parts - 1
            pieces.append((head | (head == 1) << 30) | cut << 32)
        slot += parts if parts > 1 else 0
    order = torch.tensor(pieces)[torch.randperm(len(pieces), generator=generator)]
    first = forward(library, q, k, v, sa.Dense(), 64, words, order, seed, slot)
    assert is_right(q, k, v, mask, *first)
    again = forward(library, q, k, v, sa.Dense(), 64, words, order.flip(0).contiguous(), seed + 7, slot)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert is_right(q, k, v, mask, *forward(library, q, k, v, sa.Dense(), 64, words, order, seed)), "whole items without slots"
    q[1, 1, 5] = torch.nan
    out, _ = forward(library, q, k, v, sa.Dense(), 64, words, order, seed, slot)
    assert out[1, 1, 5].isnan().all() and not out[1, 1, :5].isnan().any() and not out[0].isnan().any()


def test_more_words_than_a_warp_has_lanes(library):
    """2,150 key tiles of which few are seen, and a run in the middle of which most are."""
    tiles = 2150
    q, k, v = tensors(1, 2, 1, 100, 64 * tiles - 9, 64)
    seen = torch.rand(2, 2, tiles, generator=torch.Generator().manual_seed(3)) < 0.005
    seen[1, :, 2040:2075] = True
    seen[0, 1, 2149] = True
    words = (torch.nn.functional.pad(seen, (0, 34 * 64 - tiles)).unflatten(2, (34, 64)).long() << torch.arange(64)).sum(3)
    mask = seen.repeat_interleave(64, 1)[:, :100].repeat_interleave(64, 2)[..., : 64 * tiles - 9]
    for pattern in (sa.Dense(), sa.SlidingWindow(64 * 120)):
        mask = mask & pattern.mask(100, 64 * tiles - 9, 2)
        assert is_right(q, k, v, mask, *forward(library, q, k, v, pattern, 64, words, whole(1, 0)))


def test_turns_go_on_over_items_whose_halves_are_alike(library):
    """Six of them in a row for each of three blocks, with items between that take no turns, in several orders of threads."""
    tiles, heads = 3, 24
    q, k, v = tensors(1, heads, 1, 128, 64 * tiles, 64)
    seen = torch.ones(heads, 2, tiles, dtype=torch.bool)
    seen[18:, 1, 1:] = False
    words = (seen.long() << torch.arange(tiles)).sum(2, keepdim=True)
    mask = seen.repeat_interleave(64, 1).repeat_interleave(64, 2)
    order = whole(*(head if head >= 18 else head | 1 << 30 for head in (*range(9), *range(18, 24), *range(9, 18))))
    for seed in range(4):
        assert is_right(q, k, v, mask, *forward(library, q, k, v, sa.Dense(), 64, words, order, seed))


def test_nan_where_nobody_looks(library):
    q, k, v = tensors(1, 1, 1, 30, 300, 64)
    mask = sa.SlidingWindow(50).mask(30, 300, 1)
    unseen = ~mask.any(1)[None, :, :, None]
    bad = [x.masked_fill(unseen, torch.nan) for x in (k, v)]
    assert is_right(q, k, v, mask, *forward(library, q, *bad, sa.SlidingWindow(50), 128))
