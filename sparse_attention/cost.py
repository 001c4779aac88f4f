"""What a call must do: pairs, FLOPs, bytes and visited tiles. Dispatch, `explain` and every benchmark count with these."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparse_attention.layout import layout as layout_of
from sparse_attention.patterns.base import Pattern
from sparse_attention.patterns.compose import And, Or
from sparse_attention.patterns.csr import Csr
from sparse_attention.patterns.dilated import LogSparse
from sparse_attention.rows import rows as rows_of


@dataclass(frozen=True)
class Cost:
    """Work of one forward call, summed over batch and heads.

    pairs: allowed (query, key) pairs. dense_pairs: all of them, q_len * kv_len.
    flops: 4 * pairs * head_dim (two products of two FLOPs); the backward needs 2.5 times that (Dao 2023).
    bytes: q, k, v read once and out written once, in the tensors' type.
    full, partial: tiles of 64 x 64 that the tile engine visits.
    """

    pairs: int
    dense_pairs: int
    flops: int
    bytes: int
    full: int
    partial: int

    @property
    def visited(self) -> int:
        """Visited tiles."""
        return self.full + self.partial

    @property
    def sparsity(self) -> float:
        """Share of the pairs that is not allowed."""
        return 1.0 - self.pairs / self.dense_pairs


def cost(
    pattern: Pattern, *, batch: int, heads: int, kv_heads: int, q_len: int, kv_len: int, head_dim: int, itemsize: int
) -> Cost:
    """The cost of `pattern` at these sizes; `itemsize` is the size of one element in bytes."""
    pairs, full, partial = (batch * n for n in count(pattern, q_len, kv_len, heads))
    rows = 2 * heads * q_len + 2 * kv_heads * kv_len
    return Cost(
        pairs=pairs,
        dense_pairs=batch * heads * q_len * kv_len,
        flops=4 * pairs * head_dim,
        bytes=batch * rows * head_dim * itemsize,
        full=full,
        partial=partial,
    )


def scattered(pattern: Pattern) -> bool:
    """Whether the pattern holds about one pair a tile, so that its row lists are smaller and sooner made than its tiles."""
    if isinstance(pattern, And):
        return scattered(pattern.a) or scattered(pattern.b)
    if isinstance(pattern, Or):
        return scattered(pattern.a) and scattered(pattern.b)
    return isinstance(pattern, (Csr, LogSparse))


def count(pattern: Pattern, q_len: int, kv_len: int, heads: int) -> tuple[int, int, int]:
    """Allowed pairs, full tiles and partial tiles of 64 x 64, summed over heads; by whichever table is the smaller one."""
    if not scattered(pattern):
        counts = layout_of(pattern, q_len, kv_len, heads).counts
        return counts.pairs, counts.full, counts.partial
    table = rows_of(pattern, q_len, kv_len, heads)
    uses = np.bincount(table.head_variant.numpy())
    start = table.row_start.numpy()
    row = np.repeat(np.arange(start.size - 1) % q_len + np.arange(start.size - 1) // q_len * _up(q_len), np.diff(start))
    tile = row // 64 * _up(kv_len) + table.columns.numpy() // 64
    per_tile = np.unique(tile, return_counts=True)
    variant = per_tile[0] // _up(kv_len) * 64 // _up(q_len)
    is_full = per_tile[1] == 64 * 64
    pairs = int((np.diff(start[::q_len]) * uses).sum())
    return pairs, int(uses[variant[is_full]].sum()), int(uses[variant[~is_full]].sum())


def _up(n: int) -> int:
    return -(-n // 64) * 64
