"""The keys of every query row, one by one: what the gather engine reads (`RowsParams` in csrc/params.h)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from sparse_attention.cache import cached_by_bytes
from sparse_attention.patterns.base import Lengths, Pattern, Spans, check_sizes

# Query rows whose spans are asked for at once, and candidate pairs that are tested at once.
ROWS = 1024
CANDIDATES = 1 << 21


@dataclass(frozen=True, eq=False)
class Rows:
    """CSR lists of each distinct head, one head after the other. CPU tensors.

    row_start: int64 `[variants * n + 1]`, n = q_len: query row r of variant x sees the ascending keys
    columns[row_start[x * n + r] : row_start[x * n + r + 1]]. columns: int32. head_variant: int32 `[heads]`.
    Of the transpose, n = kv_len and the lists hold the local query rows that see a key.
    """

    row_start: torch.Tensor
    columns: torch.Tensor
    head_variant: torch.Tensor
    q_len: int
    kv_len: int
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        return self.row_start.nbytes + self.columns.nbytes + self.head_variant.nbytes

    def transpose(self) -> "Rows":
        """The query rows of every key, for the backward. Made once."""
        return self._transpose

    @cached_property
    def _transpose(self) -> "Rows":
        n, other = (self.kv_len, self.q_len) if self.transposed else (self.q_len, self.kv_len)
        columns = self.columns.numpy()
        variants = (self.row_start.numel() - 1) // n
        row = np.repeat(np.tile(np.arange(n, dtype=np.int32), variants), np.diff(self.row_start.numpy()))
        starts, lists = [np.zeros(1, dtype=np.int64)], []
        for x in range(variants):
            here = slice(*self.row_start[[x * n, (x + 1) * n]].tolist())
            lists.append(row[here][_stable_order(columns[here], other)])
            starts.append(here.start + np.cumsum(np.bincount(columns[here], minlength=other)))
        return Rows(
            torch.from_numpy(np.concatenate(starts)),
            torch.from_numpy(np.concatenate(lists)),
            self.head_variant,
            self.q_len,
            self.kv_len,
            not self.transposed,
        )


def rows(pattern: Pattern, q_len: int, kv_len: int, heads: int = 1) -> Rows:
    """The key lists of `pattern`; a second call with equal arguments returns the same object.

    Making them costs what the pattern's spans hold: n^2 for a pattern that promises nothing.
    """
    return _cached(pattern.frozen(), q_len, kv_len, heads)


def build_rows(pattern: Pattern, q_len: int, kv_len: int, heads: int = 1) -> Rows:
    """Make the lists anew. Sizes that the pattern cannot apply to raise ValueError."""
    check_sizes(pattern, q_len, kv_len, heads)
    lengths = Lengths(q_len, kv_len)
    variants: dict[Pattern, int] = {}
    head_variant = [variants.setdefault(pattern.for_head(h), len(variants)) for h in range(heads)]
    lists = [_lists(variant, lengths) for variant in variants]
    counts = np.concatenate([[0], *(count for count, _ in lists)])
    return Rows(
        torch.from_numpy(np.cumsum(counts)),
        torch.from_numpy(np.concatenate([columns for _, columns in lists])),
        torch.from_numpy(np.array(head_variant, dtype=np.int32)),
        q_len,
        kv_len,
    )


_cached = cached_by_bytes(1 << 30)(build_rows)


def _lists(pattern, lengths):
    """Keys of each query: int64 counts `[q_len]` and int32 columns."""
    counts, columns = [], []
    for begin in range(0, lengths.q_len, ROWS):
        i = np.arange(begin, min(begin + ROWS, lengths.q_len)) + lengths.offset
        group, start, stop = pattern.spans(i, i, lengths)
        group, start, stop = Spans(group, np.maximum(start, 0), np.minimum(stop, lengths.kv_len)).merged()
        ends = np.cumsum(stop - start)
        cuts = np.searchsorted(ends, np.arange(CANDIDATES, ends[-1] if ends.size else 0, CANDIDATES))
        for piece in np.split(np.arange(group.size), cuts):
            row, column = _expand(group[piece], start[piece], stop[piece])
            seen = pattern.allows(torch.from_numpy(i[row]), torch.from_numpy(column), lengths).numpy()
            counts.append((begin + row)[seen])
            columns.append(column[seen].astype(np.int32))
    return np.bincount(np.concatenate(counts), minlength=lengths.q_len), np.concatenate(columns)


def _expand(group, start, stop):
    """Every (group, key) of ascending spans."""
    counts = stop - start
    key = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts - start, counts)
    return np.repeat(group, counts), key


def _stable_order(values: np.ndarray, bound: int) -> np.ndarray:
    """Stable argsort of values in [0, bound): numpy sorts 16-bit integers by radix, wider ones by merging."""
    order = np.argsort((values & 0xFFFF).astype(np.uint16), kind="stable")
    if bound > 1 << 16:
        order = order[np.argsort((values[order] >> 16).astype(np.uint16), kind="stable")]
    return order
