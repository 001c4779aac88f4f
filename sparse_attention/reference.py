"""The oracle: masked softmax attention as its formula reads, and the exact merge of partial results. Runs on any device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from sparse_attention.patterns.base import Lengths, Pattern

# Scores computed at once, all heads together: 64 MB in float32.
_SCORES = 1 << 24


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of `pattern` by its definition, in float64 for float64 inputs and in float32 for all others.

    q: `[batch, heads, q_len, head_dim]`; k, v: `[batch, kv_heads, kv_len, head_dim]`. Returns out, like q, and lse,
    `[batch, heads, q_len]`, the natural logarithm of each query's sum of exponentials; 0 and -inf for a query that may
    attend to nothing. Differentiable, twice too. Works in chunks of queries, yet autograd keeps every score: n^2 memory when
    a gradient is needed, which `reference_backward` avoids.
    """
    chunks = [_attend(q[:, :, s], k, v, pattern, scale, q.shape, s.start) for s in _chunks(q, k)]
    out, lse = (torch.cat(parts, dim=2) for parts in zip(*chunks))
    return out.to(q.dtype), lse


def reference_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of `reference` in q, k and v, written out, one chunk of queries after the other."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    wide = _accumulator(q)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    for s in _chunks(q, k):
        q_rows, k_seen, v_seen, mask = _operands(q[:, :, s], k, v, pattern, q.shape, s.start)
        with torch.autocast(q.device.type, enabled=False):
            p, lse = _softmax(q_rows, k_seen, mask, scale)
            dout_rows = dout[:, :, s].to(wide).unflatten(1, q_rows.shape[1:3])
            dout_rows = torch.where(lse.unsqueeze(-1) == -torch.inf, 0.0, dout_rows)
            dp = dout_rows @ v_seen.mT
            ds = dp - (p * dp).sum(dim=-1, keepdim=True)
            if dlse is not None:
                ds += dlse[:, :, s].unflatten(1, q_rows.shape[1:3]).unsqueeze(-1)
            ds = torch.where(mask, p * ds * scale, 0.0)
            dq[:, :, s] = (ds @ k_seen).flatten(1, 2)
            dk += (ds.mT @ q_rows).sum(dim=2)
            dv += (p.mT @ dout_rows).sum(dim=2)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def merge(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention over all keys, exactly, from attentions over disjoint sets of them.

    outs: tensors `[..., head_dim]` of one shape; lses: their log-sum-exps, `[...]`. Returns (out, lse): each out weighs
    exp(lse) over the sum of all exp(lse). A part whose lse is -inf counts for nothing; where all are, out is 0 and lse -inf.
    Sets that are not disjoint are legal: a key then counts once for each set it is in. Differentiable.
    """
    if len(outs) != len(lses) or not outs:
        raise ValueError(f"outs has {len(outs)} tensors and lses {len(lses)}; expected as many, and at least one")
    for n, (out, lse) in enumerate(zip(outs, lses)):
        if out.shape != outs[0].shape or out.shape[:-1] != lse.shape:
            raise ValueError(
                f"outs[{n}] has shape {tuple(out.shape)} and lses[{n}] {tuple(lse.shape)}; "
                f"expected {tuple(outs[0].shape)} and {tuple(outs[0].shape[:-1])}"
            )
    parts = torch.stack(list(lses))
    empty = (parts == -torch.inf).all(dim=0)
    parts = parts.masked_fill(empty, 0.0)
    weights = torch.softmax(parts, dim=0).masked_fill(empty, 0.0)
    weighted = (out * weight.unsqueeze(-1) for out, weight in zip(outs, weights))
    return sum(weighted).to(outs[0].dtype), torch.logsumexp(parts, dim=0).masked_fill(empty, -torch.inf)


def _accumulator(q: torch.Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _chunks(q: torch.Tensor, k: torch.Tensor) -> Iterator[slice]:
    batch, heads, q_len, _ = q.shape
    rows = max(1, _SCORES // (batch * heads * k.shape[2]))
    return (slice(first, min(first + rows, q_len)) for first in range(0, q_len, rows))


def _attend(q, k, v, pattern, scale, shape, first):
    """Out, in the accumulator's dtype, and lse of the query rows `q`, which start at row `first` of a `shape` tensor."""
    q, k, v, mask = _operands(q, k, v, pattern, shape, first)
    with torch.autocast(q.device.type, enabled=False):
        p, lse = _softmax(q, k, mask, shape[3] ** -0.5 if scale is None else scale)
        out = torch.where(lse.unsqueeze(-1) == -torch.inf, 0.0, p @ v)
        return out.flatten(1, 2), lse.flatten(1, 2)


def _operands(q, k, v, pattern, shape, first):
    """q `[batch, kv_heads, group, rows, head_dim]`, k and v `[batch, kv_heads, 1, kv_len, head_dim]`, and the mask that fits."""
    _, heads, q_len, _ = shape
    kv_heads, kv_len = k.shape[1:3]
    lengths = Lengths(q_len, kv_len)
    i = torch.arange(first, first + q.shape[2], device="cpu").unsqueeze(1) + lengths.offset
    j = torch.arange(kv_len, device="cpu").unsqueeze(0)
    mask = head_masks(pattern, heads, i, j, lengths).to(q.device).expand(heads, -1, -1)
    mask = mask.unflatten(0, (kv_heads, heads // kv_heads))
    wide = _accumulator(q)
    # A key that no query of the chunk sees is 0 here, and so is a query without keys: no NaN in them comes back as 0 * NaN.
    seen = mask.any(dim=2).any(dim=1).unsqueeze(-1)
    k, v = (torch.where(seen, x.to(wide), 0.0).unsqueeze(2) for x in (k, v))
    q = torch.where(mask.any(dim=-1, keepdim=True), q.to(wide).unflatten(1, (kv_heads, heads // kv_heads)), 0.0)
    return q, k, v, mask


def _softmax(q, k, mask, scale):
    """Probabilities, 0 in rows without a key, and lse."""
    scores = ((q @ k.mT) * scale).masked_fill(~mask, -torch.inf)
    top = scores.detach().amax(dim=-1, keepdim=True)
    empty = top == -torch.inf
    top = top.masked_fill(empty, 0.0)
    # Not exp(scores - lse): the rounding of lse would go into every probability.
    weights = torch.exp(scores - top)
    total = weights.sum(dim=-1, keepdim=True).masked_fill(empty, 1.0)
    lse = (top + torch.log(total)).masked_fill(empty, -torch.inf)
    return weights / total, lse.squeeze(-1)


def head_masks(pattern: Pattern, heads: int, i: torch.Tensor, j: torch.Tensor, lengths: Lengths) -> torch.Tensor:
    """Bool `[heads, rows, keys]` of the positions i `[rows, 1]` and j `[1, keys]`, or `[1, rows, keys]` if heads are all alike."""
    masks: dict[Pattern, torch.Tensor] = {}
    for head in range(heads):
        one = pattern.for_head(head)
        if one not in masks:
            masks[one] = one.allows(i, j, lengths).expand(i.shape[0], j.shape[1])
    if len(masks) == 1:
        return next(iter(masks.values())).unsqueeze(0)
    return torch.stack([masks[pattern.for_head(head)] for head in range(heads)])
