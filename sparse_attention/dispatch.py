"""Which engine runs a call, and why: the only place that may choose dense."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from sparse_attention import _build_cuda, cuda_blocks, cuda_layout, cuda_rows, cuda_tables, decode_cuda
from sparse_attention.cost import Cost, cost, count, scattered
from sparse_attention.decode_pattern import is_large_tree, suits, suits_cuda
from sparse_attention.lanes import lane_pairs
from sparse_attention.layout import Layout, layout
from sparse_attention.patterns.base import Lengths, Pattern, Spans, Tile
from sparse_attention.patterns.compose import And, Or
from sparse_attention.patterns.tree import Tree
from sparse_attention.patterns.window import Causal, Dense
from sparse_attention.rates import Crossing, Rate, Table, Work, table
from sparse_attention.rows import Rows, rows

IMPLS = ("auto", "tile", "gather", "dense", "reference")
TILE_DTYPES = (torch.bfloat16, torch.float16)  # of the tile engine on CUDA
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


@dataclass(frozen=True, eq=False)
class Plan:
    """How one pattern runs at one set of sizes.

    impl: "tile", "gather", "decode", "dense" or "reference". why: the reason in words. estimates: expected nanoseconds of each engine that
    was considered. dense_rate: what the expected speedup compares with. Tables are made when asked for; their caches keep them.
    """

    pattern: Pattern
    sizes: Sizes
    impl: str
    why: str
    estimates: dict[str, float]
    dense_rate: Rate | None = None

    @property
    def layout(self) -> Layout:
        return layout(self.pattern, self.sizes.q_len, self.sizes.kv_len, self.sizes.heads)

    @property
    def rows(self) -> Rows:
        return rows(self.pattern, self.sizes.q_len, self.sizes.kv_len, self.sizes.heads)

    @property
    def cost(self) -> Cost:
        s = self.sizes
        return cost(
            self.pattern, batch=s.batch, heads=s.heads, kv_heads=s.kv_heads, q_len=s.q_len, kv_len=s.kv_len,
            head_dim=s.head_dim, itemsize=s.dtype.itemsize,
        )

    @property
    def speedup(self) -> float | None:
        """Expected time of dense, as `without_sparsity` has it, over that of the chosen engine; None where nothing was compared."""
        if self.impl not in self.estimates or self.dense_rate is None:
            return None
        s = self.sizes
        given_up = _dense_work(without_sparsity(self.pattern, s), s, s.batch * s.heads * s.q_len)
        return self.dense_rate.time(given_up, s.head_dim) / self.estimates[self.impl]

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


def plan(pattern: Pattern, sizes: Sizes, impl: str = "auto") -> Plan:
    """The plan of a call. Sizes that the pattern cannot apply to, and an engine that cannot run them, raise ValueError.

    Few queries over many keys run on the decode engine, whose plan is not kept: a cache that grows has another each step.
    """
    why = _decoding(pattern, sizes) if impl == "auto" else None
    if why:
        return Plan(pattern, sizes, "decode", why, {})
    return _plan(pattern, sizes, impl, torch.get_num_threads())


def _decoding(pattern: Pattern, sizes: Sizes) -> str | None:
    """Why the decode engine runs a call, or None if it does not."""
    if sizes.device == "cuda":
        takes = sizes.dtype in decode_cuda.DTYPES and sizes.head_dim % 8 == 0 and 8 <= sizes.head_dim <= 256 and sizes.q_len > 0
        blocks = max(sizes.batch, sizes.kv_heads + sizes.heads * sizes.q_len // 16)
        why = suits_cuda(pattern, sizes.q_len, sizes.kv_len) if takes and blocks <= decode_cuda.MOST_BLOCKS else None
        if not why or decode_cuda.device_obstacle(capability := torch.cuda.get_device_capability()):
            return None
        warpgroups = capability == (9, 0) and sizes.dtype != torch.float32 and sizes.head_dim <= 128
        return why if warpgroups or not is_large_tree(pattern, sizes.q_len, sizes.kv_len) else None
    if sizes.device == "cpu" and not engine_obstacle(pattern, sizes):
        return suits(pattern, sizes.q_len, sizes.kv_len, sizes.dtype)
    return None


@lru_cache(maxsize=512)
def _plan(pattern: Pattern, sizes: Sizes, impl: str, threads: int) -> Plan:
    pattern.check(sizes.q_len, sizes.kv_len, sizes.heads)
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; expected one of {', '.join(IMPLS)}")
    if impl in ("dense", "reference"):
        return Plan(pattern, sizes, impl, "asked for", {})
    if impl != "auto":
        obstacle = engine_obstacle(pattern, sizes, impl)
        if obstacle:
            raise ValueError(f"impl is {impl!r}, but {obstacle}; use impl='dense' or impl='reference'")
        return Plan(pattern, sizes, impl, "asked for", {})
    obstacle = engine_obstacle(pattern, sizes, "tile")
    other = obstacle and engine_obstacle(pattern, sizes, "gather")
    if other:
        return Plan(pattern, sizes, "dense", obstacle if obstacle == other else f"{obstacle}; {other}", {})
    return choose(pattern, sizes, threads, table(sizes.device))


def engine_obstacle(pattern: Pattern, sizes: Sizes, impl: str = "tile") -> str | None:
    """Why a sparse engine cannot run a pattern at these sizes, or None."""
    if sizes.device not in ("cpu", "cuda"):
        return f"q is on {sizes.device} and the {impl} engine runs on cpu and cuda"
    if sizes.head_dim % 8 or not 8 <= sizes.head_dim <= 256:
        return f"head_dim is {sizes.head_dim} and the sparse engines take multiples of 8 from 8 to 256"
    return cuda_obstacle(pattern, sizes, impl) if sizes.device == "cuda" else None


def cuda_obstacle(pattern: Pattern, sizes: Sizes, impl: str = "tile") -> str | None:
    """Why an engine on CUDA cannot run a pattern at these sizes, or None."""
    if impl == "tile" and sizes.dtype not in TILE_DTYPES:
        return f"q has dtype {sizes.dtype} and the tile engine on CUDA takes bfloat16 and float16"
    unbuilt = _build_cuda.obstacle(torch.cuda.get_device_capability())
    if unbuilt or impl == "tile":
        return unbuilt
    return cuda_rows.obstacle(pattern, sizes.q_len, sizes.kv_len, sizes.heads)


def choose(pattern: Pattern, sizes: Sizes, threads: int, known: Table) -> Plan:
    """The plan that `known` suggests: what was measured of this very pattern where that is clear, else what counted work says."""
    dtype = str(sizes.dtype).removeprefix("torch.")
    of_threads, rates = known.rates_for(threads, dtype)
    estimates = {engine: rates[engine].time(w, sizes.head_dim) for engine, w in work(pattern, sizes).items()}
    ordered = sorted(estimates.items(), key=lambda item: item[1])
    counted = ", ".join(f"{engine} {t / 1e3:,.0f} us" for engine, t in ordered)
    where = f" on {of_threads} thread{'s' * (of_threads > 1)}" if sizes.device == "cpu" else ""
    counted = f"by counted work{where} ({counted})"
    crossing = _crossing(pattern, sizes, dtype, threads, known)
    winner = crossing and crossing.winner(sizes.q_len)
    if winner is None:
        why = f"cheapest {counted}"
        if crossing and crossing.low and crossing.high:
            why = f"too close to call when measured ({_measured(crossing, known)}); {why}"
        return Plan(pattern, sizes, ordered[0][0], why, estimates, rates["dense"])
    measured = f"{winner} was faster when measured ({_measured(crossing, known)})"
    if winner == "dense":
        return Plan(pattern, sizes, "dense", measured, estimates, rates["dense"])
    best = next(engine for engine, _ in ordered if engine != "dense")
    return Plan(pattern, sizes, best, f"{measured}; the cheapest such engine {counted}", estimates, rates["dense"])


def work(pattern: Pattern, sizes: Sizes) -> dict[str, Work]:
    """What each engine would do for these sizes; no "gather" where its tables would be too large, or on CUDA where it surely loses."""
    rows = sizes.batch * sizes.heads * sizes.q_len
    if sizes.device == "cuda":
        return {"dense": _dense_work(pattern, sizes, rows), **_cuda_work(pattern, sizes, rows)}
    pairs, _, _ = count(pattern, sizes.q_len, sizes.kv_len, sizes.heads)
    lanes = lane_pairs(pattern, sizes.q_len, sizes.kv_len, sizes.heads)
    found = {"dense": _dense_work(pattern, sizes, rows), "tile": Work(rows, sizes.batch * lanes)}
    if pairs <= GATHER_PAIRS:
        found["gather"] = Work(rows, sizes.batch * pairs)
    return found


def _cuda_work(pattern: Pattern, sizes: Sizes, rows: int) -> dict[str, Work]:
    """The same for the sparse engines on CUDA. Where tiles hold more than about one pair, the tensor cores are faster by far."""
    lengths = sizes.q_len, sizes.kv_len, sizes.heads
    few, found = scattered(pattern), {}
    if few or sizes.dtype not in TILE_DTYPES:
        listed, pairs = cuda_rows.pairs(pattern, *lengths)
        if listed <= cuda_rows.PAIRS:
            found["gather"] = Work(rows, sizes.batch * pairs)
    if sizes.dtype in TILE_DTYPES:
        computed = cuda_blocks.computed(pattern, *lengths)
        if few:
            tile = Tile(cuda_tables.QUERIES, cuda_tables.NARROW)
            computed = tile.q * tile.k * cuda_rows.touched(pattern, *lengths, tile)
        elif computed is None:
            layout = cuda_layout.best_layout(pattern, *lengths, sizes.head_dim, sizes.batch)
            computed = layout.counts.visited * layout.tile_q * layout.tile_k
        found["tile"] = Work(rows, sizes.batch * computed)
    return found


def without_sparsity(pattern: Pattern, sizes: Sizes) -> Pattern:
    """What a user runs who gave up the sparsity: `Causal` where the pattern is causal and SDPA can say so, `Dense` otherwise; the
    pattern itself, as a mask, where nothing else is right: trees."""
    if _has_tree(pattern):
        return pattern
    if sizes.q_len != sizes.kv_len:
        return Dense()
    lengths = sizes.q_len, sizes.kv_len, sizes.heads
    causal = pattern.pairs(*lengths) == (pattern & Causal()).pairs(*lengths)
    return Causal() if causal else Dense()


def _has_tree(pattern: Pattern) -> bool:
    if isinstance(pattern, (And, Or)):
        return _has_tree(pattern.a) or _has_tree(pattern.b)
    return isinstance(pattern, Tree)


def _dense_work(pattern: Pattern, sizes: Sizes, rows: int) -> Work:
    sequences = sizes.batch * sizes.heads
    keys = sequences * _seen_keys(pattern, sizes)
    lone_keys = keys if sizes.q_len == 1 else 0
    if isinstance(pattern, Causal) and sizes.q_len == sizes.kv_len:
        return Work(rows, sequences * _causal_pairs(sizes.q_len), 0, keys, lone_keys)
    pairs = max(sizes.q_len, 4) * keys  # a few queries cost SDPA as much as four
    return Work(rows, pairs, 0 if isinstance(pattern, Dense) else pairs, keys, lone_keys)


def _seen_keys(pattern: Pattern, sizes: Sizes) -> int:
    """About how many keys the dense engine takes: those that some query sees, where queries are few."""
    if sizes.q_len == sizes.kv_len:
        return sizes.kv_len
    lengths = Lengths(sizes.q_len, sizes.kv_len)
    first, last = np.array([lengths.offset]), np.array([sizes.kv_len - 1])
    heads = {pattern.for_head(h) for h in range(sizes.heads)}
    spans = Spans.join(*(head.spans(first, last, lengths) for head in heads))
    seen = Spans(spans.group, spans.start.clip(0), spans.stop.clip(max=sizes.kv_len)).merged()
    return max(1, int((seen.stop - seen.start).sum()))


def _causal_pairs(length: int) -> int:
    """What SDPA computes of a causal square on CPU: for each block of queries, blocks of 512 keys up to the diagonal."""
    block = 256 if length >= 768 else 64 if length >= 192 else 32
    stop = np.minimum(np.arange(block, length + block, block), length)
    return int((np.diff(stop, prepend=0) * np.minimum(-(-stop // 512) * 512, length)).sum())


def _crossing(pattern: Pattern, sizes: Sizes, dtype: str, threads: int, known: Table) -> Crossing | None:
    """What was measured of this pattern; as many queries as keys, and no grouped heads, were all that was."""
    if sizes.q_len != sizes.kv_len or sizes.heads != sizes.kv_heads or not known.crossings:
        return None
    return known.crossing(repr(pattern), dtype, sizes.head_dim, threads, sizes.batch * sizes.heads)


def _measured(crossing: Crossing, known: Table) -> str:
    facts = [f"dense up to {crossing.low:,}"] if crossing.low else []
    facts += [f"sparse from {crossing.high:,}"] if crossing.high else []
    return f"{', '.join(facts)} positions; {known.source}"
