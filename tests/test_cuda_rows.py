"""What the CUDA gather engine reads, made without a device: pieces, heads together, counts, limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sparse_attention as sa
from sparse_attention import cuda_rows
from sparse_attention.dispatch import Sizes, work
from sparse_attention.layout import Tile, layout, rows
from tests.cases import CASES, csr

CPU = torch.device("cpu")


def sizes(batch, heads, kv_heads, q_len, kv_len, head_dim=64, dtype=torch.bfloat16):
    return Sizes(batch, heads, kv_heads, q_len, kv_len, head_dim, dtype, "cuda")


@pytest.mark.parametrize("longest", [1, 7, 64, 1000])
def test_pieces_hold_every_key_of_a_long_row_once(longest):
    counts = np.random.default_rng(0).integers(0, 300, (3, 50))
    firsts = np.array([0, 2, 2, 1])
    pieces, splits = cuda_rows.cut(counts, firsts, 2, longest)
    assert (pieces[:, 3] > 0).all() and (pieces[:, 3] <= longest).all()
    seen = 0
    for head, row, first_piece, number in splits:
        mine = pieces[first_piece : first_piece + number]
        assert (mine[:, 0] == head).all() and (mine[:, 1] == row).all()
        assert mine[0, 2] == 0 and (mine[1:, 2] == mine[:-1, 2] + mine[:-1, 3]).all()
        assert mine[:, 3].sum() == counts[firsts[head // 2], row] > longest
        seen += number
    assert seen == len(pieces) and len(splits) == (counts[firsts] > longest).sum()


@pytest.mark.parametrize(
    "variants, kv_heads, together",
    [
        ([0] * 8, 8, 1),
        ([0] * 8, 4, 2),
        ([0] * 8, 2, 4),
        ([0] * 8, 1, 4),
        ([0] * 6, 1, 2),
        ([0] * 6, 2, 1),
        ([0, 0, 1, 1], 1, 2),
        ([0, 1, 0, 1], 1, 1),
        ([0, 0, 0, 0, 1, 1, 1, 1], 2, 4),
    ],
)
def test_heads_go_together_that_share_keys_and_lists(variants, kv_heads, together):
    assert cuda_rows.heads_together(np.array(variants), kv_heads) == together


def test_no_more_heads_than_there_are_kernels_for():
    made = rows(sa.Causal(), 40, 40, 8)
    for head_dim, dtype, together in ((256, torch.bfloat16, 4), (64, torch.float32, 4), (72, torch.float32, 2), (64, torch.float64, 1)):
        assert cuda_rows.tables(made, sizes(1, 8, 1, 40, 40, head_dim, dtype), CPU, 132).together == together


def test_short_rows_go_several_to_a_warp_unless_some_is_long():
    for pattern, apart in ((sa.LogSparse(), True), (sa.SlidingWindow(200), False), (sa.LogSparse() | sa.Longformer(2, 1), False)):
        made = cuda_rows.tables(rows(pattern, 700, 700, 2), sizes(1, 2, 2, 700, 700), CPU, 132)
        assert made.apart == apart and bool(len(made.pieces)) == bool(len(made.splits))
    assert len(made.pieces) and made.longest == cuda_rows.SHORTEST


def test_rows_are_cut_less_finely_where_there_are_many():
    made = rows(sa.Dense(), 512, 2048, 1)
    few, many = (cuda_rows.tables(made, sizes(batch, 1, 1, 512, 2048), CPU, 4) for batch in (1, 64))
    assert few.longest == 2048 * 512 // (4 * cuda_rows.WARPS * cuda_rows.SHARES) and len(few.pieces) == 0
    assert cuda_rows.tables(made, sizes(1, 1, 1, 512, 2048), CPU, 132).longest == cuda_rows.SHORTEST
    assert many.longest == 64 * few.longest


@pytest.mark.parametrize("case", [c for c in CASES if "live" not in c.id], ids=lambda c: c.id)
def test_pairs(case):
    pattern = case.make()
    mask = pattern.mask(case.q_len, case.kv_len, case.heads)
    listed, pairs = cuda_rows.pairs(pattern, case.q_len, case.kv_len, case.heads)
    assert pairs == mask.sum()
    assert listed == rows(pattern, case.q_len, case.kv_len, case.heads).columns.numel()


def test_touched_tiles_are_those_of_the_layout():
    for pattern, q_len, kv_len in ((sa.LogSparse(3), 300, 411), (csr(280, 300), 280, 300), (csr(280, 300) & sa.Dilated(9, (1, 2)), 280, 300)):
        for tile in (Tile(128, 64), Tile(64, 64)):
            assert cuda_rows.touched(pattern, q_len, kv_len, 2, tile) == layout(pattern, q_len, kv_len, 2, tile).counts.visited


def test_what_dispatch_counts(monkeypatch):
    lengths = 1, 4, 4, 300, 300
    assert set(work(sa.SlidingWindow(30), sizes(*lengths))) == {"dense", "tile"}
    assert set(work(sa.LogSparse(), sizes(*lengths))) == {"dense", "tile", "gather"}
    assert set(work(sa.SlidingWindow(30), sizes(*lengths, dtype=torch.float32))) == {"dense", "gather"}
    assert work(sa.LogSparse(), sizes(*lengths))["gather"].pairs == sa.LogSparse().pairs(300, 300, 4)
    monkeypatch.setattr(cuda_rows, "PAIRS", 1000)
    assert set(work(sa.SlidingWindow(30), sizes(*lengths, dtype=torch.float32))) == {"dense"}
    assert "takes up to 1,000" in cuda_rows.obstacle(sa.SlidingWindow(30), 300, 300, 4)
    assert cuda_rows.obstacle(sa.SlidingWindow(3), 300, 300, 4) is None
