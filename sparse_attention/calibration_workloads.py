"""What calibration times: engines below `attention`, whose own few microseconds are the same for all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch

from sparse_attention._build import BuildError
from sparse_attention.breakeven import Unavailable, Workload
from sparse_attention.dense import attend_masked, mask_of
from sparse_attention.dispatch import Sizes, work
from sparse_attention.engines import engine
from sparse_attention.patterns import Pattern, parse
from sparse_attention.rates import Rate
from sparse_attention.reference import reference

CHECKED_ROWS = 32
TOLERANCES = {"float32": 1e-4, "float64": 1e-9, "bfloat16": 3e-2, "float16": 4e-3}


def timed(pattern: str, impl: str, heads: int, q_len: int, kv_len: int, head_dim: int, dtype: str) -> Workload:
    """One engine, alone."""
    q, k, v = tensors(heads, q_len, kv_len, head_dim, dtype)
    chosen = parse(pattern)
    return Workload(candidate=call(q, k, v, chosen, impl), check=check(q, k, v, chosen), inputs=(q, k, v))


def against_dense(
    pattern: str, rates: Mapping[str, Sequence[float]], length: int, heads: int, head_dim: int, dtype: str
) -> Workload:
    """The sparse engine that `rates`, {engine: Rate}, favour, against the dense engine on the same pattern."""
    q, k, v = tensors(heads, length, length, head_dim, dtype)
    chosen = parse(pattern)
    todo = work(chosen, Sizes.of(q, k))
    times = {impl: Rate(*rate).time(todo[impl], head_dim) for impl, rate in rates.items() if impl in todo}
    impl = min(times, key=times.get)
    return Workload(
        candidate=call(q, k, v, chosen, impl),
        baselines={"dense": call(q, k, v, chosen, "dense")},
        check=check(q, k, v, chosen),
        inputs=(q, k, v),
        note=impl,
    )


@functools.cache
def tensors(heads: int, q_len: int, kv_len: int, head_dim: int, dtype: str) -> tuple[torch.Tensor, ...]:
    """q, k and v, normal, the same for every case of this shape."""
    generator = torch.Generator().manual_seed(0)
    lengths = (q_len, kv_len, kv_len)
    return tuple(torch.randn(1, heads, n, head_dim, generator=generator).to(getattr(torch, dtype)) for n in lengths)


def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, impl: str) -> Callable[[], torch.Tensor]:
    """An engine over these tensors. The dense one keeps its mask here: more are timed in turn than its cache holds."""
    if impl != "dense":
        try:
            found = engine(q, k, v, pattern, impl)
        except BuildError as error:
            raise Unavailable(str(error)) from error
        return lambda: found.forward(q, k, v, found.scale)[0]
    mask = mask_of(pattern, q.shape[2], k.shape[2], q.shape[1], q.dtype, q.device)
    return lambda: attend_masked(q, k, v, mask, None)


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern) -> Callable[[torch.Tensor], None]:
    """Holds an output's last rows against the reference."""
    tolerance = TOLERANCES[str(q.dtype).removeprefix("torch.")]

    def compare(out):
        last = slice(-CHECKED_ROWS, None)  # alone, the last queries stand where they stood
        right, _ = reference(q[:, :, last].double(), k.double(), v.double(), pattern)
        torch.testing.assert_close(out[:, :, last].double(), right, atol=tolerance, rtol=tolerance)

    return compare
