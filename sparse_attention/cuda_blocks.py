"""Patterns of blocks on CUDA: the block mask becomes a layout on the device, a filter over the tiles of what is left of the pattern."""

from __future__ import annotations

from functools import reduce
from operator import and_
from typing import NamedTuple

import torch

from sparse_attention.cuda_tables import NARROW, QUERIES, WIDE
from sparse_attention.patterns import BigBird, BlockSparse, Dense, LiveBlocks, Pattern
from sparse_attention.patterns.base import Lengths
from sparse_attention.patterns.bigbird import block_ranges
from sparse_attention.patterns.compose import And


class Blocks(NamedTuple):
    """A pattern taken apart: the pairs of `blocked`, a pattern of blocks, that `base` allows too."""

    blocked: Pattern
    base: Pattern

    def keys(self, head_dim: int) -> int:
        """Keys of a tile; one block holds one tile of them, or two."""
        return WIDE if self.blocked.block == WIDE and head_dim <= 128 else NARROW


def split(pattern: Pattern, q_len: int, kv_len: int, heads: int) -> Blocks | None:
    """The pattern as blocks and a base, where the blocks are made of whole tiles and the base is one plain part for all heads."""
    leaves = list(_leaves(pattern))
    blocked = [leaf for leaf in leaves if _in_tiles(leaf, Lengths(q_len, kv_len))]
    if len(blocked) != 1:
        return None
    others = [leaf for leaf in leaves if leaf is not blocked[0]]
    base = reduce(and_, others) if others else Dense()
    if base.live or any(base.for_head(h) != base.for_head(0) for h in range(heads)):
        return None
    parts = base.for_head(0).parts(Lengths(q_len, kv_len))
    return Blocks(blocked[0], base) if len(parts) == 1 and parts[0].stride == 1 else None


def _leaves(pattern: Pattern):
    if isinstance(pattern, And):
        yield from _leaves(pattern.a)
        yield from _leaves(pattern.b)
    else:
        yield pattern


def _in_tiles(leaf: Pattern, lengths: Lengths) -> bool:
    if isinstance(leaf, BigBird):
        return leaf.block >= 64 and lengths.offset % leaf.block == 0
    return isinstance(leaf, (BlockSparse, LiveBlocks)) and leaf.block >= 64


def mask_of(blocked: Pattern, q_len: int, kv_len: int, heads: int, device: torch.device) -> torch.Tensor:
    """Which blocks a pattern allows: bool `[heads or 1, q_blocks, kv_blocks]` on the device; a live pattern's own tensor."""
    if isinstance(blocked, BigBird):
        return _bigbird(blocked, Lengths(q_len, kv_len), heads, device)
    mask = blocked.block_mask.to(device)
    return mask if mask.ndim == 3 else mask.unsqueeze(0)


def _bigbird(bigbird: BigBird, lengths: Lengths, heads: int, device: torch.device) -> torch.Tensor:
    columns = -(-lengths.kv_len // bigbird.block)
    first = lengths.offset // bigbird.block
    start, stop = (side[:, first:] for side in block_ranges(bigbird, range(heads), columns, device))
    # Ranges open with 1 and close with -1; blocks in between have a positive running sum.
    edges = torch.zeros(*start.shape[:2], columns + 1, dtype=torch.int16, device=device)
    one = torch.ones((), dtype=torch.int16, device=device).expand(start.shape)
    edges.scatter_add_(2, start, one).scatter_add_(2, stop, -one)
    return edges.cumsum(2, dtype=torch.int16)[..., :columns] > 0


def computed(pattern: Pattern, q_len: int, kv_len: int, heads: int) -> int | None:
    """About how many pairs the tile engine computes for a pattern that `split` takes apart, without its layout; None for others. A
    live mask is not looked at: it counts as empty.
    """
    blocks = split(pattern, q_len, kv_len, heads)
    if blocks is None:
        return None
    blocked = blocks.blocked
    if blocked.live:
        return 0
    rows = QUERIES // blocked.block  # a tile of queries visits what any of its blocks sees
    if isinstance(blocked, BigBird):
        row = blocked.globals + blocked.window + blocked.random
        blocks_seen = heads * (-(-q_len // blocked.block) * row + blocked.globals * (-(-kv_len // blocked.block)))
    else:
        blocks_seen = int(blocked.block_mask.sum()) * (heads if blocked.block_mask.ndim == 2 else 1)
    return min(blocks_seen * rows * blocked.block**2, heads * q_len * kv_len)
