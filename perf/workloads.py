"""Builders of the cases: each returns what is raced, over tensors shared by all cases of the same shape."""

from __future__ import annotations

import functools

import torch

from perf.oracle import LongNetOracle, Oracle
from sparse_attention import attention, baselines, dispatch, layout, longnet
from sparse_attention._build import BuildError, kernels
from sparse_attention.breakeven import Unavailable, Workload
from sparse_attention.breakeven.device import current_device
from sparse_attention.breakeven.memory import peak_bytes
from sparse_attention.cost import cost
from sparse_attention.patterns import Causal, Pattern, Predicate, parse


def tensors(
    batch: int,
    heads: int,
    kv_heads: int,
    q_len: int,
    kv_len: int,
    head_dim: int,
    dtype: str,
    gpu_dtype: str | None = None,
    device: str | None = None,
) -> tuple[torch.Tensor, ...]:
    """q, k, v and one more of q's shape, normal, the same for every case of this shape, on the device whose clock runs here.

    On a GPU they are of `gpu_dtype` where the case names one, and bfloat16 instead of float32, which its kernels do not take.
    """
    device = device or current_device()
    return _tensors(batch, heads, kv_heads, q_len, kv_len, head_dim, _dtype(dtype, gpu_dtype, device), device)


def _dtype(dtype: str, gpu_dtype: str | None, device: str) -> torch.dtype:
    on_gpu = gpu_dtype or ("bfloat16" if dtype == "float32" else dtype)
    return getattr(torch, dtype if device == "cpu" else on_gpu)


@functools.cache
def _tensors(batch: int, heads: int, kv_heads: int, q_len: int, kv_len: int, head_dim: int, dtype: torch.dtype, device: str):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, q_len, head_dim)] + 2 * [(batch, kv_heads, kv_len, head_dim)] + [(batch, heads, q_len, head_dim)]
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)


def forward(pattern: str, causal: bool, impl: str = "tile", **shape) -> Workload:
    """Attention without gradients against the best dense SDPA."""
    _require_kernels()
    q, k, v, _ = tensors(**shape)
    chosen = parse(pattern)
    rivals = _rivals(q, k, v, causal)
    return Workload(
        candidate=_no_grad(lambda: attention(q, k, v, chosen, impl=impl)),
        baselines=rivals,
        check=Oracle(q, k, v, chosen).check,
        inputs=(q, k, v),
        prepare=_prepare(rivals),
        columns=_columns(q, k, v, chosen),
        work=_work(chosen, **shape),
    )


def backward(pattern: str, causal: bool, impl: str = "tile", **shape) -> Workload:
    """The backward pass alone, against that of the best dense SDPA."""
    _require_kernels()
    q, k, v, dout = (t.clone().requires_grad_(n < 3) for n, t in enumerate(tensors(**shape)))
    chosen = parse(pattern)
    outs: dict[str, torch.Tensor] = {}
    forwards = {"": lambda: attention(q, k, v, chosen, impl=impl), **baselines.dense(q, k, v, causal=causal)}

    def prepare(name):
        if name not in outs:
            outs[name] = forwards[name]()

    def gradients(name):
        def call():
            prepare(name)
            return torch.autograd.grad(outs[name], (q, k, v), dout, retain_graph=True)

        return call

    def refresh(seed):
        outs.clear()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in (q, k, v, dout):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))

    oracle = Oracle(q, k, v, chosen)
    return Workload(
        candidate=gradients(""),
        baselines={name: gradients(name) for name in forwards if name},
        check=lambda found: oracle.check_gradients(found, dout),
        inputs=(q, k, v, dout),
        refresh=refresh,
        work=_work(chosen, flops=2.5, bytes=2, **shape),
    )


def segments(segments: list[int], dilations: list[int], **shape) -> Workload:
    """LongNet's mixture against causal SDPA."""
    _require_kernels()
    q, k, v, _ = tensors(**shape)
    rivals = _rivals(q, k, v, causal=True)
    return Workload(
        candidate=_no_grad(lambda: longnet(q, k, v, segments, dilations, impl="tile")),
        baselines=rivals,
        check=LongNetOracle(q, k, v, segments, dilations).check,
        inputs=(q, k, v),
        prepare=_prepare(rivals),
    )


def against(pattern: str, rival: str, impl: str = "tile", **shape) -> Workload:
    """One pattern against another on the same engine."""
    _require_kernels()
    q, k, v, _ = tensors(**shape)
    chosen, other = parse(pattern), parse(rival)
    return Workload(
        candidate=_no_grad(lambda: attention(q, k, v, chosen, impl=impl)),
        baselines={rival: _no_grad(lambda: attention(q, k, v, other, impl=impl))},
        check=Oracle(q, k, v, chosen).check,
        inputs=(q, k, v),
    )


