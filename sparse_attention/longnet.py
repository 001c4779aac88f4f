"""LongNet's dilated attention: a mixture of levels, which overlap and are therefore no single pattern."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from sparse_attention.api import attention
from sparse_attention.handle import constant_when_traced, handle
from sparse_attention.ops import attention_op
from sparse_attention.patterns import Causal, Documents, Pattern
from sparse_attention.reference import merge
from sparse_attention.validate import check_call, check_tensors


def longnet(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Sequence[int],
    dilations: Sequence[int],
    *,
    causal: bool = True,
    scale: float | None = None,
    impl: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dilated attention (LongNet, Ding et al. 2023, section 3.2), with the shapes and errors of `attention`.

    Level n cuts the sequence into segments of segments[n] tokens, the last may be shorter. In each, head h attends among the
    tokens h mod dilations[n], + dilations[n], + 2 dilations[n], ... of the segment (the paper's offset by head); the others have
    no part in that level. Levels are merged by their softmax denominators (the paper's equation 10): a key that a query sees
    at two levels counts twice. A token that no level reaches for a head gives 0 and lse -inf; a level of dilation 1 prevents it.

    segments: positive ints; dilations: as many, each a divisor of its segment (the paper's grow as (2048, 4096, ...), (1, 2, ...)).
    causal: within its segment a token sees no later one, as in the paper's language models; False for its encoders.
    q and k must have one length. k and v are read through strided views, not copied.
    """
    check_tensors(q, k, v)
    check_call(q, k, v, Causal(), impl)
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"k has shape {tuple(k.shape)}, {k.shape[2]} tokens; expected {q.shape[2]}, as many as q")
    _check_levels(segments, dilations)
    outs, lses = [], []
    for segment, dilation in zip(segments, dilations):
        out, lse = _level(q, k, v, segment, dilation, causal, scale, impl)
        outs.append(out)
        lses.append(lse)
    out, lse = merge(outs, lses)
    return (out, lse) if return_lse else out


def _check_levels(segments, dilations):
    for name, values in (("segments", segments), ("dilations", dilations)):
        good = isinstance(values, Sequence) and all(type(x) is int and x > 0 for x in values)
        if not good or not values:
            raise ValueError(f"{name} is {values!r}; expected positive ints, one for each level")
    if len(segments) != len(dilations):
        raise ValueError(f"dilations has {len(dilations)} levels; expected {len(segments)}, as many as segments")
    for n, (segment, dilation) in enumerate(zip(segments, dilations)):
        if segment % dilation:
            raise ValueError(f"dilations[{n}] is {dilation}; expected a divisor of segments[{n}], {segment}")


def _level(q, k, v, segment, dilation, causal, scale, impl):
    """Out and lse of one level; 0 and -inf where it does not reach."""
    batch, heads, length, _ = q.shape
    out, lse = torch.zeros_like(q), None
    for head in range(min(dilation, heads)) if k.shape[1] == heads else range(heads):
        first = head % dilation
        if first >= length:
            continue
        # Heads h, h + dilation, ... share their tokens; grouped heads do not split evenly, so they go one by one.
        q_heads = slice(head, None, dilation) if k.shape[1] == heads else slice(head, head + 1)
        kv_head = head // (heads // k.shape[1])
        kv_heads = q_heads if k.shape[1] == heads else slice(kv_head, kv_head + 1)
        tokens = slice(first, None, dilation)
        count = len(range(first, length, dilation))
        parts = q[:, q_heads, tokens], k[:, kv_heads, tokens], v[:, kv_heads, tokens]
        shape = operator.index(count), segment // dilation, causal
        if torch.compiler.is_compiling():  # which cannot trace how Documents are made
            part, part_lse = attention_op(*parts, _segments_text(*shape), scale, impl)
        else:
            part, part_lse = attention(*parts, _segments(*shape), scale=scale, impl=impl, return_lse=True)
        if lse is None:
            lse = part_lse.new_full((batch, heads, length), -torch.inf)
        out[:, q_heads, tokens] = part
        lse[:, q_heads, tokens] = part_lse
    return out, lse


@lru_cache(maxsize=64)
def _segments(count: int, size: int, causal: bool) -> Pattern:
    """`count` tokens in segments of `size`."""
    documents = Documents(tuple(min(size, count - start) for start in range(0, count, size)))
    return documents & Causal() if causal else documents


@constant_when_traced
def _segments_text(count: int, size: int, causal: bool) -> str:
    return handle(_segments(count, size, causal))
