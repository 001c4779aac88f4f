"""A block mask that is read anew at each call."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparse_attention.patterns.base import Pattern
from sparse_attention.patterns.blocks import BlockSparse, check_block, check_mask, check_shape


@dataclass(frozen=True, eq=False)
class LiveBlocks(Pattern):
    """`BlockSparse` over a tensor that stays where it is: each call of `attention` sees what it holds by then.

    block_mask: bool tensor `[q_blocks, kv_blocks]`, or `[heads, q_blocks, kv_blocks]`, as in `BlockSparse`; not copied. On a CUDA
    device with `block` 64 or 128 it becomes a layout there, without a copy to the host and without a wait, so that a CUDA graph
    replays with whatever the mask holds. So does ``LiveBlocks(...) & pattern`` for a pattern that is the same for all heads, such as
    `Causal()`. Anywhere else a call costs as much as one of a new `BlockSparse`. Two are equal when they hold the same tensor.
    """

    block_mask: torch.Tensor
    block: int

    has_text = False
    live = True

    def __post_init__(self):
        check_mask(self.block_mask)
        check_block(self.block)

    def __eq__(self, other):
        if not isinstance(other, LiveBlocks):
            return NotImplemented
        return self.block_mask is other.block_mask and self.block == other.block

    def __hash__(self):
        return hash((LiveBlocks, id(self.block_mask), self.block))

    def __repr__(self):
        shape = "x".join(str(n) for n in self.block_mask.shape)
        return f"LiveBlocks(block_mask=<{shape} on {self.block_mask.device}>, block={self.block})"

    def frozen(self):
        return BlockSparse(self.block_mask, self.block)

    def check(self, q_len, kv_len, heads):
        check_shape(self, q_len, kv_len, heads)

    def for_head(self, head):
        return LiveBlocks(self.block_mask[head], self.block) if self.block_mask.ndim == 3 else self

    def allows(self, i, j, lengths):
        return self.block_mask.to(i.device)[(i - lengths.offset) // self.block, j // self.block]
