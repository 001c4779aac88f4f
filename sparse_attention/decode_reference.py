"""What `decode` means, in plain PyTorch on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    ancestors: Tensor | None,
    window: int,
    sinks: int,
    block_table: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of `decode`, in float64 for float64 inputs and in float32 for all others. window: -1 for none.

    Lengths out of range count as 0; keys in pages out of range as unseen.
    """
    there = None
    if block_table is not None:
        there = (block_table >= 0) & (block_table < k_cache.shape[0])
        pages = torch.where(there, block_table, 0).long()
        k_cache, v_cache = (x[pages].transpose(1, 2).flatten(2, 3) for x in (k_cache, v_cache))
        there = there.repeat_interleave(k_cache.shape[2] // there.shape[1], dim=1)
    capacity, kv_heads = k_cache.shape[2], k_cache.shape[1]
    lengths = torch.where((lengths < 0) | (lengths > capacity), 0, lengths)
    mask = visible(lengths, q.shape[2], capacity, ancestors, window, sinks)
    if there is not None:
        mask = mask & there[:, None, :]
    wide = torch.promote_types(q.dtype, torch.float32)
    # A key that no query sees is 0 here, and so is a query without keys: no NaN in them comes back as 0 * NaN.
    k, v = (torch.where(mask.any(1)[:, None, :, None], x.to(wide), 0).unsqueeze(2) for x in (k_cache, v_cache))
    seen = mask[:, None, None]
    q_rows = torch.where(seen.any(-1, keepdim=True), q.to(wide).unflatten(1, (kv_heads, -1)), 0)
    with torch.autocast(q.device.type, enabled=False):
        scores = ((q_rows @ k.mT) * scale).masked_fill(~seen, -torch.inf)
        top = scores.amax(-1, keepdim=True)
        top = torch.where(top == -torch.inf, 0, top)
        weights = torch.exp(scores - top)
        total = weights.sum(-1, keepdim=True)
        out = weights @ v / torch.where(total == 0, 1, total)
        lse = (top + torch.log(total)).squeeze(-1)
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


def visible(lengths: Tensor, q_len: int, capacity: int, ancestors: Tensor | None, window: int, sinks: int) -> Tensor:
    """Bool `[batch, q_len, capacity]`: which query sees which row of its cache."""
    device = lengths.device
    new = torch.arange(q_len, device=device)
    row = torch.arange(capacity, device=device)
    prefix = (lengths - q_len)[:, None]
    if ancestors is None:
        related, depth = (new <= new[:, None])[None], new[None]
    else:
        related = bits(ancestors, q_len)
        depth = related.sum(-1) - 1
    related, depth = related.expand(len(lengths), -1, -1), depth.expand(len(lengths), -1)
    node = row - prefix  # [batch, capacity]: which new key a row holds; negative in the prefix
    which = node.clamp(0, q_len - 1)
    seen = (node < 0)[:, None, :] | related.gather(2, which[:, None, :].expand(-1, q_len, -1))
    seen &= (row < lengths[:, None])[:, None, :]
    seen &= (related.any(-1) & (new + prefix >= 0))[:, :, None]
    if window >= 0:
        position = torch.where(node < 0, row, prefix + depth.gather(1, which))[:, None, :]
        seen &= ((prefix + depth)[:, :, None] - position < window) | (position < sinks)
    return seen


def bits(words: Tensor, count: int) -> Tensor:
    """Bool `[..., count]` of int64 words `[..., ceil(count / 64)]`."""
    return ((words[..., None] >> torch.arange(64, device=words.device)) & 1).flatten(-2)[..., :count].bool()