def against_flex(pattern: str, impl: str = "tile", **shape) -> Workload:
    """Against compiled FlexAttention."""
    workload = forward(pattern, True, impl, **shape)
    return Workload(
        candidate=workload.candidate,
        baselines={"flex": workload.columns["flex"]()},
        check=workload.check,
        inputs=workload.inputs,
    )


def tile_rate(pattern: str, **shape) -> Workload:
    """Visited tiles a second, against those of the tile engine on `Causal()`."""
    workload = against(pattern, "Causal()", **shape)
    sizes = shape["q_len"], shape["kv_len"], shape["heads"]
    visited = [layout.layout(p, *sizes).counts.visited for p in (parse(pattern), Causal())]
    workload.scale = visited[0] / visited[1]
    workload.note = f"{visited[0]} tiles against {visited[1]}"
    return workload


def automatic(pattern: str, **shape) -> Workload:
    """`auto` against the fastest of the sparse engines and SDPA with the same mask, made beforehand."""
    _require_kernels()
    q, k, v, _ = tensors(**shape)
    chosen = parse(pattern)
    rivals = {impl: _no_grad(functools.partial(attention, q, k, v, chosen, impl=impl)) for impl in ("tile", "gather")}
    with_mask = functools.cache(lambda: _no_grad(baselines.masked(q, k, v, chosen)))
    return Workload(
        candidate=_no_grad(lambda: attention(q, k, v, chosen)),
        baselines={**rivals, "sdpa with mask": lambda: with_mask()()},
        prepare=lambda name: with_mask() if name == "sdpa with mask" else None,
        check=Oracle(q, k, v, chosen).check,
        inputs=(q, k, v),
        note=f"auto runs {dispatch.plan(chosen, dispatch.Sizes.of(q, k)).impl}",
    )


def layout_making(pattern: str, length: int, heads: int = 1, most_bytes: int | None = None) -> Workload:
    """Building the layout of a pattern on one thread; "predicate" stands for a function of which nothing is known."""
    chosen = Predicate(lambda i, j: (i - j).abs() * 7 % 11 < 3) if pattern == "predicate" else parse(pattern)

    def make():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return layout.build(chosen, length, length, heads)
        finally:
            torch.set_num_threads(threads)

    def check(made):
        assert made.counts.pairs > 0
        if most_bytes is not None:
            peak = peak_bytes(make)
            assert peak is None or peak <= most_bytes, f"making it took {peak} bytes, at most {most_bytes} wanted"

    return Workload(candidate=make, check=check)


def layout_again(pattern: str, length: int) -> Workload:
    """Asking for a layout that was made before."""
    first, equal = parse(pattern), parse(pattern)
    made = layout.layout(first, length, length)

    def check(found):
        assert found is made, "the layout was made again"

    return Workload(candidate=lambda: layout.layout(equal, length, length), check=check)


def _rivals(q, k, v, causal: bool):
    return {name: _no_grad(call) for name, call in baselines.dense(q, k, v, causal=causal).items()}


def _prepare(rivals):
    # asv and `gate --base` run these builders over kernels of older commits, whose baselines needed none.
    return baselines.prepare(rivals) if hasattr(baselines, "prepare") else None


def _work(pattern: Pattern, flops: float = 1, bytes: float = 1, *, dtype: str, gpu_dtype: str | None = None, **sizes) -> dict[str, float]:
    """Useful work of a call; `flops` and `bytes` are those of the direction over those of the forward."""
    itemsize = _dtype(dtype, gpu_dtype, current_device()).itemsize
    found = cost(pattern, itemsize=itemsize, **sizes)
    if sizes["q_len"] < sizes["kv_len"]:  # some keys may be seen by nobody: count as many as a query sees at least
        seen = found.pairs / (sizes["batch"] * sizes["heads"] * sizes["q_len"])
        unseen = 2 * sizes["batch"] * sizes["kv_heads"] * (sizes["kv_len"] - seen) * sizes["head_dim"] * itemsize
        bytes *= 1 - unseen / found.bytes
    return {
        "pairs": found.pairs,
        "dense_pairs": found.dense_pairs,
        "flops": flops * found.flops,
        "bytes": bytes * found.bytes,
    }


def _columns(q, k, v, pattern: Pattern):
    makers = {"flex": baselines.flex, "masked": baselines.masked, "torch.sparse": baselines.torch_sparse}
    return {name: functools.partial(_made, maker, q, k, v, pattern) for name, maker in makers.items()}


def _made(maker, q, k, v, pattern):
    return _no_grad(maker(q, k, v, pattern))


def _no_grad(call):
    def run(*arguments):
        with torch.no_grad():
            return call(*arguments)

    return run


def _require_kernels() -> None:
    try:
        kernels()
    except BuildError as error:
        raise Unavailable(str(error)) from error
