"""Builders of the GPU's cases: bfloat16, inputs drawn and checked on the device."""

from __future__ import annotations

import functools
import os
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F

from sparse_attention import attention, baselines, cuda_blocks, cuda_layout, cuda_tables, cuda_tile
from sparse_attention.breakeven import Unavailable, Workload
from sparse_attention.cost import cost
from sparse_attention.dispatch import Sizes
from sparse_attention.patterns import BlockSparse, Causal, Csr, Lengths, LiveBlocks, Pattern, parse

ROWS = 16  # of one head, drawn for each check
FIRST_SEED = 1 << 32  # none that changes the tensors


class Shape(NamedTuple):
    """Sizes of a case, batch 1, as many queries as keys."""

    length: int
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 128
    dtype: str = "bfloat16"


def dense(pattern: str, shape: list, causal: bool = True, impl: str = "tile") -> Workload:
    """Against the best dense SDPA that needs no compiling."""
    q, k, v = tensors(Shape(*shape))
    ways = baselines.dense(q, k, v, causal=causal)
    return _against(named(pattern, q), (q, k, v), {name: _quiet(call) for name, call in ways.items() if name != baselines.COMPILED}, impl)


def flex(pattern: str, shape: list) -> Workload:
    """Against FlexAttention, compiled."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # for one kernel a case; else every block starts processes to share the work
    q, k, v = tensors(Shape(*shape))
    chosen = named(pattern, q)
    return _against(chosen, (q, k, v), {"flex": _quiet(baselines.flex(q, k, v, chosen))})


def tier(pattern: str, shape: list, name: str, rival: str) -> Workload:
    """The useful rate of a named tier of the tile engine, against that of one SDPA backend on a causal call."""
    q, k, v = tensors(Shape(*shape))
    chosen = named(pattern, q)
    with mock.patch.dict(os.environ, SPARSE_ATTENTION_CUDA=name):
        made = cuda_tile.ready(chosen, Sizes.of(q, k), q.device)
    workload = _against(chosen, (q, k, v), {rival: _quiet(baselines.dense(q, k, v, causal=True)[rival])})
    workload.candidate = lambda: made.forward(q, k, v, q.shape[3] ** -0.5)[0]
    lengths = q.shape[2], k.shape[2], q.shape[1]
    workload.scale = chosen.pairs(*lengths) / Causal().pairs(*lengths)
    return workload


def against(pattern: str, shape: list, rival: str, rival_shape: list | None = None, by: str = "time") -> Workload:
    """One pattern against another on the tile engine. by: "time", or the rate in "pairs", or in pairs of visited "tiles"."""
    mine, theirs = Shape(*shape), Shape(*(rival_shape or shape))
    q, k, v = tensors(mine)
    others = tensors(theirs)
    chosen, other = named(pattern, q), named(rival, others[0])
    workload = _against(chosen, (q, k, v), {rival: _quiet(functools.partial(attention, *others, other, impl="tile"))})
    if by != "time":
        work = [_work(one, sizes, by) for one, sizes in ((chosen, mine), (other, theirs))]
        workload.scale = work[0] / work[1]
        workload.note = f"{work[0]:.3g} {by} against {work[1]:.3g}"
    return workload


def torch_sparse(pattern: str, shape: list, impl: str = "auto") -> Workload:
    """Against `torch.sparse`, which is given float32."""
    q, k, v = tensors(Shape(*shape))
    chosen = named(pattern, q)
    rival = baselines.torch_sparse(*(x.float() for x in (q, k, v)), chosen)
    return _against(chosen, (q, k, v), {"torch.sparse": _quiet(rival)}, impl)


def layout_making(pattern: str, shape: list) -> Workload:
    """Making the tables of a pattern of blocks of 64 on the device, the work of a first call."""
    q, k, _ = tensors(Shape(*shape))
    chosen, sizes = named(pattern, q), Sizes.of(q, k)

    def make():
        made = cuda_tile.ready(chosen, sizes, q.device)
        torch.cuda.synchronize()
        return made.filter.bits, made.filter.order

    def check(made):
        seen = cuda_blocks.mask_of(chosen, sizes.q_len, sizes.kv_len, sizes.heads, q.device)
        bits = sum((made[0] >> n & 1).sum() for n in range(64))
        assert bits == seen.sum(), f"{int(bits)} bits are set for {int(seen.sum())} blocks"

    return Workload(candidate=make, check=check)


def filter_making(blocks: int, heads: int, block: int) -> Workload:
    """Turning a block mask that changes into a layout, on the device."""
    _require_device()
    mask = torch.empty(heads, blocks, blocks, dtype=torch.bool, device="cuda")
    length = blocks * block

    def refresh(seed):
        mask.copy_(torch.rand(mask.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)) < 0.1)

    refresh(0)
    taken = cuda_blocks.split(LiveBlocks(mask, block), length, length, heads)
    native, layout = cuda_tile.base_of(taken, Sizes(1, heads, heads, length, length, 128, torch.bfloat16, "cuda"), mask.device)

    def make():
        made = native.filter(layout, mask, block)
        return made.bits, made.order, made.n_order

    def check(made):
        bits, order, n_order = made
        items = heads * -(-length // cuda_tables.QUERIES)
        handed = (order[: int(n_order)] & (cuda_tables.SAME - 1)).unique()  # a long item several times, for its parts
        assert torch.equal(handed, torch.arange(items, device="cuda")), f"{len(handed)} items are handed out of {items}"
        found = sum((bits >> n & 1).sum() for n in range(64))
        assert found == mask.sum(), f"{int(found)} bits are set for {int(mask.sum())} blocks"

    return Workload(candidate=make, check=check, inputs=[mask], refresh=refresh)


def named(name: str, q: torch.Tensor) -> Pattern:
    """A pattern's text, or "blocks N": a tenth of the blocks of N, drawn for each head, or "csr": a hundredth of the pairs."""
    length, heads = q.shape[2], q.shape[1]
    if name == "csr":
        return _csr(length, q.device.type)
    if not name.startswith("blocks "):
        return parse(name)
    block = int(name.split()[1])
    side = -(-length // block)
    return BlockSparse(torch.rand(heads, side, side, generator=torch.Generator().manual_seed(0)) < 0.1, block)


@functools.cache
def _csr(length: int, device: str) -> Csr:
    count = length // 100
    columns = torch.rand(length, length, device=device, generator=torch.Generator(device).manual_seed(0)).topk(count).indices
    return Csr(torch.arange(length + 1) * count, columns.flatten().int().cpu())


@functools.cache
def tensors(shape: Shape) -> tuple[torch.Tensor, ...]:
    """q, k and v on the device, the same for every case of these sizes."""
    _require_device()
    made = tuple(
        torch.empty(1, heads, shape.length, shape.head_dim, dtype=getattr(torch, shape.dtype), device="cuda")
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    draw(made, FIRST_SEED)
    return made


def draw(made: tuple[torch.Tensor, ...], seed: int) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)
    for x in made:
        x.normal_(generator=generator)


def check(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern) -> None:
    """AssertionError unless some rows of a head, drawn anew, are off by at most twice PyTorch's own error. On the GPU, for speed."""
    assert out.shape == q.shape and torch.isfinite(out).all(), "the output must be finite, and of the shape of q"
    head, lengths = int(torch.randint(q.shape[1], ())), Lengths(q.shape[2], k.shape[2])
    rows = torch.randint(q.shape[2], (ROWS,))
    mask = pattern.for_head(head).allows(rows[:, None], torch.arange(k.shape[2])[None], lengths).to(q.device)
    rows = rows.to(q.device)
    group = q.shape[1] // k.shape[1]
    one = q[:, head : head + 1, rows], *(x[:, head // group : head // group + 1] for x in (k, v))
    exact = F.scaled_dot_product_attention(*(x.double() for x in one), attn_mask=mask)
    usual = (F.scaled_dot_product_attention(*one, attn_mask=mask).double() - exact).abs().max()
    error = (out[:, head : head + 1, rows].double() - exact).abs().max()
    allowed = 2 * usual + torch.finfo(out.dtype).eps * exact.abs().max()
    assert error <= allowed, f"head {head} is off by {float(error):.2e}; PyTorch's own error is {float(usual):.2e}"


def _against(pattern: Pattern, inputs: tuple[torch.Tensor, ...], rivals: dict, impl: str = "tile") -> Workload:
    q, k, v = inputs
    sizes = {"batch": 1, "heads": q.shape[1], "kv_heads": k.shape[1], "q_len": q.shape[2], "kv_len": k.shape[2], "head_dim": q.shape[3]}
    found = cost(pattern, itemsize=q.element_size(), **sizes)
    return Workload(
        candidate=_quiet(functools.partial(attention, q, k, v, pattern, impl=impl)),
        baselines=rivals,
        check=lambda out: check(out, q, k, v, pattern),
        inputs=inputs,
        refresh=functools.partial(draw, inputs),
        work={"pairs": found.pairs, "dense_pairs": found.dense_pairs, "flops": found.flops, "bytes": found.bytes},
    )


def _work(pattern: Pattern, shape: Shape, by: str) -> float:
    lengths = shape.length, shape.length, shape.heads
    if by == "pairs":
        return pattern.pairs(*lengths) * shape.head_dim
    found = cuda_layout.best_layout(pattern, *lengths, shape.head_dim)
    return found.counts.visited * found.tile_q * found.tile_k * shape.head_dim


def _quiet(call):
    def run():
        with torch.no_grad():
            return call()

    return run


def _require_device() -> None:
    if not torch.cuda.is_available():
        raise Unavailable("needs a CUDA device")
