"""Plans made callable: each engine behind the same three functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_attention import dense
from sparse_attention._build import kernels
from sparse_attention.dispatch import Plan, Sizes
from sparse_attention.dispatch import plan as plan_of
from sparse_attention.patterns.base import Pattern
from sparse_attention.reference import reference, reference_backward
from sparse_attention.validate import check_call


class Engine(NamedTuple):
    """A plan made callable.

    forward(q, k, v, scale) -> (out, lse), without gradients. backward(dout, dlse or None, q, k, v, out, lse, scale) ->
    (dq, dk, dv). attend(q, k, v, scale) -> out, differentiable by PyTorch; None if there is no such way.
    """

    plan: Plan
    scale: float
    forward: Callable
    backward: Callable
    attend: Callable | None = None


def _tile(plan: Plan) -> Engine:
    native = kernels()
    sizes, layout = plan.sizes, plan.layout

    def table(of):
        parts = [list(part.tensors()) for part in of.parts]
        return native.Layout(sizes.heads, sizes.q_len, sizes.kv_len, parts)

    by_query, by_key = table(layout), cache(lambda: table(layout.transpose()))
    return Engine(
        plan,
        sizes.head_dim**-0.5,
        lambda q, k, v, scale: native.tile_forward(q, k, v, by_query, scale),
        lambda *saved_and_scale: native.tile_backward(*saved_and_scale[:-1], by_query, by_key(), saved_and_scale[-1]),
    )


def _gather(plan: Plan) -> Engine:
    native = kernels()
    sizes, rows = plan.sizes, plan.rows
    by_query = native.Rows(rows.row_start, rows.columns, rows.head_variant, sizes.q_len, sizes.kv_len)

    @cache
    def by_key():
        turned = rows.transpose()
        return native.Rows(turned.row_start, turned.columns, turned.head_variant, sizes.kv_len, sizes.q_len)

    return Engine(
        plan,
        sizes.head_dim**-0.5,
        lambda q, k, v, scale: native.gather_forward(q, k, v, by_query, scale),
        lambda *saved_and_scale: native.gather_backward(*saved_and_scale[:-1], by_query, by_key(), saved_and_scale[-1]),
    )


def _dense(plan: Plan) -> Engine:
    pattern = plan.pattern
    return Engine(
        plan,
        plan.sizes.head_dim**-0.5,
        lambda q, k, v, scale: dense.forward(q, k, v, pattern, scale),
        lambda *saved_and_scale: dense.backward(*saved_and_scale[:-1], pattern, saved_and_scale[-1]),
        lambda q, k, v, scale: dense.attend(q, k, v, pattern, scale),
    )


def _reference(plan: Plan) -> Engine:
    pattern = plan.pattern
    return Engine(
        plan,
        plan.sizes.head_dim**-0.5,
        lambda q, k, v, scale: reference(q, k, v, pattern, scale),
        lambda dout, dlse, q, k, v, out, lse, scale: reference_backward(dout, dlse, q, k, v, pattern, scale),
        lambda q, k, v, scale: reference(q, k, v, pattern, scale)[0],
    )


_MAKERS = {"tile": _tile, "gather": _gather, "dense": _dense, "reference": _reference}
_engines: dict[tuple, Engine] = {}


def engine(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, impl: str) -> Engine:
    """The checked, planned and compiled call for inputs like these; kept, so that the next one costs a dict lookup."""
    shapes, dtypes = (q.shape, k.shape, v.shape), (q.dtype, k.dtype, v.dtype)
    key = (pattern, impl, shapes, dtypes, q.device, k.device, v.device, torch.get_num_threads())
    found = _engines.get(key)
    if found is None:
        check_call(q, k, v, pattern, impl)
        plan = plan_of(pattern, Sizes.of(q, k), impl)
        found = _MAKERS[plan.impl](plan)
        if len(_engines) >= 512:
            _engines.clear()
        _engines[key] = found
    return found
