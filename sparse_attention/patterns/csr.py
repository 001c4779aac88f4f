"""Pairs given one by one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sparse_attention.patterns.base import Spans
from sparse_attention.patterns.digest import Digested
from sparse_attention.patterns.validate import set_field


@dataclass(frozen=True, eq=False)
class Csr(Digested):
    """The listed pairs: local query r sees the keys col_idx[row_ptr[r] : row_ptr[r + 1]]; the same for every head.

    row_ptr: int32 or int64 tensor `[q_len + 1]`, from 0 to len(col_idx), not falling. col_idx: int32 or int64 tensor of
    key positions in [0, kv_len). Columns need not be sorted, a duplicate counts once, rows may be empty. Both are copied.
    """

    row_ptr: torch.Tensor
    col_idx: torch.Tensor

    has_text = False

    def __post_init__(self):
        for name in ("row_ptr", "col_idx"):
            value = getattr(self, name)
            if not isinstance(value, torch.Tensor) or value.dtype not in (torch.int32, torch.int64) or value.ndim != 1:
                kind = f"{value.dtype} tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
                raise ValueError(f"{name} is {kind}; expected a one-dimensional int32 or int64 tensor")
            set_field(self, name, value.detach().to("cpu", copy=True).contiguous())
        start, columns = self.row_ptr.numpy().astype(np.int64), self.col_idx.numpy().astype(np.int64)
        if start.size < 2:
            raise ValueError(f"row_ptr has {start.size} entries; expected q_len + 1, at least 2")
        if start[0] != 0 or start[-1] != columns.size:
            raise ValueError(f"row_ptr runs from {start[0]} to {start[-1]}; expected 0 to len(col_idx), {columns.size}")
        counts = np.diff(start)
        if counts.min() < 0:
            row = int(np.argmax(counts < 0))
            raise ValueError(f"row_ptr[{row + 1}] is {start[row + 1]}; expected at least row_ptr[{row}], {start[row]}")
        if columns.size and columns.min() < 0:
            at = int(np.argmax(columns < 0))
            raise ValueError(f"col_idx[{at}] is {columns[at]}; expected at least 0")
        # keys: row * width + column of each pair, ascending and without duplicates.
        width = int(columns.max(initial=0)) + 1
        keys = np.unique(np.repeat(np.arange(counts.size), counts) * width + columns)
        set_field(self, "_width", width)
        set_field(self, "_keys", keys)
        self._digest_from(self.row_ptr, self.col_idx)

    def __repr__(self):
        return f"Csr(row_ptr=<{self.row_ptr.numel()}>, col_idx=<{self.col_idx.numel()}>)"

    def check(self, q_len, kv_len, heads):
        if self.row_ptr.numel() != q_len + 1:
            raise ValueError(f"row_ptr has {self.row_ptr.numel()} entries; expected q_len + 1, {q_len + 1}")
        if self._width > kv_len and self.col_idx.numel():
            raise ValueError(f"col_idx holds {self._width - 1}; expected less than kv_len, {kv_len}")

    def allows(self, i, j, lengths):
        keys = torch.from_numpy(self._keys).to(i.device)
        if keys.numel() == 0:
            return torch.zeros(torch.broadcast_shapes(i.shape, j.shape), dtype=torch.bool, device=i.device)
        wanted = (i - lengths.offset) * self._width + j
        found = torch.searchsorted(keys, wanted.contiguous()).clamp(max=keys.numel() - 1)
        return (keys[found] == wanted) & (j < self._width)

    def spans(self, first, last, lengths):
        """Every listed pair is a range of one key."""
        start, stop = (np.searchsorted(self._keys, row * self._width) for row in (first - lengths.offset, last - lengths.offset + 1))
        group, at = _expand(start, stop)
        column = self._keys[at] % self._width
        return Spans(group, column, column + 1)

    def empty(self, rects, lengths):
        return np.zeros(rects.i0.shape, dtype=bool)

    def bits(self, rects, tile, lengths):
        row = rects.i0[:, None] - lengths.offset + np.arange(tile.q)
        row = np.where(row < (rects.i1 - lengths.offset)[:, None], row, self.row_ptr.numel() - 1)
        low = np.minimum(rects.j0, self._width)[:, None]
        high = np.minimum(rects.j1, self._width)[:, None]
        start = np.searchsorted(self._keys, (row * self._width + low).ravel())
        stop = np.searchsorted(self._keys, (row * self._width + high).ravel())
        line, at = _expand(start, stop)
        out = np.zeros((rects.i0.size * tile.q, tile.k), dtype=bool)
        out[line, self._keys[at] % self._width - rects.j0[line // tile.q]] = True
        return out.reshape(-1, tile.q, tile.k)

    def _pairs(self, lengths):
        return self._keys.size


def _expand(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All x in [start[n], stop[n]), and the n of each."""
    counts = stop - start
    group = np.repeat(np.arange(counts.size), counts)
    return group, np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts - start, counts)
