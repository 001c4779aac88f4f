"""The dense engine: the best call of scaled_dot_product_attention that gives the pattern's answer."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from sparse_attention.cache import cached_by_bytes
from sparse_attention.patterns.base import Lengths, Pattern
from sparse_attention.patterns.window import Causal, Dense
from sparse_attention.reference import head_masks, reference, reference_backward

# An additive mask saves SDPA a conversion in every call; above this many bytes the boolean one is kept instead.
_ADDITIVE_BYTES = 1 << 26


class Mask(NamedTuple):
    """What SDPA is told.

    attn_mask: None, or a tensor that broadcasts to `[batch, heads, q_len, kv_len]`. Queries that see nothing see everything in
    it, and `empty`, bool `[heads or 1, q_len]` (None: there are none), says that their results do not count. So no
    backend meets a row without keys, where they differ.
    """

    attn_mask: torch.Tensor | None
    is_causal: bool
    empty: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.attn_mask, self.empty) if x is not None)


@cached_by_bytes(1 << 28)
def mask_of(pattern: Pattern, q_len: int, kv_len: int, heads: int, dtype: torch.dtype, device: torch.device) -> Mask:
    """The mask of `pattern` for SDPA, cached."""
    if isinstance(pattern, Dense):
        return Mask(None, False, None)
    if isinstance(pattern, Causal) and q_len == kv_len:
        return Mask(None, True, None)
    with torch.inference_mode(False):  # the next call may need a gradient
        return _make_mask(pattern, Lengths(q_len, kv_len), heads, dtype, device)


def _make_mask(pattern, lengths, heads, dtype, device):
    i = torch.arange(lengths.q_len, device="cpu").unsqueeze(1) + lengths.offset
    j = torch.arange(lengths.kv_len, device="cpu").unsqueeze(0)
    mask = head_masks(pattern, heads, i, j, lengths)
    if mask.all():
        return Mask(None, False, None)
    empty = ~mask.any(dim=-1)
    mask = (mask | empty.unsqueeze(-1)).to(device)
    if mask.numel() * dtype.itemsize <= _ADDITIVE_BYTES:
        mask = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, -torch.inf)
    return Mask(mask.unsqueeze(0), False, empty.to(device) if empty.any() else None)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, scale: float) -> torch.Tensor:
    """Out alone, differentiable by PyTorch."""
    q, k, v = _apart(q), _apart(k), _apart(v)
    mask = mask_of(pattern, q.shape[2], k.shape[2], q.shape[1], q.dtype, q.device)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask.attn_mask, is_causal=mask.is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out if mask.empty is None else out.masked_fill(mask.empty.unsqueeze(-1), 0.0)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse), with no gradient; off the CPU, where SDPA keeps its LSE to itself, by the reference."""
    if q.device.type != "cpu":
        return reference(q, k, v, pattern, scale)
    q, k, v = _apart(q), _apart(k), _apart(v)
    mask = mask_of(pattern, q.shape[2], k.shape[2], q.shape[1], q.dtype, q.device)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, mask.is_causal, attn_mask=_additive(mask, q.dtype), scale=scale
    )
    if mask.empty is not None:
        out, lse = out.masked_fill(mask.empty.unsqueeze(-1), 0.0), lse.masked_fill(mask.empty, -torch.inf)
    return out, lse.contiguous()


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    pattern: Pattern,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients in q, k and v of what `forward` gave; by the reference off the CPU and where lse has a gradient."""
    if q.device.type != "cpu" or dlse is not None:
        return reference_backward(dout, dlse, q, k, v, pattern, scale)
    q, k, v = _apart(q), _apart(k), _apart(v)
    mask = mask_of(pattern, q.shape[2], k.shape[2], q.shape[1], q.dtype, q.device)
    if mask.empty is not None:  # exp(score - inf) = 0
        dout, lse = dout.masked_fill(mask.empty.unsqueeze(-1), 0.0), lse.masked_fill(mask.empty, torch.inf)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, mask.is_causal, attn_mask=_additive(mask, q.dtype), scale=scale
    )


def _apart(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied if its rows overlap in memory: SDPA on CPU then answers wrongly (torch 2.13)."""
    return x.contiguous() if 0 < x.stride(2) < x.shape[3] else x


def _additive(mask: Mask, dtype: torch.dtype) -> torch.Tensor | None:
    if mask.attn_mask is None or mask.attn_mask.dtype != torch.bool:
        return mask.attn_mask
    return torch.zeros_like(mask.attn_mask, dtype=dtype).masked_fill(~mask.attn_mask, -torch.inf)
