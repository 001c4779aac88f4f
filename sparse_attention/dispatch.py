"""Which engine runs a call, and why: the only place that may choose dense."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch

from sparse_attention.cost import Cost, cost, count
from sparse_attention.layout import Layout, layout
from sparse_attention.patterns.base import Pattern
from sparse_attention.patterns.window import Causal, Dense
from sparse_attention.rows import Rows, rows

IMPLS = ("auto", "tile", "gather", "dense", "reference")
LANES = 16  # query rows that the tile engine handles at once; a tile with fewer pays for this many
GATHER_PAIRS = 1 << 27  # a row table larger than this (1 GB with its transpose) is never chosen for the caller


class Sizes(NamedTuple):
    """What a plan depends on beside its pattern."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    dtype: torch.dtype
    device: str

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor) -> "Sizes":
        batch, heads, q_len, head_dim = q.shape
        return cls(batch, heads, k.shape[1], q_len, k.shape[2], head_dim, q.dtype, q.device.type)


class Rate(NamedTuple):
    """Time of one engine on one thread: call + rows * row + pairs * (pair + head_dim * element), in nanoseconds."""

    call: float
    row: float
    pair: float
    element: float

    def time(self, rows: int, pairs: int, head_dim: int) -> float:
        return self.call + rows * self.row + pairs * (self.pair + head_dim * self.element)


# Fitted on one core of an AMD EPYC 9004 (Zen 4, AVX-512), float32, torch 2.13, head_dim 64 and 128, 1 to 1,024 queries. Only
# ratios matter. `tile` counts the pairs of the lanes it runs, `gather` allowed pairs, `dense` what SDPA computes.
RATES = {
    "tile": Rate(call=2_200, row=60, pair=0.2, element=0.040),
    "gather": Rate(call=2_300, row=42, pair=0.4, element=0.085),
    "dense": Rate(call=7_000, row=60, pair=0.0, element=0.0485),
}
PARTIAL = 0.6  # share of a partial tile that is computed: both triangles of a window's edges, in steps of 16 lanes
MASK = 0.6  # nanoseconds that SDPA spends on each element of a mask


@dataclass(frozen=True, eq=False)
class Plan:
    """How one pattern runs at one set of sizes.

    impl: "tile", "gather", "dense" or "reference". why: the reason in words. estimates: expected nanoseconds on one thread of
    each engine that was considered. Tables are made when first asked for and kept.
    """

    pattern: Pattern
    sizes: Sizes
    impl: str
    why: str
    estimates: dict[str, float]

    @cached_property
    def layout(self) -> Layout:
        return layout(self.pattern, self.sizes.q_len, self.sizes.kv_len, self.sizes.heads)

    @cached_property
    def rows(self) -> Rows:
        return rows(self.pattern, self.sizes.q_len, self.sizes.kv_len, self.sizes.heads)

    @cached_property
    def cost(self) -> Cost:
        s = self.sizes
        return cost(
            self.pattern, batch=s.batch, heads=s.heads, kv_heads=s.kv_heads, q_len=s.q_len, kv_len=s.kv_len,
            head_dim=s.head_dim, itemsize=s.dtype.itemsize,
        )

    @property
    def speedup(self) -> float | None:
        """Expected time of dense over that of the chosen engine; None where nothing was compared."""
        if self.impl not in self.estimates or "dense" not in self.estimates:
            return None
        return self.estimates["dense"] / self.estimates[self.impl]

    def __str__(self) -> str:
        c = self.cost
        s = self.sizes
        lines = [
            f"{self.pattern!r}",
            f"  q [{s.batch}, {s.heads}, {s.q_len}, {s.head_dim}], {s.kv_heads} kv heads of {s.kv_len} keys, {s.dtype} on {s.device}",
            f"  impl      {self.impl}: {self.why}",
            f"  tiles     {c.visited:,} visited: {c.full:,} full, {c.partial:,} partial (64 x 64)",
            f"  pairs     {c.pairs:,} of {c.dense_pairs:,} ({c.sparsity:.2%} sparse)",
            f"  FLOPs     {c.flops:,}",
            f"  bytes     {c.bytes:,}",
        ]
        if self.speedup is not None:
            lines.append(f"  expected  {self.speedup:.2f}x of dense")
        return "\n".join(lines)


@lru_cache(maxsize=512)
def plan(pattern: Pattern, sizes: Sizes, impl: str = "auto") -> Plan:
    """The plan of a call. Sizes that the pattern cannot apply to, and an engine that cannot run them, raise ValueError."""
    pattern.check(sizes.q_len, sizes.kv_len, sizes.heads)
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; expected one of {', '.join(IMPLS)}")
    obstacle = engine_obstacle(sizes)
    if impl in ("tile", "gather") and obstacle:
        raise ValueError(f"impl is {impl!r}, but {obstacle}; use impl='dense' or impl='reference'")
    if impl != "auto":
        return Plan(pattern, sizes, impl, "asked for", {})
    if obstacle:
        return Plan(pattern, sizes, "dense", obstacle, {})
    return _cheapest(pattern, sizes)


def engine_obstacle(sizes: Sizes) -> str | None:
    """Why the sparse engines cannot run these sizes, or None."""
    if sizes.device != "cpu":
        return f"q is on {sizes.device} and the sparse engines run on cpu"
    if sizes.head_dim % 8 or not 8 <= sizes.head_dim <= 256:
        return f"head_dim is {sizes.head_dim} and the sparse engines take multiples of 8 from 8 to 256"
    return None


def _cheapest(pattern: Pattern, sizes: Sizes) -> Plan:
    estimates = {"dense": _dense_time(pattern, sizes)}
    q_rows = sizes.batch * sizes.heads * sizes.q_len
    pairs, full, partial = count(pattern, sizes.q_len, sizes.kv_len, sizes.heads)
    lanes = min(64, -(-sizes.q_len // LANES) * LANES)
    lane_pairs = sizes.batch * int(full + PARTIAL * partial) * min(64, sizes.kv_len) * lanes
    estimates["tile"] = RATES["tile"].time(q_rows, lane_pairs, sizes.head_dim)
    if pairs <= GATHER_PAIRS:
        estimates["gather"] = RATES["gather"].time(q_rows, sizes.batch * pairs, sizes.head_dim)
    best = min(estimates, key=estimates.get)
    others = ", ".join(f"{name} {t / 1e3:,.0f} us" for name, t in sorted(estimates.items(), key=lambda x: x[1]))
    return Plan(pattern, sizes, best, f"cheapest by counted work on one thread ({others})", estimates)


def _dense_time(pattern: Pattern, sizes: Sizes) -> float:
    q_rows = sizes.batch * sizes.heads * sizes.q_len
    pairs = sizes.batch * sizes.heads * max(sizes.q_len, 4) * sizes.kv_len  # one query costs SDPA as much as four
    causal = isinstance(pattern, Causal) and sizes.q_len == sizes.kv_len
    if causal and sizes.q_len >= 1024:
        pairs //= 2  # SDPA skips what lies above the diagonal in steps of its own large blocks
    rate = RATES["dense"]
    if not causal and not isinstance(pattern, Dense):
        rate = rate._replace(pair=rate.pair + MASK)
    return rate.time(q_rows, pairs, sizes.head_dim)
