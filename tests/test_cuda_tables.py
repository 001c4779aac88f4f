"""The tables of the CUDA engine mean the pattern: read here as the kernel reads them, on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from sparse_attention import cuda_blocks, cuda_tables
from sparse_attention.layout import layout
from sparse_attention.patterns import BigBird, BlockSparse, Causal, Dilated, Longformer, Sinks, SlidingWindow
from sparse_attention.patterns.base import Tile
from sparse_attention.patterns.grouping import ALL
from tests.cases import CASES
from tests.strategies import calls


def read(found, parts, q_len, kv_len, heads, blocks=None):
    """How often each pair is visited, int `[heads, q_len, kv_len]`, and for each query row of each head the merges of its launches.

    blocks: for a filtered layout, bool `[heads, 64-query rows, key tiles]`.
    """
    pairs = np.zeros((heads, q_len, kv_len), int)
    merges = np.full((heads, q_len), "", object)
    keys = found.tile_k
    for part in parts:
        masks = part.masks.numpy().view(np.uint64)
        bits = (masks[..., None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)).astype(bool).reshape(len(masks), 128, keys)
        for head, run, end, tile, q_residue, q_step, k_residue, k_step, q_first, stride, q_count, longs, *first_run, _ in part.work.numpy():
            assert first_run == (part.runs[run].tolist() if run < end else [0, 0, 0])
            q_long, k_long = longs % 2, longs // 2
            assert stride == part.stride and q_residue < stride and q_residue + q_step * stride == q_first
            steps = q_len // stride + q_long
            assert q_long == (q_residue < q_len % stride) and q_step + q_count == steps
            local = 128 * tile + np.arange(128)
            q = q_first + stride * local[local < q_count]
            assert len(q)
            merges[head, q] += str(part.merge)
            for first, count, mark in part.runs.numpy()[run:end]:
                for t in range(first, first + count):
                    step = k_step + keys * t + np.arange(keys)
                    inside = step < kv_len // stride + k_long  # the rest is outside of the tensor map
                    seen_by = (True, True) if blocks is None else blocks[head, 2 * tile : 2 * tile + 2, t]
                    if not any(seen_by):
                        continue
                    mask = (mark if blocks is None else filtered(part, mark, *seen_by)) & cuda_tables.FULL
                    allowed = np.ones((128, keys), bool) if mask == cuda_tables.FULL else bits[mask]
                    if mask == cuda_tables.FULL:
                        assert inside.all() and mark == cuda_tables.FULL
                    np.add.at(pairs[head], np.ix_(q, k_residue + stride * step[inside]), allowed[: len(q), inside].astype(int))
    return pairs, merges


def filtered(part, mark, upper, lower):
    """What a run's mark becomes where these halves of the queries may see the tile."""
    mask = mark & cuda_tables.FULL
    place = part.marks.shape[1] - 1 if mask == cuda_tables.FULL else mask
    return int(part.marks[0 if upper and lower else 1 if upper else 2, place])


def check(pattern, q_len, kv_len, heads):
    want = pattern.mask(q_len, kv_len, heads).numpy()
    for keys in (cuda_tables.NARROW, cuda_tables.WIDE):
        found = layout(pattern, q_len, kv_len, heads, Tile(cuda_tables.QUERIES, keys))
        check_layout(found, want)
        if any(part.stride != 1 for part in found.parts):
            undivided = layout(pattern, q_len, kv_len, heads, found.tile, ALL)
            assert [part.stride for part in undivided.parts] == [1]
            check_layout(undivided, want)
            check_layout(layout(pattern, q_len, kv_len, heads, found.tile, together=2), want)


def check_layout(found, want):
    heads, q_len, kv_len = want.shape
    parts = cuda_tables.tables(found, torch.device("cpu"), 8)
    pairs, merges = read(found, parts, q_len, kv_len, heads)
    assert np.array_equal(pairs, want)
    alone, first, middle, last = "0123"
    assert all(m == alone or m[0] + m[-1] == first + last and set(m[1:-1]) <= {middle} for m in set(merges.ravel()))


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_every_pattern(case):
    pattern = case.make()
    check(pattern, case.q_len, case.kv_len, case.heads)


@settings(max_examples=40, deadline=None)
@given(calls())
def test_any_composition(call):
    pattern, q_len, kv_len, heads = call
    check(pattern, q_len, kv_len, heads)


def test_only_keys_that_nobody_sees_are_dead():
    everybody = cuda_tables.tables(layout(SlidingWindow(100), 500, 500, 1, Tile(128, 128)), torch.device("cpu"), 8)
    assert not any(part.has_dead for part in everybody)
    few = cuda_tables.tables(layout(SlidingWindow(100) | Sinks(3), 130, 1000, 1, Tile(128, 128)), torch.device("cpu"), 8)
    assert any(part.has_dead for part in few)
    seen = (SlidingWindow(100) | Sinks(3)).mask(130, 1000).any(0)
    for first, count, mark in few[0].runs.tolist():
        mask = mark & cuda_tables.FULL
        if mask == cuda_tables.FULL:
            assert seen[128 * first : 128 * (first + count)].all()
        elif not mark & cuda_tables.DEAD:
            hidden = few[0].dead[mask].numpy().view(np.uint64)
            bits = (hidden[:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)).astype(bool).reshape(-1)
            for tile in range(first, first + count):
                length = min(128, 1000 - 128 * tile)
                assert seen[128 * tile : 128 * tile + length][torch.from_numpy(bits[:length])].all()


