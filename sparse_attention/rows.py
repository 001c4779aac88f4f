"""Row tables: which keys each query sees, one list a query. What the gather engine reads (`RowsParams` in csrc/params.h)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from sparse_attention.patterns.base import Lengths, Pattern

# (query, key) candidates examined at once: a few arrays of 8-byte numbers, 32 MB each.
_CANDIDATES = 1 << 22


@dataclass(frozen=True, eq=False)
class Rows:
    """Row r of variant x holds columns[row_start[x * rows + r] : row_start[x * rows + r + 1]], ascending. CPU tensors.

    row_start: int64 [variants * rows + 1]; columns: int32 [pairs]; head_variant: int32 [heads].
    rows, cols: q_len and kv_len, or kv_len and q_len when transposed.
    """

    row_start: torch.Tensor
    columns: torch.Tensor
    head_variant: torch.Tensor
    rows: int
    cols: int

    @property
    def pairs(self) -> int:
        """Listed pairs, summed over heads."""
        per_variant = torch.diff(self.row_start[:: self.rows])
        return int(per_variant[self.head_variant.long()].sum())

    @property
    def nbytes(self) -> int:
        return self.row_start.nbytes + self.columns.nbytes + self.head_variant.nbytes

    def transpose(self) -> "Rows":
        """The same pairs by key, for the backward. Made once."""
        return self._transpose

    @cached_property
    def _transpose(self) -> "Rows":
        start = self.row_start.numpy()
        variants = (start.size - 1) // self.rows
        row = np.repeat(np.tile(np.arange(self.rows, dtype=np.int32), variants), np.diff(start))
        variant = np.repeat(np.arange(variants), np.diff(start[:: self.rows]))
        line = variant * self.cols + self.columns.numpy()
        return Rows(
            row_start=_starts(np.bincount(line, minlength=variants * self.cols)),
            columns=torch.from_numpy(row[np.argsort(line, kind="stable")]),
            head_variant=self.head_variant,
            rows=self.cols,
            cols=self.rows,
        )


def build(pattern: Pattern, q_len: int, kv_len: int, heads: int = 1) -> Rows:
    """Make the row table anew. Sizes that the pattern cannot apply to raise ValueError."""
    pattern.check(q_len, kv_len, heads)
    lengths = Lengths(q_len, kv_len)
    variants: dict[Pattern, int] = {}
    head_variant = [variants.setdefault(pattern.for_head(h), len(variants)) for h in range(heads)]
    counts, columns = [], []
    for variant in variants:
        for first in range(0, q_len, 1024):
            _append(variant, first, min(first + 1024, q_len), lengths, counts, columns)
    return Rows(
        row_start=_starts(np.concatenate(counts)),
        columns=torch.from_numpy(np.concatenate(columns)),
        head_variant=torch.tensor(head_variant, dtype=torch.int32),
        rows=q_len,
        cols=kv_len,
    )


_cached = lru_cache(maxsize=64)(build)


def rows(pattern: Pattern, q_len: int, kv_len: int, heads: int = 1) -> Rows:
    """The row table of `pattern`; a second call with equal arguments returns the same object."""
    return _cached(pattern, q_len, kv_len, heads)


def _append(pattern: Pattern, first: int, stop: int, lengths: Lengths, counts: list, columns: list) -> None:
    """The pairs of the queries first..stop, by halves if their spans hold too many candidates."""
    i = np.arange(first, stop) + lengths.offset
    spans = pattern.spans(i, i, lengths)
    start, end = np.maximum(spans.start, 0), np.minimum(spans.stop, lengths.kv_len)
    size = np.maximum(end - start, 0)
    if size.sum() > _CANDIDATES and stop - first > 1:
        middle = (first + stop) // 2
        _append(pattern, first, middle, lengths, counts, columns)
        _append(pattern, middle, stop, lengths, counts, columns)
        return
    row = np.repeat(spans.group, size)
    column = np.arange(size.sum()) + np.repeat(start - (np.cumsum(size) - size), size)
    place = row * lengths.kv_len + column
    if not np.all(place[1:] > place[:-1]):
        place = np.unique(place)
        row, column = np.divmod(place, lengths.kv_len)
    allowed = pattern.allows(torch.from_numpy(row + i[0]), torch.from_numpy(column), lengths).numpy()
    counts.append(np.bincount(row[allowed], minlength=stop - first))
    columns.append(column[allowed].astype(np.int32))


def _starts(counts: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]))
