"""Calls of `attention` for the correctness tests: results with all gradients, and inputs in awkward memory."""

from __future__ import annotations

import torch

from sparse_attention import Pattern, attention
from tests.oracle import Inputs, Results

SPARSE = ("tile", "gather")
IMPLS = (*SPARSE, "dense", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def run(x: Inputs, pattern: Pattern, impl: str, gradients: bool = True) -> Results:
    """Out, lse and, unless told otherwise, the gradients in q, k and v for x.dout and x.dlse."""
    if not gradients:
        return Results(*attention(x.q, x.k, x.v, pattern, scale=x.scale, impl=impl, return_lse=True), None, None, None)
    leaves = [y.detach().requires_grad_() for y in (x.q, x.k, x.v)]
    out, lse = attention(*leaves, pattern, scale=x.scale, impl=impl, return_lse=True)
    return Results(out.detach(), lse.detach(), *torch.autograd.grad([out, lse], leaves, [x.dout, x.dlse]))


def same_bits(a: Results, b: Results) -> bool:
    """Whether two results agree in every bit, the sign of zero aside; a NaN equals a NaN."""
    return all(x is y is None or torch.equal(torch.nan_to_num(x, nan=1e30), torch.nan_to_num(y, nan=1e30)) for x, y in zip(a, b))


def _transposed(x):
    """Memory [batch, seq, heads, head_dim], as a projection leaves it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _sequence_first(x):
    return x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


def _part_of_rows(x):
    """A slice of longer rows, such as one third of a fused projection; the rest is NaN."""
    wide = x.new_full((*x.shape[:3], 3 * x.shape[3]), torch.nan)
    wide[..., x.shape[3] : 2 * x.shape[3]] = x
    return wide[..., x.shape[3] : 2 * x.shape[3]]


def _every_other(x):
    """Every other batch entry, head and row of a larger tensor; the rest is NaN."""
    batch, heads, length, head_dim = x.shape
    large = x.new_full((2 * batch, 2 * heads, 2 * length, head_dim), torch.nan)
    large[1::2, ::2, 1::2] = x
    return large[1::2, ::2, 1::2]


def _odd_address(x):
    """At an address that is aligned to one element only."""
    flat = x.new_full((x.numel() + 1,), torch.nan)
    flat[1:] = x.flatten()
    return flat[1:].view(x.shape)


STRIDES = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": _transposed,
    "sequence-first": _sequence_first,
    "part-of-rows": _part_of_rows,
    "every-other": _every_other,
    "odd-address": _odd_address,
}


def restride(x: Inputs, q: str, k: str, v: str, dout: str) -> Inputs:
    """The same values in other memory; the arguments are keys of STRIDES."""
    return x._replace(q=STRIDES[q](x.q), k=STRIDES[k](x.k), v=STRIDES[v](x.v), dout=STRIDES[dout](x.dout))
