"""The registered boundary: one custom op with its gradient, and the shorter way of eager calls that need a gradient.

The op makes its plan when it runs, so under torch.compile and torch.export lengths may be dynamic. Its pattern is a text, see
handle.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attention.engines import engine
from sparse_attention.handle import pattern_of


class Attention(torch.autograd.Function):
    """The eager gradient: what the registered op does, with less on the way."""

    @staticmethod
    def forward(ctx, q, k, v, engine, scale):
        ctx.set_materialize_grads(False)
        out, lse = engine.forward(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.engine, ctx.scale = engine, scale
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        with torch.no_grad():
            grads = ctx.engine.backward(dout, dlse, q, k, v, out, lse, ctx.scale)
        if torch.is_grad_enabled():
            grads = _Once.apply(*grads, dout, q, k, v)
        return *grads, None, None


class _Once(torch.autograd.Function):
    """Gradients that cannot be differentiated: PyTorch would take them for constants without a word."""

    @staticmethod
    def forward(ctx, dq, dk, dv, *sources):
        return dq.view_as(dq), dk.view_as(dk), dv.view_as(dv)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("the gradient of attention cannot be differentiated again; use impl='reference', whose can")


@torch.library.custom_op(
    "sparse_attention::attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, str pattern, float? scale, str impl) -> (Tensor, Tensor)",
)
def attention_op(q, k, v, pattern, scale, impl):
    call = engine(q, k, v, pattern_of(pattern), impl)
    q, k, v = (_with_contiguous_rows(x) for x in (q, k, v))
    out, lse = call.forward(q, k, v, call.scale if scale is None else scale)
    like = torch.empty_like(q)
    return (out if out.stride() == like.stride() else like.copy_(out)), lse


@torch.library.custom_op(
    "sparse_attention::attention_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, str pattern, float? scale, str impl)"
    " -> (Tensor, Tensor, Tensor)",
)
def backward_op(dout, dlse, q, k, v, out, lse, pattern, scale, impl):
    call = engine(q, k, v, pattern_of(pattern), impl)
    q, k, v, out = (_with_contiguous_rows(x) for x in (q, k, v, out))
    grads = call.backward(dout, dlse, q, k, v, out, lse, call.scale if scale is None else scale)
    return tuple(grad.contiguous() for grad in grads)


def _with_contiguous_rows(x: Tensor) -> Tensor:
    # The compiler may have changed the strides that the caller chose.
    return x if x.stride(-1) == 1 else x.contiguous()


@attention_op.register_fake
def _(q, k, v, pattern, scale, impl):
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=wide)


@backward_op.register_fake
def _(dout, dlse, q, k, v, out, lse, pattern, scale, impl):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _op_backward(ctx, dout, dlse):
    q, k, v, out, lse = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    return *backward_op(dout, dlse, q, k, v, out, lse, *ctx.rest), None, None, None


attention_op.register_autograd(_op_backward, setup_context=_save)
