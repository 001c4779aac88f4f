"""Patterns whose unit is a square block of pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sparse_attention.patterns.base import Lengths, Pattern, Rects, Spans
from sparse_attention.patterns.digest import Digested
from sparse_attention.patterns.validate import set_field

BLOCKS = (16, 32, 64, 128)


def check_block(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value not in BLOCKS:
        raise ValueError(f"block is {value!r}; expected one of {BLOCKS}")


def check_mask(mask: object) -> None:
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.ndim not in (2, 3) or 0 in mask.shape:
        got = f"{mask.dtype} tensor of shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else repr(mask)
        raise ValueError(f"block_mask is {got}; expected a bool tensor [q_blocks, kv_blocks], or one per head")


def check_shape(pattern: Pattern, q_len: int, kv_len: int, heads: int) -> None:
    """That the block mask of a pattern fits the sizes of a call."""
    shape, block = tuple(pattern.block_mask.shape), pattern.block
    expected = (-(-q_len // block), -(-kv_len // block))
    if shape[-2:] != expected:
        raise ValueError(f"block_mask has shape {shape}; expected {expected} blocks of {block} for q_len {q_len} and kv_len {kv_len}")
    if len(shape) == 3 and shape[0] != heads:
        raise ValueError(f"block_mask has shape {shape}, a mask for each of {shape[0]} heads; expected {heads} heads")


class Blocked(Pattern):
    """Allows whole blocks; subclasses have a field `block` and say `seen` and `first_row`."""

    def seen(self, row: np.ndarray, column: np.ndarray, lengths: Lengths) -> np.ndarray:
        """Whether blocks are allowed; int64 arrays that broadcast -> bool array."""
        raise NotImplementedError(f"{type(self).__name__} must define seen(row, column, lengths)")

    def first_row(self, lengths: Lengths) -> int:
        """The query position at which block row 0 begins."""
        return 0

    def block_rects(self, rects: Rects, lengths: Lengths) -> Rects:
        """The blocks that rectangles touch."""
        start = self.first_row(lengths)
        row0, row1 = (rects.i0 - start) // self.block, (rects.i1 - 1 - start) // self.block + 1
        return Rects(row0, row1, rects.j0 // self.block, (rects.j1 - 1) // self.block + 1)

    def signature(self, rects, lengths):
        """Where the rectangle cuts its blocks, and a bit for each block: when these fit in 63 bits."""
        row0, row1, column0, column1 = self.block_rects(rects, lengths)
        rows, columns = int((row1 - row0).max(initial=1)), int((column1 - column0).max(initial=1))
        if rows * columns > 48:
            return super().signature(rects, lengths)
        row = np.minimum(row0[:, None, None] + np.arange(rows)[:, None], row1[:, None, None] - 1)
        column = np.minimum(column0[:, None, None] + np.arange(columns), column1[:, None, None] - 1)
        weights = 1 << np.arange(rows * columns)
        bits = self.seen(row, column, lengths).reshape(-1, rows * columns) @ weights
        phase = (rects.i0 - self.first_row(lengths)) % self.block * self.block + rects.j0 % self.block
        return bits * self.block**2 + phase


@dataclass(frozen=True, eq=False)
class BlockSparse(Digested, Blocked):
    """The blocks of `block` x `block` pairs whose entry of `block_mask` is True.

    block_mask: bool tensor `[q_blocks, kv_blocks]`, or `[heads, q_blocks, kv_blocks]` for one mask per head. Row r holds
    the queries whose local index // block is r (so it does not depend on kv_len), column c the keys whose position // block
    is c; q_blocks and kv_blocks are the lengths over `block`, rounded up. The tensor is copied.
    block: 16, 32, 64 or 128.
    """

    block_mask: torch.Tensor
    block: int

    has_text = False

    def __post_init__(self):
        mask = self.block_mask
        check_mask(mask)
        check_block(self.block)
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
        check_shape(self, q_len, kv_len, heads)

    def for_head(self, head):
        return self._heads[head] if self.block_mask.ndim == 3 else self

    def first_row(self, lengths):
        return lengths.offset

    def allows(self, i, j, lengths):
        return self.block_mask.to(i.device)[(i - lengths.offset) // self.block, j // self.block]

    def seen(self, row, column, lengths):
        return self.block_mask.numpy()[row, column]

    def spans(self, first, last, lengths):
        row0, row1 = (first - lengths.offset) // self.block, (last - lengths.offset) // self.block + 1
        by_row = np.diff(self._sums, axis=1)
        seen = np.zeros((first.size, by_row.shape[1] + 2), dtype=np.int8)
        seen[:, 1:-1] = by_row[row1] > by_row[row0]
        edge = np.diff(seen, axis=1)
        group, start = np.nonzero(edge == 1)
        return Spans(group, start * self.block, np.nonzero(edge == -1)[1] * self.block)

    def _allowed(self, rects, lengths):
        """How many of the blocks that a rectangle touches are allowed, and how many there are."""
        r0, r1, c0, c1 = self.block_rects(rects, lengths)
        s = self._sums
        return s[r1, c1] - s[r0, c1] - s[r1, c0] + s[r0, c0], (r1 - r0) * (c1 - c0)

    def full(self, rects, lengths):
        allowed, area = self._allowed(rects, lengths)
        return allowed == area

    def empty(self, rects, lengths):
        return self._allowed(rects, lengths)[0] == 0

    def _pairs(self, lengths):
        q, k = (
            np.diff(np.minimum(np.arange(blocks + 1) * self.block, length))
            for blocks, length in zip(self.block_mask.shape, lengths)
        )
        return int(q @ self.block_mask.numpy().astype(np.int64) @ k)
