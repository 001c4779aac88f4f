"""Plans made callable: each engine behind the same three functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_attention import _build_cuda, cuda_blocks, cuda_rows, cuda_tile, decode_cuda, dense
from sparse_attention._build import kernels
from sparse_attention.decode_pattern import terms
from sparse_attention.dispatch import Plan, Sizes, engine_obstacle
from sparse_attention.dispatch import plan as plan_of
from sparse_attention.patterns.base import Pattern
from sparse_attention.reference import reference, reference_backward
from sparse_attention.validate import check_call


class Engine(NamedTuple):
    """A plan made callable.

    forward(q, k, v, scale) -> (out, lse), without gradients. backward(dout, dlse or None, q, k, v, out, lse, scale) ->
    (dq, dk, dv). attend(q, k, v, scale) -> out, differentiable by PyTorch; None if there is no such way. nbytes: of its tables.
    launches: the (layout, filter) of the CUDA tile engine, for `quick`.
    """

    plan: Plan
    scale: float  # the default
    forward: Callable
    backward: Callable
    attend: Callable | None = None
    nbytes: int = 0
    launches: tuple | None = None


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
    made = cuda_tile.ready(plan.pattern, plan.sizes, device)
    return Engine(plan, scale, made.forward, cuda_tile.backward, nbytes=made.nbytes, launches=(made.layout, made.filter))


def _gather(plan: Plan, scale: float, device: torch.device) -> Engine:
    if device.type == "cuda":
        forward, nbytes = cuda_rows.forward(plan.rows, plan.sizes, device)
        return Engine(plan, scale, forward, cuda_tile.backward, nbytes=nbytes)
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


def _decode(plan: Plan, scale: float, device: torch.device) -> Engine:
    """Its gradients are the tile engine's, whose layout is made when one is asked for; on CUDA dense."""
    if device.type == "cuda":
        return _cuda_decode(plan, scale, device)
    native, sizes, told = kernels(), plan.sizes, terms(plan.pattern)
    lengths = torch.full((sizes.batch,), sizes.kv_len, dtype=torch.int64, device=device)
    tile = cache(lambda: _tile(plan, scale, device))

    def forward(q, k, v, scale):
        return native.decode_forward(q, k, v, lengths, told.ancestors, told.window, told.sinks, None, scale)

    def backward(dout, dlse, q, k, v, out, lse, scale):
        return tile().backward(dout, dlse, q, k, v, out, lse, scale)

    return Engine(plan, scale, forward, backward)


def _cuda_decode(plan: Plan, scale: float, device: torch.device) -> Engine:
    told, kv_len = terms(plan.pattern), plan.sizes.kv_len
    words = None if told.ancestors is None else told.ancestors.to(device)

    def forward(q, k, v, scale):
        k, v = (x if decode_cuda.aligned(x) else x.clone(memory_format=torch.contiguous_format) for x in (k, v))
        return decode_cuda.forward(q, k, v, kv_len, words, told.window, told.sinks, None, scale)

    def backward(dout, dlse, q, k, v, out, lse, scale):
        return dense.backward(dout, dlse, q, k, v, out, lse, plan.pattern, scale)

    return Engine(plan, scale, forward, backward)


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


_MAKERS = {"tile": _tile, "gather": _gather, "decode": _decode, "dense": _dense, "reference": _reference}
_engines: dict = {}  # calls by what tells them apart; the quick ones by the id of their pattern, which they keep
_decoding: dict = {}  # those of the decode engine apart: a cache that grows has another each step, which pushes no other out
_MOST_CALLS, _MOST_BYTES, _MOST_DECODING = 512, 1 << 30, 64


def engine(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, impl: str) -> Engine:
    """The checked, planned and compiled call for inputs like these; kept, so that the next one costs a dict lookup."""
    key = (pattern, impl, *_like(q, k, v))
    found = _engines.get(key) or _decoding.get(key)
    if found is None:
        check_call(q, k, v, pattern, impl)
        if pattern.live:
            return _live(q, k, v, pattern, impl)
        plan = plan_of(pattern, Sizes.of(q, k), impl)
        if plan.impl == "decode":
            if len(_decoding) >= _MOST_DECODING:
                _decoding.clear()
            return _decoding.setdefault(key, _decode(plan, plan.sizes.head_dim**-0.5, q.device))
        found = _kept(key, _MAKERS[plan.impl](plan, plan.sizes.head_dim**-0.5, q.device))
        if found.launches:
            calls = _engines.setdefault(id(pattern), _build_cuda.kernels(torch.cuda.get_device_capability(q.device)).Calls(pattern))
            calls.add(q, k, v, impl, *found.launches, found.scale)
    return found


def quick(pattern: Pattern):
    """The calls of this very pattern object that `attention` may make without a look at anything else; None where there are none."""
    return _engines.get(id(pattern))


def _like(q: Tensor, k: Tensor, v: Tensor) -> tuple:
    """What tells the engines of two calls apart beside pattern and impl."""
    return (q.shape, k.shape, v.shape), (q.dtype, k.dtype, v.dtype), q.device, k.device, v.device, torch.get_num_threads()


def _kept(key: tuple, made: Engine) -> Engine:
    if len(_engines) >= _MOST_CALLS or made.nbytes + sum(kept.nbytes for kept in _engines.values()) > _MOST_BYTES:
        _engines.clear()
    _engines[key] = made
    return made


def _live(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, impl: str) -> Engine:
    """The call of a pattern that reads a tensor: by a filter made on the device, where there is one, else of what it holds now."""
    sizes = Sizes.of(q, k)
    pattern.check(sizes.q_len, sizes.kv_len, sizes.heads)
    blocks = cuda_blocks.split(pattern, sizes.q_len, sizes.kv_len, sizes.heads) if q.is_cuda and impl in ("auto", "tile") else None
    mask = blocks and blocks.blocked.block_mask
    if blocks is None or mask.device != q.device or engine_obstacle(pattern, sizes):
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError(f"pattern is {pattern!r}, which impl={impl!r} reads on the host; a CUDA graph cannot hold that")
        return engine(q, k, v, pattern.frozen(), impl)
    key = ("live", blocks.base, blocks.blocked.block, *_like(q, k, v))
    made = _engines.get(key)
    if made is None:
        plan = Plan(pattern, sizes, "tile", "its block mask is read on the device", {})
        forward = cuda_tile.live(blocks, sizes, q.device).forward
        made = _kept(key, Engine(plan, sizes.head_dim**-0.5, forward, cuda_tile.backward))
    return made._replace(forward=partial(made.forward, block_mask=mask))
