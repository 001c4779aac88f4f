"""BigBird: global, window and random blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import or_

import numpy as np
import torch

from sparse_attention.patterns.base import Pattern, Rects, Spans
from sparse_attention.patterns.blocks import Blocked, check_block
from sparse_attention.patterns.validate import integer, set_field


@dataclass(frozen=True)
class BigBird(Pattern):
    """Blocks of three kinds, not causal (Zaheer et al. 2020). A query's block row sees

    * the first `globals` blocks, whose own rows see everything;
    * `window` blocks (odd) centred on its own;
    * `random` further blocks, drawn without repetition for each head and block row from `seed`; all that are left where
      fewer are.

    Blocks are those of absolute positions, so q_len may not exceed kv_len. The same arguments and kv_len draw the same blocks.
    """

    block: int = 64
    window: int = 3
    globals: int = 2
    random: int = 3
    seed: int = 0

    def __post_init__(self):
        check_block(self.block)
        for name, minimum in (("window", 1), ("globals", 0), ("random", 0)):
            set_field(self, name, integer(name, getattr(self, name), minimum))
        set_field(self, "seed", integer("seed", self.seed, 0, 2**64 - 1))
        if self.window % 2 == 0:
            raise ValueError(f"window is {self.window}; expected an odd number of blocks, centred on the query's own")

    def check(self, q_len, kv_len, heads):
        if q_len > kv_len:
            raise ValueError(f"q_len is {q_len}; expected at most kv_len, {kv_len}: BigBird has no blocks before position 0")

    def for_head(self, head):
        return BigBirdHead(self, head)


@dataclass(frozen=True)
class BigBirdHead(Blocked):
    """What one head of a BigBird pattern sees."""

    bigbird: BigBird
    head: int

    @property
    def block(self) -> int:
        return self.bigbird.block

    def allows(self, i, j, lengths):
        table = (torch.from_numpy(side).to(i.device) for side in self._table(lengths))
        return _within(i // self.block, j // self.block, *table)

    def seen(self, row, column, lengths):
        return _within(row, column, *self._table(lengths))

    def spans(self, first, last, lengths):
        start, stop = self._table(lengths)
        row0, row1 = first // self.block, last // self.block
        rows = [np.minimum(row0 + n, row1) for n in range(int((row1 - row0).max(initial=0)) + 1)]
        columns = np.concatenate([start[row] for row in rows], axis=1), np.concatenate([stop[row] for row in rows], axis=1)
        return Spans.of(*((side[0] * self.block, side[1] * self.block) for side in zip(columns[0].T, columns[1].T)))

    def _ranges(self, rects: Rects, lengths):
        """For each block row a rectangle touches: the row's ranges and the rectangle's columns."""
        start, stop = self._table(lengths)
        row0, row1, column0, column1 = self.block_rects(rects, lengths)
        for n in range(int((row1 - row0).max(initial=0))):
            row = np.minimum(row0 + n, row1 - 1)
            yield start[row], stop[row], column0[:, None], column1[:, None]

    def full(self, rects, lengths):
        out = np.ones(rects.i0.shape, dtype=bool)
        for start, stop, column0, column1 in self._ranges(rects, lengths):
            out &= ((start <= column0) & (column1 <= stop)).any(axis=1)
        return out

    def empty(self, rects, lengths):
        out = np.ones(rects.i0.shape, dtype=bool)
        for start, stop, column0, column1 in self._ranges(rects, lengths):
            out &= ~((start < column1) & (column0 < stop)).any(axis=1)
        return out

    def _table(self, lengths):
        return _table(self.bigbird, self.head, -(-lengths.kv_len // self.block))


def _within(row, column, start, stop):
    """Whether a block column lies in one of its row's ranges; arrays or tensors that broadcast."""
    inside = [(start[row, n] <= column) & (column < stop[row, n]) for n in range(start.shape[1])]
    return reduce(or_, inside)


@lru_cache(maxsize=256)
def _table(bigbird: BigBird, head: int, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """The block columns [start, stop) that each block row sees, ascending: two int64 arrays `[blocks, n]`; empty ranges are (0, 0)."""
    start, stop = (side[0].numpy() for side in block_ranges(bigbird, range(head, head + 1), blocks))
    group, start, stop = Spans(np.repeat(np.arange(blocks), start.shape[1]), start.ravel(), stop.ravel()).merged()
    counts = np.bincount(group, minlength=blocks)
    place = np.arange(group.size) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.zeros((2, blocks, int(counts.max())), dtype=np.int64)
    table[:, group, place] = start, stop
    return table[0], table[1]


def block_ranges(
    bigbird: BigBird, heads: range, blocks: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block columns [start, stop) whose union each block row of some heads sees: two int64 tensors `[heads, blocks, n]`."""
    row = torch.arange(blocks, device=device)
    half = bigbird.window // 2
    low, high = (row - half).clamp(min=bigbird.globals), (row + half + 1).clamp(max=blocks)
    globals_ = min(bigbird.globals, blocks)
    window = (high - low).clamp(min=0)
    drawn = _draw(bigbird.seed, heads, blocks - globals_ - window, min(bigbird.random, blocks))
    # Drawn numbers count the blocks that are neither global nor in the window.
    column = drawn + globals_
    column += torch.where((column >= low[:, None]) & (window > 0)[:, None], window[:, None], 0)
    start, stop = torch.zeros(2, len(heads), blocks, 2 + drawn.shape[2], dtype=torch.int64, device=device)
    stop[:, :, 0] = globals_
    start[:, :, 1], stop[:, :, 1] = low, torch.maximum(high, low)
    start[:, :, 2:], stop[:, :, 2:] = torch.where(drawn >= 0, column, 0), torch.where(drawn >= 0, column + 1, 0)
    start[:, :globals_], stop[:, :globals_] = 0, blocks
    return start, stop


def _draw(seed: int, heads: range, sizes: torch.Tensor, count: int) -> torch.Tensor:
    """`count` distinct numbers below each of `sizes`, -1 past the size: int64 `[heads, len(sizes), count]` (Floyd's sampling)."""
    tops = sizes - count + torch.arange(count, device=sizes.device)[:, None]  # [count, len(sizes)]
    draws = np.stack([np.random.default_rng([seed, head]).random((count, len(sizes))) for head in heads])
    numbers = (torch.from_numpy(draws).to(sizes.device) * (tops.clamp(min=0) + 1)).long()
    out = torch.full((len(heads), len(sizes), count), -1, device=sizes.device)
    for n in range(count):
        taken = (out == numbers[:, n, :, None]).any(2)
        drawn = torch.where(taken, tops[n], numbers[:, n])
        out[:, :, n] = torch.where(sizes >= count, drawn, torch.where(n < sizes, n, -1))
    return out
