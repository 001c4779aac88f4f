"""The checks of a call, each a ValueError that names the argument, its value and what was expected."""

from __future__ import annotations

import math
import numbers

import torch

from sparse_attention.dispatch import IMPLS
from sparse_attention.patterns.base import Pattern

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_names(pattern: object, impl: object) -> None:
    """That `pattern` is one, and `impl` too."""
    if not isinstance(pattern, Pattern):
        hint = " (a mask is written BlockSparse(mask, block) or Predicate(fn))" if isinstance(pattern, torch.Tensor) else ""
        raise ValueError(f"pattern is {_short(pattern)}; expected a Pattern, such as SlidingWindow(256){hint}")
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; expected one of {', '.join(IMPLS)}")


def check_scale(scale: object) -> float:
    """`scale` as a float; it must be finite."""
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise ValueError(f"scale is {_short(scale)}; expected a finite number, or None for 1 / sqrt(head_dim)")
    return float(scale)


def check_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, impl: str) -> None:
    """Everything but strides and `scale`; what depends on shapes, dtypes and devices only."""
    check_names(pattern, impl)
    named = (("q", q), ("k", k), ("v", v))
    for name, x in named:
        if x.dim() != 4 or 0 in x.shape:
            length = "q_len" if name == "q" else "kv_len"
            heads = "heads" if name == "q" else "kv_heads"
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected [batch, {heads}, {length}, head_dim], none of them 0")
        if x.layout != torch.strided:
            raise ValueError(f"{name} has layout {x.layout}; expected a strided tensor")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {x.dtype}; expected {', '.join(map(str, DTYPES))}")
    for name, x in named[1:]:
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}; expected {q.dtype}, that of q")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}; expected {q.device}, the device of q")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, batch {x.shape[0]}; expected {q.shape[0]}, the batch of q")
        if x.shape[3] != q.shape[3]:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, head_dim {x.shape[3]}; expected {q.shape[3]}, that of q")
    if v.shape != k.shape:
        raise ValueError(f"v has shape {tuple(v.shape)}; expected {tuple(k.shape)}, the shape of k")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"k has shape {tuple(k.shape)}, {k.shape[1]} heads; expected a divisor of q's {q.shape[1]} heads")


def check_tensors(q: object, k: object, v: object) -> None:
    """That q, k and v are tensors."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name} is {_short(x)}; expected a tensor [batch, heads, seq, head_dim]")


def check_strides(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """That the last dimension of each is contiguous."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1 and x.shape[-1] != 1:
            raise ValueError(f"{name} has strides {x.stride()}; expected a contiguous last dimension: call .contiguous()")


def _short(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return " ".join(repr(value).split())[:80]
