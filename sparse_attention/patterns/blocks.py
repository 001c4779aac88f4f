"""Patterns given as a mask of blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sparse_attention.patterns.base import Rects, Spans
from sparse_attention.patterns.digest import Digested
from sparse_attention.patterns.validate import set_field

BLOCKS = (16, 32, 64, 128)


@dataclass(frozen=True, eq=False)
class BlockSparse(Digested):
    """The blocks of `block` x `block` pairs whose entry of `block_mask` is True.

    block_mask: bool tensor `[q_blocks, kv_blocks]`, or `[heads, q_blocks, kv_blocks]` for one mask per head. Row r holds
    the queries whose local index // block is r (so it does not depend on kv_len), column c the keys whose position // block
    is c; q_blocks and kv_blocks are the lengths over `block`, rounded up. The tensor is copied.
    block: 16, 32, 64 or 128.
    """

    block_mask: torch.Tensor
    block: int

    def __post_init__(self):
        mask = self.block_mask
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.ndim not in (2, 3) or 0 in mask.shape:
            got = f"{mask.dtype} tensor of shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else repr(mask)
            raise ValueError(f"block_mask is {got}; expected a bool tensor [q_blocks, kv_blocks] or [heads, q_blocks, kv_blocks]")
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block not in BLOCKS:
            raise ValueError(f"block is {self.block!r}; expected one of {BLOCKS}")
        set_field(self, "block_mask", mask.detach().to("cpu", copy=True).contiguous())
        self._digest_from(self.block_mask, self.block)
        if mask.ndim == 3:
            set_field(self, "_heads", tuple(BlockSparse(one, self.block) for one in self.block_mask))
            return
        # sums[r, c]: how many blocks of rows < r and columns < c are allowed.
        sums = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), dtype=np.int64)
        sums[1:, 1:] = self.block_mask.numpy().cumsum(0).cumsum(1)
        set_field(self, "_sums", sums)

    def __repr__(self):
        shape = "x".join(str(n) for n in self.block_mask.shape)
        held = f"<{shape}, {int(self.block_mask.sum())} of {self.block_mask.numel()}>"
        return f"BlockSparse(block_mask={held}, block={self.block})"

    def check(self, q_len, kv_len, heads):
        shape = tuple(self.block_mask.shape)
        expected = (-(-q_len // self.block), -(-kv_len // self.block))
        if shape[-2:] != expected:
            raise ValueError(
                f"block_mask has shape {shape}; expected {expected} blocks of {self.block} for q_len {q_len} and kv_len {kv_len}"
            )
        if len(shape) == 3 and shape[0] != heads:
            raise ValueError(f"block_mask has shape {shape}, a mask for each of {shape[0]} heads; expected {heads} heads")

    def for_head(self, head):
        return self._heads[head] if self.block_mask.ndim == 3 else self

    def allows(self, i, j, lengths):
        return self.block_mask.to(i.device)[(i - lengths.offset) // self.block, j // self.block]

    def spans(self, first, last, lengths):
        row0, row1 = (first - lengths.offset) // self.block, (last - lengths.offset) // self.block + 1
        by_row = np.diff(self._sums, axis=1)
        seen = np.zeros((first.size, by_row.shape[1] + 2), dtype=np.int8)
        seen[:, 1:-1] = by_row[row1] > by_row[row0]
        edge = np.diff(seen, axis=1)
        group, start = np.nonzero(edge == 1)
        return Spans(group, start * self.block, np.nonzero(edge == -1)[1] * self.block)

    def _blocks(self, rects: Rects, lengths):
        """Block rectangle of each rectangle: first row, rows stop, first column, columns stop."""
        i0, i1 = rects.i0 - lengths.offset, rects.i1 - lengths.offset
        return i0 // self.block, (i1 - 1) // self.block + 1, rects.j0 // self.block, (rects.j1 - 1) // self.block + 1

    def _allowed(self, rects, lengths):
        r0, r1, c0, c1 = self._blocks(rects, lengths)
        s = self._sums
        return s[r1, c1] - s[r0, c1] - s[r1, c0] + s[r0, c0], (r1 - r0) * (c1 - c0)

    def full(self, rects, lengths):
        allowed, area = self._allowed(rects, lengths)
        return allowed == area

    def empty(self, rects, lengths):
        return self._allowed(rects, lengths)[0] == 0

    def signature(self, rects, lengths):
        r0, r1, c0, c1 = self._blocks(rects, lengths)
        rows, columns = int((r1 - r0).max(initial=1)), int((c1 - c0).max(initial=1))
        phases = self.block * self.block
        if rows * columns > 48:
            return super().signature(rects, lengths)
        mask = self.block_mask.numpy()
        bits = np.zeros(r0.shape, dtype=np.int64)
        for r in range(rows):
            for c in range(columns):
                inside = (r0 + r < r1) & (c0 + c < c1)
                seen = mask[np.minimum(r0 + r, mask.shape[0] - 1), np.minimum(c0 + c, mask.shape[1] - 1)]
                bits = bits * 2 + (seen & inside)
        phase = (rects.i0 - lengths.offset) % self.block * self.block + rects.j0 % self.block
        return bits * phases + phase

    def _pairs(self, lengths):
        q = np.minimum(np.arange(1, self.block_mask.shape[0] + 1) * self.block, lengths.q_len)
        k = np.minimum(np.arange(1, self.block_mask.shape[1] + 1) * self.block, lengths.kv_len)
        q, k = np.diff(q, prepend=0), np.diff(k, prepend=0)
        return int(q @ self.block_mask.numpy().astype(np.int64) @ k)
