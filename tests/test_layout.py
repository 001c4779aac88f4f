"""Layouts and row lists, expanded by an independent reader of docs/design.md and compared with `pattern.mask`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from sparse_attention.layout import Tile, build, layout, rows
from sparse_attention.masks import transpose_masks
from sparse_attention.patterns import BlockSparse, Causal, Dense, Dilated, LogSparse, Predicate, SlidingWindow, Strided
from tests.cases import CASES, block_mask
from tests.strategies import calls


def bits_of(masks: torch.Tensor) -> list[np.ndarray]:
    """int64 [n, rows, words] -> n arrays of 0 and 1 [rows, columns]."""
    words = masks.numpy()[..., None]
    return list((words >> np.arange(64) & 1).reshape(*masks.shape[:2], masks.shape[2] * 64))


def expand(layout) -> np.ndarray:
    """How often the layout visits each pair: int64 [heads, q_len, kv_len]. Checks what docs/design.md says on the way."""
    out = np.zeros((layout.heads, layout.q_len, layout.kv_len), dtype=np.int64)
    for part in layout.parts:
        views, runs = part.views.tolist(), part.runs.tolist()
        starts, variants = part.row_start.tolist(), part.variant_views.tolist()
        masks, masks_t = bits_of(part.masks), bits_of(part.masks_t)
        assert [t.dtype for t in part.tensors()] == [torch.int32] * 5 + [torch.int64] * 2
        assert all(np.array_equal(mask, mask_t.T) for mask, mask_t in zip(masks, masks_t))
        assert part.masks.shape[1:] == (layout.tile_q, layout.tile_k // 64)
        for head, variant in enumerate(part.head_variant.tolist()):
            queries = []
            for q_first, k_first, stride, q_count, k_count, row_base in views[variants[variant] : variants[variant + 1]]:
                queries += range(q_first, q_first + stride * q_count, stride)
                sequence = np.zeros((-(-q_count // layout.tile_q) * layout.tile_q, -(-k_count // layout.tile_k) * layout.tile_k))
                lines = -(-k_count // layout.tile_k) if layout.transposed else -(-q_count // layout.tile_q)
                for line in range(lines):
                    reached = 0
                    for first, count, mask in runs[starts[row_base + line] : starts[row_base + line + 1]]:
                        assert first >= reached and count > 0, "runs ascend and do not overlap"
                        reached = first + count
                        for other in range(first, first + count):
                            row, column = (other, line) if layout.transposed else (line, other)
                            q0, k0 = row * layout.tile_q, column * layout.tile_k
                            assert mask >= 0 or k0 + layout.tile_k <= k_count, "a tile that is not whole is masked"
                            sequence[q0 : q0 + layout.tile_q, k0 : k0 + layout.tile_k] += 1 if mask < 0 else masks[mask]
                assert not sequence[:q_count, k_count:].any(), "keys past k_count have no bits"
                held = out[head, q_first : q_first + stride * q_count : stride, k_first : k_first + stride * k_count : stride]
                held += sequence[:q_count, :k_count].astype(np.int64)
            if variants[variant] < variants[variant + 1] or part is layout.parts[0]:
                assert sorted(queries) == list(range(layout.q_len)), "a query is in one view of a head"
    return out


def expand_rows(lists, heads: int) -> np.ndarray:
    """int64 [heads, q_len, kv_len]."""
    n, m = (lists.kv_len, lists.q_len) if lists.transposed else (lists.q_len, lists.kv_len)
    out = np.zeros((heads, n, m), dtype=np.int64)
    starts, columns = lists.row_start.tolist(), lists.columns.tolist()
    assert (lists.row_start.dtype, lists.columns.dtype) == (torch.int64, torch.int32)
    assert starts[-1] == len(columns)
    for head, variant in enumerate(lists.head_variant.tolist()):
        for r in range(n):
            held = columns[starts[variant * n + r] : starts[variant * n + r + 1]]
            assert held == sorted(held)
            for column in held:
                out[head, r, column] += 1
    return out.transpose(0, 2, 1) if lists.transposed else out


def check_layout(pattern, q_len, kv_len, heads, tile):
    mask = pattern.mask(q_len, kv_len, heads).numpy().astype(np.int64)
    made = build(pattern, q_len, kv_len, heads, tile)
    assert np.array_equal(expand(made), mask)
    assert np.array_equal(expand(made.transpose()), mask)
    assert made.counts.pairs == pattern.pairs(q_len, kv_len, heads) == mask.sum()
    visited = sum(
        int(part.runs[part.row_start[base + row] : part.row_start[base + row + 1], 1].sum())
        for part in made.parts
        for variant in part.head_variant.tolist()
        for *_, q_count, _, base in part.views[part.variant_views[variant] : part.variant_views[variant + 1]].tolist()
        for row in range(-(-q_count // tile.q))
    )
    assert made.counts.visited == visited
    return mask


def check_rows(pattern, q_len, kv_len, heads, mask):
    lists = rows(pattern, q_len, kv_len, heads)
    assert np.array_equal(expand_rows(lists, heads), mask)
    assert np.array_equal(expand_rows(lists.transpose(), heads), mask)


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
@pytest.mark.parametrize("tile", [Tile(64, 64), Tile(128, 64), Tile(64, 192)], ids=str)
def test_every_case(case, tile):
    pattern = case.make()
    mask = check_layout(pattern, *case[2:], tile)
    if tile == Tile(64, 64):
        check_rows(pattern, *case[2:], mask)


@settings(deadline=None, max_examples=150)
@given(calls())
def test_any_composition(call):
    check_rows(*call, check_layout(*call, Tile(64, 64)))


def test_a_second_call_returns_the_same_object():
    for make in (lambda: SlidingWindow(40) | Dilated(3, 4), lambda: BlockSparse(block_mask(4, 4), 64)):
        assert layout(make(), 200, 200, 2) is layout(make(), 200, 200, 2)
        assert rows(make(), 200, 200, 2) is rows(make(), 200, 200, 2)
        assert layout(make(), 200, 200, 2).transpose() is layout(make(), 200, 200, 2).transpose()
    assert layout(SlidingWindow(40), 200, 200) is not layout(SlidingWindow(41), 200, 200)
    assert layout(SlidingWindow(40), 200, 200) is not layout(SlidingWindow(40, causal=False), 200, 200)


def test_heads_that_agree_share_a_variant():
    part = build(Dilated(64, (1, 4, 1, 4)), 300, 300, 4).parts[0]
    assert part.head_variant.tolist() == [0, 1, 0, 1]
    assert rows(Dilated(64, (1, 4, 1, 4)), 300, 300, 4).head_variant.tolist() == [0, 1, 0, 1]


def test_a_million_tokens_cost_no_n_squared():
    n = 1 << 20
    window = build(SlidingWindow(4096), n, n)
    assert window.nbytes < 20e6 and window.transpose().nbytes < 20e6
    assert [len(part.masks) for part in window.parts] == [2]
    assert window.counts.pairs == n * 4096 - 4096 * 4095 // 2
    assert build(Causal(), n, n).counts.pairs == n * (n + 1) // 2
    assert build(Dense(), n, n).transpose().parts[0].runs.shape[0] == n // 64


def test_a_strided_layout_costs_what_a_plain_one_costs():
    plain, strided = build(SlidingWindow(256), 16384, 16384), build(Dilated(256, 4), 16384, 16384)
    assert len(strided.parts) == 1 and strided.parts[0].stride == 4
    assert strided.counts.visited < 1.1 * plain.counts.visited
    assert build(Strided(128), 16384, 16384).counts.visited < 0.05 * build(Causal(), 16384, 16384).counts.visited


def test_equal_tiles_share_a_mask():
    masks = build(BlockSparse(block_mask(128, 128, density=0.5), 16), 2048, 2048).parts[0].masks
    assert len(torch.unique(masks.flatten(1), dim=0)) == len(masks)


def test_row_lists_of_structured_patterns_are_long_enough_for_long_sequences():
    lists = rows(LogSparse(), 1 << 17, 1 << 17)
    assert lists.columns.numel() == LogSparse().pairs(1 << 17, 1 << 17)
    last = lists.columns[lists.row_start[-2] :].tolist()
    n = (1 << 17) - 1
    assert last == sorted([n] + [n - (1 << p) for p in range(17)])
    turned = lists.transpose()
    for key in (0, 3, 70_000, n):
        seen_by = turned.columns[turned.row_start[key] : turned.row_start[key + 1]].tolist()
        assert seen_by == [key] + [key + (1 << p) for p in range(17) if key + (1 << p) <= n]


@pytest.mark.parametrize("shape", [(5, 64, 1), (3, 128, 1), (2, 64, 3), (4, 192, 2), (0, 64, 1)])
def test_masks_transpose(shape):
    masks = torch.randint(-(2**63), 2**63 - 1, shape, generator=torch.Generator().manual_seed(0))
    turned = torch.from_numpy(transpose_masks(masks.numpy()))
    assert turned.shape == (shape[0], shape[2] * 64, shape[1] // 64)
    assert all(np.array_equal(a, b.T) for a, b in zip(bits_of(masks), bits_of(turned)))


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((0, 10), "q_len is 0"),
        ((10, 0), "kv_len is 0"),
        ((10, -3), "kv_len is -3"),
        ((10, 10, 0), "heads is 0"),
        ((10, 2**31), "kv_len is 2147483648"),
        ((10, 10, 1, Tile(32, 64)), "tile is Tile.q=32, k=64."),
        ((10, 10, 1, Tile(64, 100)), "tile is Tile.q=64, k=100."),
    ],
)
def test_sizes_that_are_no_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        build(Causal(), *sizes)


def test_a_predicate_sees_only_real_positions():
    table = torch.zeros(70, 90, dtype=torch.bool)
    table[3, 80] = table[69, 0] = True
    pattern = Predicate(lambda i, j: table[i - 20, j])
    assert build(pattern, 70, 90).counts.pairs == 2
    assert rows(pattern, 70, 90).columns.tolist() == [80, 0]
