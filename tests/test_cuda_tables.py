"""The tables of the CUDA engine mean the pattern: read here as the kernel reads them, on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from sparse_attention import cuda_tables
from sparse_attention.layout import layout
from sparse_attention.patterns import BigBird, Causal, Dilated, Longformer, Sinks, SlidingWindow
from sparse_attention.patterns.base import Tile
from tests.cases import CASES
from tests.strategies import calls


def read(found, parts, q_len, kv_len, heads):
    """How often each pair is visited, int `[heads, q_len, kv_len]`, and how often each query row of each head, a part."""
    pairs = np.zeros((heads, q_len, kv_len), int)
    rows = np.zeros((len(parts), heads, q_len), int)
    keys = found.tile_k
    for number, part in enumerate(parts):
        masks = part.masks.numpy().view(np.uint64)
        bits = (masks[..., None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)).astype(bool).reshape(len(masks), 128, keys)
        for head, row, tile, q_residue, q_step, k_residue, k_step, q_first, stride, q_count, q_long, k_long in part.work.numpy():
            assert stride == part.stride and q_residue < stride and q_residue + q_step * stride == q_first
            steps = q_len // stride + q_long
            assert q_long == (q_residue < q_len % stride) and q_step + q_count == steps
            local = 128 * tile + np.arange(128)
            q = q_first + stride * local[local < q_count]
            assert len(q)
            rows[number, head, q] += 1
            for first, count, mark in part.runs.numpy()[part.row_start[row] : part.row_start[row + 1]]:
                for t in range(first, first + count):
                    step = k_step + keys * t + np.arange(keys)
                    inside = step < kv_len // stride + k_long  # the rest is outside of the tensor map
                    mask = mark & cuda_tables.FULL
                    allowed = np.ones((128, keys), bool) if mask == cuda_tables.FULL else bits[mask]
                    if mask == cuda_tables.FULL:
                        assert inside.all() and mark == cuda_tables.FULL
                    np.add.at(pairs[head], np.ix_(q, k_residue + stride * step[inside]), allowed[: len(q), inside].astype(int))
    return pairs, rows


def check(pattern, q_len, kv_len, heads):
    want = pattern.mask(q_len, kv_len, heads).numpy()
    for keys in (cuda_tables.NARROW, cuda_tables.WIDE):
        found = layout(pattern, q_len, kv_len, heads, Tile(cuda_tables.QUERIES, keys))
        parts = cuda_tables.tables(found, torch.device("cpu"), 8)
        pairs, rows = read(found, parts, q_len, kv_len, heads)
        assert (rows == 1).all() and np.array_equal(pairs, want)


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_every_pattern(case):
    pattern = case.make()
    if cuda_tables.obstacle(pattern, case.q_len, case.kv_len, case.heads) is None:
        check(pattern, case.q_len, case.kv_len, case.heads)


@settings(max_examples=40, deadline=None)
@given(calls())
def test_any_composition(call):
    pattern, q_len, kv_len, heads = call
    if cuda_tables.obstacle(pattern, q_len, kv_len, heads) is None:
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
        tiles = np.concatenate([[0], part.runs[:, 1].numpy().cumsum()])[part.row_start.numpy()]
        lengths = np.diff(tiles)[part.work[:, 1].numpy()]
        starts = part.starts.tolist()
        assert starts[0] == 0 and starts[-1] == len(part.work)
        mine = [lengths[a:b] for a, b in zip(starts, starts[1:])]
        loads = [one.sum() + cuda_tables.BETWEEN * len(one) for one in mine]
        assert max(loads) - min(loads) < lengths.max() + cuda_tables.BETWEEN
        assert all(one[0] == max(one) for one in mine if max(one) > cuda_tables.LONG * lengths.mean())


def test_fewer_rows_than_processors():
    part = cuda_tables.tables(layout(SlidingWindow(30), 200, 200, 2, Tile(128, 128)), torch.device("cpu"), 8)[0]
    assert part.starts.tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 4]


def test_heads_of_different_strides_are_refused():
    assert "different strides" in cuda_tables.obstacle(Dilated(8, (1, 2)), 100, 100, 2)
    assert cuda_tables.obstacle(Dilated(8, (2, 2)), 100, 100, 2) is None


def test_block_patterns_take_narrow_tiles():
    assert cuda_tables.best_layout(BigBird(64), 4096, 4096, 2, 128).tile_k == cuda_tables.NARROW
    assert cuda_tables.best_layout(Causal(), 4096, 4096, 2, 128).tile_k == cuda_tables.WIDE
    assert cuda_tables.best_layout(Causal(), 4096, 4096, 2, 256).tile_k == cuda_tables.NARROW
