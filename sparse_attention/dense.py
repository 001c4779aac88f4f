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
    backend meets a row without keys, where they differ. Only the `keys` that some query sees take part: a slice, or their
    positions. Those of them that no query of one head sees, `holes`, bool `[heads or 1, keys]` (None: there are none), count as
    0 there. So what nobody may see, a NaN perhaps, changes nothing.
    """

    attn_mask: torch.Tensor | None
    is_causal: bool
    empty: torch.Tensor | None = None
    keys: slice | torch.Tensor = slice(None)
    holes: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.attn_mask, self.empty, self.holes) if x is not None)


@cached_by_bytes(1 << 28)
def mask_of(pattern: Pattern, q_len: int, kv_len: int, heads: int, dtype: torch.dtype, device: torch.device) -> Mask:
    """The mask of `pattern` for SDPA, cached."""
    if isinstance(pattern, Dense):
        return Mask(None, False)
    if isinstance(pattern, Causal) and q_len == kv_len:
        return Mask(None, True)
    with torch.inference_mode(False):  # the next call may need a gradient
        return _make_mask(pattern, Lengths(q_len, kv_len), heads, dtype, device)


def _make_mask(pattern, lengths, heads, dtype, device):
    i = torch.arange(lengths.q_len, device="cpu").unsqueeze(1) + lengths.offset
    j = torch.arange(lengths.kv_len, device="cpu").unsqueeze(0)
    mask = head_masks(pattern, heads, i, j, lengths)
    keys = mask.any(dim=0).any(dim=0).nonzero().squeeze(1)
    first, last = (int(keys[0]), int(keys[-1])) if len(keys) else (0, 0)
    keys = slice(first, last + 1) if last - first < max(len(keys), 1) else keys.to(device)
    mask = mask[..., keys]
    empty, holes = ~mask.any(dim=-1), ~mask.any(dim=-2)
    empty, holes = (x.to(device) if x.any() else None for x in (empty, holes))
    if mask.all():
        return Mask(None, False, None, keys)
    mask = mask.to(device)
    if empty is not None:
        mask = mask | empty.unsqueeze(-1)
    if mask.numel() * dtype.itemsize <= _ADDITIVE_BYTES:
        mask = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, -torch.inf)
    return Mask(mask.unsqueeze(0), False, empty, keys, holes)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, scale: float) -> torch.Tensor:
    """Out alone, differentiable by PyTorch."""
    return attend_masked(q, k, v, mask_of(pattern, q.shape[2], k.shape[2], q.shape[1], q.dtype, q.device), scale)


def attend_masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, scale: float | None) -> torch.Tensor:
    """`attend` with a mask at hand."""
    q, k, v = _apart(q), _seen(k, mask), _seen(v, mask)
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
    mask = mask_of(pattern, q.shape[2], k.shape[2], q.shape[1], q.dtype, q.device)
    q, k, v = _apart(q), _seen(k, mask), _seen(v, mask)
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
    mask = mask_of(pattern, q.shape[2], k.shape[2], q.shape[1], q.dtype, q.device)
    kv_len = k.shape[2]
    q, k, v = _apart(q), _seen(k, mask), _seen(v, mask)
    if mask.empty is not None:  # exp(score - inf) = 0
        dout, lse = dout.masked_fill(mask.empty.unsqueeze(-1), 0.0), lse.masked_fill(mask.empty, torch.inf)
    dq, *of_seen = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, mask.is_causal, attn_mask=_additive(mask, q.dtype), scale=scale
    )
    return dq, *(_whole(grad, kv_len, mask) for grad in of_seen)


def _apart(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied if its rows overlap in memory: SDPA on CPU then answers wrongly (torch 2.13)."""
    return x.contiguous() if 0 < x.stride(2) < x.shape[3] else x


def _seen(x: torch.Tensor, mask: Mask) -> torch.Tensor:
    """The keys, or values, that take part."""
    x = x[:, :, mask.keys] if isinstance(mask.keys, slice) else x.index_select(2, mask.keys)
    if mask.holes is None:
        return _apart(x)
    holes = mask.holes if len(mask.holes) == 1 else mask.holes.unflatten(0, (x.shape[1], -1)).all(dim=1)
    return x.masked_fill(holes.unsqueeze(-1), 0.0)


def _whole(grad: torch.Tensor, kv_len: int, mask: Mask) -> torch.Tensor:
    """The gradient of all keys from that of those that take part."""
    if grad.shape[2] == kv_len:
        return grad
    out = grad.new_zeros((*grad.shape[:2], kv_len, grad.shape[3]))
    out[:, :, mask.keys] = grad
    return out


def _additive(mask: Mask, dtype: torch.dtype) -> torch.Tensor | None:
    if mask.attn_mask is None or mask.attn_mask.dtype != torch.bool:
        return mask.attn_mask
    return torch.zeros_like(mask.attn_mask, dtype=dtype).masked_fill(~mask.attn_mask, -torch.inf)
