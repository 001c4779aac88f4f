"""Builders of the decode cases: a tree's nodes, or one token, over a cache, against SDPA with the mask that says the same, or Flex."""

from __future__ import annotations

import functools
import os
import weakref
from dataclasses import dataclass

import torch

from perf import cuda_workloads
from perf.workloads import _no_grad, _require_kernels
from sparse_attention import baselines, decode, eagle
from sparse_attention.breakeven import Workload
from sparse_attention.breakeven.device import current_device
from sparse_attention.decode_reference import decode_reference, visible
from sparse_attention.patterns import SlidingWindow

EAGER_CALLS = 20  # in a row: too long for the clock to take them into a graph
FIRST_SEED = 2**31 - 1  # none that changes the tensors; a CPU's generator takes 32 bits


def tree(
    nodes: int, prefix: int, dtype: str, heads: int = 32, kv_heads: int = 8, head_dim: int = 128, eager: bool = False
) -> Workload:
    """A random tree of `nodes` after `prefix` tokens; one node is a token's decoding. Ancestor words and masks are made beforehand.

    eager: EAGER_CALLS calls in a row from Python on a device that is idle at first, so that launching them counts.
    """
    device = _device()
    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)
    parents = torch.tensor([[-1, *(int(torch.randint(0, n, (), generator=generator)) for n in range(1, nodes))]])
    words = eagle.tree_mask(parents, "bits", impl="reference").to(device)
    shapes = [(1, heads, nodes, head_dim)] + 2 * [(1, kv_heads, prefix + nodes, head_dim)]
    q, k, v = (torch.empty(shape, dtype=kind, device=device) for shape in shapes)
    refresh = functools.partial(_draw, (q, k, v))
    refresh(FIRST_SEED)
    lengths = torch.tensor([prefix + nodes], device=device)
    seen = visible(lengths, nodes, prefix + nodes, words, -1, 0)[0]
    masks = {"mask": seen, "bias": torch.zeros(seen.shape, dtype=kind, device=device).masked_fill(~seen, -torch.inf)}
    around = _in_a_row if eager else lambda call: call
    rivals = {}
    for name, mask in (masks if nodes > 1 else {"": None}).items():
        ways = baselines.dense(q, k, v, causal=False, mask=mask, around=around)
        rivals.update({f"{way} {name}".strip(): _no_grad(call) for way, call in ways.items() if way != baselines.COMPILED})
    return Workload(
        candidate=_no_grad(around(lambda: decode(q, k, v, lengths, ancestors=words))),
        baselines=rivals,
        check=lambda out: _check(out, q, k, v, lengths, words),
        inputs=(q, k, v),
        refresh=refresh,
        note=f"{EAGER_CALLS} calls in a row, launches included" if eager else "",
    )


def window(
    batch: int, window: int, length: int, dtype: str, rival: str = "sdpa", heads: int = 32, kv_heads: int = 8, head_dim: int = 128
) -> Workload:
    """One token of each request against the last `window` of `length` keys, the rest of which is NaN. rival: "sdpa" over a slice of the
    cache, or "flex": FlexAttention, compiled, over the whole of it, with a block mask made beforehand. That one reads whole blocks, and is
    called for as many requests at a time as 32-bit indices hold: 8 of 8 heads by 131,072 keys of 128.
    """
    if rival == "flex" and (length - window) % baselines.FLEX_BLOCK:
        raise ValueError(f"window is {window} of {length}; expected one that begins with a block of {baselines.FLEX_BLOCK} keys")
    device = _device()
    kind = getattr(torch, dtype)
    caches = _caches(batch, kv_heads, length, head_dim, kind, device)
    k, v = (x[:, :, length - window :] for x in (caches.k, caches.v))
    q = torch.empty(batch, heads, 1, head_dim, dtype=kind, device=device)
    refresh = functools.partial(_draw, (q, k, v))
    refresh(FIRST_SEED)
    lengths = torch.full((batch,), length, device=device)
    some = slice(0, 2)  # requests that are checked
    if rival == "flex":
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # as in cuda_workloads.flex
        requests = baselines.flex_requests(q, caches.k, caches.v)
        name = "flex" if requests == batch else f"flex, {requests} requests a call"
        ways = {name: baselines.flex(q, caches.k, caches.v, SlidingWindow(window))}
    else:
        ways = {name: _no_grad(call) for name, call in baselines.dense(q, k, v, causal=False).items() if name != baselines.COMPILED}
    return Workload(
        candidate=_no_grad(lambda: decode(q, caches.k, caches.v, lengths, window=window)),
        baselines=ways,
        check=lambda out: _check(out[some], q[some], k[some], v[some], torch.full_like(lengths[some], window), None),
        inputs=(q, k, v),
        refresh=refresh,
    )


@dataclass(eq=False)
class Caches:
    """Keys and values [batch, kv_heads, length, head_dim], NaN at first."""

    k: torch.Tensor
    v: torch.Tensor


_caches_in_use: weakref.WeakValueDictionary[tuple, Caches] = weakref.WeakValueDictionary()


def _caches(*sizes) -> Caches:
    """The caches of (batch, kv_heads, length, head_dim, dtype, device), which the workloads that are alive share: batch 64 has 34 GB."""
    found = _caches_in_use.get(sizes)
    if found is None:
        *shape, dtype, device = sizes
        found = _caches_in_use[sizes] = Caches(*(torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(2)))
    return found


def _check(out, q, k, v, lengths, words) -> None:
    want, _ = decode_reference(q.double(), k.double(), v.double(), lengths, words, -1, 0, None, q.shape[3] ** -0.5)
    tolerance = 1e-5 if out.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=tolerance)


def _in_a_row(call: baselines.Call) -> baselines.Call:
    def run():
        if current_device() == "cuda":
            torch.cuda.synchronize()
        for _ in range(EAGER_CALLS):
            out = call()
        return out

    return run


def _draw(tensors, seed: int) -> None:
    generator = torch.Generator(tensors[0].device).manual_seed(seed)
    for x in tensors:
        x.normal_(generator=generator)


def _device() -> str:
    """The device whose clock runs here; Unavailable where its kernels are not."""
    device = current_device()
    (_require_kernels if device == "cpu" else cuda_workloads._require_device)()
    return device
