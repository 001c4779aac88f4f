"""Plans made callable: each engine behind the same three functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_attention import _build_cuda, cuda_tables, dense
from sparse_attention._build import kernels
from sparse_attention.dispatch import Plan, Sizes
from sparse_attention.dispatch import plan as plan_of
from sparse_attention.patterns.base import Pattern
from sparse_attention.reference import reference, reference_backward
from sparse_attention.validate import check_call


class Engine(NamedTuple):
    """A plan made callable.

    forward(q, k, v, scale) -> (out, lse), without gradients. backward(dout, dlse or None, q, k, v, out, lse, scale) ->
    (dq, dk, dv). attend(q, k, v, scale) -> out, differentiable by PyTorch; None if there is no such way. nbytes: of its tables.
    """

    plan: Plan
    scale: float  # the default
    forward: Callable
    backward: Callable
    attend: Callable | None = None
    nbytes: int = 0


def _tile(plan: Plan, scale: float, device: torch.device) -> Engine:
    if device.type == "cuda":
        return _cuda_tile(plan, scale, device)
    native, sizes, layout = kernels(), plan.sizes, plan.layout

    def table(of):
        return native.Layout(sizes.heads, sizes.q_len, sizes.kv_len, [list(part.tensors()) for part in of.parts])

    by_query, by_key = table(layout), cache(lambda: table(layout.transpose()))

    def forward(q, k, v, scale):
        return native.tile_forward(q, k, v, by_query, scale)

    def backward(dout, dlse, q, k, v, out, lse, scale):
        return native.tile_backward(dout, dlse, q, k, v, out, lse, by_query, by_key(), scale)

    return Engine(plan, scale, forward, backward, nbytes=2 * layout.nbytes)


def _cuda_tile(plan: Plan, scale: float, device: torch.device) -> Engine:
    native, sizes = _build_cuda.kernels(torch.cuda.get_device_capability(device)), plan.sizes
    layout = cuda_tables.best_layout(plan.pattern, sizes.q_len, sizes.kv_len, sizes.heads, sizes.head_dim)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    parts = [native.Part(*part) for part in cuda_tables.tables(layout, device, processors)]

    def forward(q, k, v, scale):
        if scale <= 0:  # the softmax looks for the largest product
            q, scale = (q * 0, 1.0) if scale == 0 else (-q, -scale)
        return native.sm90_forward(q, k, v, parts, sizes.q_len, sizes.kv_len, layout.tile_k, scale)

    def backward(*_):
        raise NotImplementedError("the sparse engines have no gradient on CUDA yet; use impl='dense'")

    return Engine(plan, scale, forward, backward, nbytes=2 * layout.nbytes)


def _gather(plan: Plan, scale: float, device: torch.device) -> Engine:
    native, sizes, rows = kernels(), plan.sizes, plan.rows

    def table(of, rows, cols):
        return native.Rows(of.row_start, of.columns, of.head_variant, rows, cols)

    by_query = table(rows, sizes.q_len, sizes.kv_len)
    by_key = cache(lambda: table(rows.transpose(), sizes.kv_len, sizes.q_len))

    def forward(q, k, v, scale):
        return native.gather_forward(q, k, v, by_query, scale)

    def backward(dout, dlse, q, k, v, out, lse, scale):
        return native.gather_backward(dout, dlse, q, k, v, out, lse, by_query, by_key(), scale)

    return Engine(plan, scale, forward, backward, nbytes=2 * rows.nbytes)


def _dense(plan: Plan, scale: float, device: torch.device) -> Engine:
    pattern = plan.pattern

    def attend(q, k, v, scale):
        return dense.attend(q, k, v, pattern, scale)

    def forward(q, k, v, scale):
        return dense.forward(q, k, v, pattern, scale)

    def backward(dout, dlse, q, k, v, out, lse, scale):
        return dense.backward(dout, dlse, q, k, v, out, lse, pattern, scale)

    return Engine(plan, scale, forward, backward, attend)


def _reference(plan: Plan, scale: float, device: torch.device) -> Engine:
    pattern = plan.pattern

    def attend(q, k, v, scale):
        return reference(q, k, v, pattern, scale)[0]

    def forward(q, k, v, scale):
        return reference(q, k, v, pattern, scale)

    def backward(dout, dlse, q, k, v, out, lse, scale):
        return reference_backward(dout, dlse, q, k, v, pattern, scale)

    return Engine(plan, scale, forward, backward, attend)


_MAKERS = {"tile": _tile, "gather": _gather, "dense": _dense, "reference": _reference}
_engines: dict[tuple, Engine] = {}
_MOST_CALLS, _MOST_BYTES = 512, 1 << 30


def engine(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, impl: str) -> Engine:
    """The checked, planned and compiled call for inputs like these; kept, so that the next one costs a dict lookup."""
    shapes, dtypes = (q.shape, k.shape, v.shape), (q.dtype, k.dtype, v.dtype)
    key = (pattern, impl, shapes, dtypes, q.device, k.device, v.device, torch.get_num_threads())
    found = _engines.get(key)
    if found is None:
        check_call(q, k, v, pattern, impl)
        plan = plan_of(pattern, Sizes.of(q, k), impl)
        found = _MAKERS[plan.impl](plan, plan.sizes.head_dim**-0.5, q.device)
        if len(_engines) >= _MOST_CALLS or found.nbytes + sum(kept.nbytes for kept in _engines.values()) > _MOST_BYTES:
            _engines.clear()
        _engines[key] = found
    return found