def test_work_is_shared_out_evenly_and_long_rows_come_first():
    for pattern in (SlidingWindow(300), Longformer(100, 4), Causal()):
        part = cuda_tables.tables(layout(pattern, 16384, 16384, 5, Tile(128, 128)), torch.device("cpu"), 8)[0]
        tiles = np.concatenate([[0], part.runs[:, 1].numpy().cumsum()])
        lengths = tiles[part.work[:, 2]] - tiles[part.work[:, 1]]
        starts = part.starts.tolist()
        assert starts[0] == 8 and starts[-1] == len(part.work)
        mine = [np.concatenate([lengths[p : p + 1], lengths[a:b]]) for p, (a, b) in enumerate(zip(starts, starts[1:]))]
        loads = [one.sum() + cuda_tables.BETWEEN * len(one) for one in mine]
        assert max(loads) - min(loads) < lengths.max() + cuda_tables.BETWEEN
        assert all(one[0] == max(one) for one in mine if max(one) > cuda_tables.LONG * lengths.mean())


def test_fewer_rows_than_processors():
    part = cuda_tables.tables(layout(SlidingWindow(30), 200, 200, 2, Tile(128, 128)), torch.device("cpu"), 8)[0]
    assert len(part.work) == 4 and part.starts.tolist() == [4] * 9


def test_heads_of_different_strides_go_in_different_launches():
    check(Dilated(8, (1, 2, 4)), 100, 100, 3)
    check(Dilated(8, (1, 2, 3)) | Sinks(2), 100, 130, 3)
    found = layout(Dilated(8, (1, 2)), 100, 100, 2, Tile(128, 128))
    assert [part.stride for part in cuda_tables.tables(found, torch.device("cpu"), 8)] == [1, 2]


def block_rows(mask, block, keys, q_len, kv_len, heads):
    """A block mask as the device packs it: bool `[heads, 64-query rows, key tiles]`."""
    mask = mask.expand(heads, -1, -1).numpy().repeat(block // 64, axis=1).repeat(block // keys, axis=2)
    rows = 2 * -(-q_len // 128)
    return np.pad(mask, ((0, 0), (0, max(0, rows - mask.shape[1])), (0, 0)))[:, :rows, : -(-kv_len // keys)]


@pytest.mark.parametrize("block", (64, 128))
@pytest.mark.parametrize("base", (None, Causal(), SlidingWindow(150), Sinks(70) | SlidingWindow(90)), ids=str)
@pytest.mark.parametrize("lengths", ((700, 700), (300, 900), (64, 130)), ids=str)
def test_a_block_mask_filters_tiles(block, base, lengths):
    q_len, kv_len, heads = *lengths, 3
    generator = torch.Generator().manual_seed(block)
    shape = -(-q_len // block), -(-kv_len // block)
    for mask in (torch.rand(heads, *shape, generator=generator) < 0.4, torch.rand(shape, generator=generator) < 0.4):
        pattern = BlockSparse(mask, block) if base is None else BlockSparse(mask, block) & base
        blocks = cuda_blocks.split(pattern, q_len, kv_len, heads)
        for head_dim in (128, 192):
            found = layout(blocks.base, q_len, kv_len, heads, Tile(cuda_tables.QUERIES, blocks.keys(head_dim)))
            (part,) = cuda_tables.tables(found, torch.device("cpu"), 8, halves=True)
            packed = block_rows(cuda_blocks.mask_of(blocks.blocked, q_len, kv_len, heads, "cpu"), block, found.tile_k, q_len, kv_len, heads)
            pairs, _ = read(found, [part], q_len, kv_len, heads, packed)
            assert np.array_equal(pairs, pattern.mask(q_len, kv_len, heads).numpy())
            hidden = (part.dead[part.marks[:, :-1].long() & cuda_tables.FULL] != 0).any(-1)
            marked = part.marks[:, :-1] & cuda_tables.DEAD != 0
            assert not (marked & ~hidden).any()
            if kv_len % found.tile_k == 0:
                assert torch.equal(marked, hidden)


def test_bigbird_is_a_block_mask():
    pattern = BigBird(64, 3, 2, 3)
    for q_len, kv_len in ((700, 700), (256, 640)):
        blocks = cuda_blocks.split(pattern, q_len, kv_len, 3)
        mask = cuda_blocks.mask_of(blocks.blocked, q_len, kv_len, 3, torch.device("cpu"))
        assert torch.equal(mask.repeat_interleave(64, 1).repeat_interleave(64, 2)[:, :q_len, :kv_len], pattern.mask(q_len, kv_len, 3))


def test_what_is_no_filter_of_tiles():
    mask = torch.ones(8, 8, dtype=torch.bool)
    assert cuda_blocks.split(BlockSparse(mask, 32), 256, 256, 1) is None
    assert cuda_blocks.split(BlockSparse(mask, 64) | Causal(), 512, 512, 1) is None
    assert cuda_blocks.split(BlockSparse(mask, 64) & Dilated(100, (4,)), 512, 512, 1) is None
    assert cuda_blocks.split(BigBird(64), 100, 512, 1) is None
    assert cuda_blocks.split(BigBird(64) & BlockSparse(mask, 64), 512, 512, 1) is None
