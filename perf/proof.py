"""What `python -m sparse_attention.breakeven proof` proves the gate on, on a CPU: kernels with some of their work repeated, and gates
that must not say yes. perf/proof_cuda.py is the same for a GPU.
"""

from __future__ import annotations

import torch

from perf.cases import K, shape
from perf.oracle import Oracle
from perf.workloads import forward, tensors
from sparse_attention import attention, baselines, layout
from sparse_attention.breakeven import Case, Unavailable, Workload
from sparse_attention.breakeven.controls import Control
from sparse_attention.breakeven.proof import SLOWDOWNS, Injected
from sparse_attention.patterns import parse

TILE = 64


def injected(name: str, pattern: str, sizes: dict, causal: bool = True, slowdowns: tuple[float, ...] = SLOWDOWNS) -> Injected:
    """A forward case, and the same with shares of its tiles visited twice."""
    args = {"pattern": pattern, "causal": causal, **sizes}
    plain = Case(name, "perf.workloads:forward", args, share=f"proof {name}")
    slowed = {x: Case(f"{name} +{100 * x:g}%", "perf.proof:slowed", {"extra": x, **args}, share=plain.share) for x in slowdowns}
    return Injected(plain, slowed)


def only(name: str, pattern: str, sizes: dict, causal: bool = True, **args) -> Injected:
    """A forward case for false alarms alone."""
    return Injected(Case(name, "perf.workloads:forward", {"pattern": pattern, "causal": causal, **args, **sizes}), {})


INJECTED = [
    injected("window256/2k", "SlidingWindow(256)", shape(4, 2 * K, 64)),
    injected("window512/2k/128", "SlidingWindow(512)", shape(2, 2 * K, 128)),
    only("strided64/2k", "Strided(64)", shape(2, 2 * K, 64)),
    only("bigbird/2k", "BigBird()", shape(2, 2 * K, 64), causal=False),
    only("logsparse/2k", "LogSparse()", shape(4, 2 * K, 64), impl="gather"),
    only("longformer256/2k", "Longformer(256, 1)", shape(2, 2 * K, 64), causal=False),
]


def slowed(extra: float, pattern: str, causal: bool, **sizes) -> Workload:
    """`forward` whose candidate first visits about the share `extra` of its tiles once more: those of some heads' last queries."""
    workload = forward(pattern, causal, **sizes)
    if not extra:
        return workload
    q, k, v, _ = tensors(**sizes)
    chosen = parse(pattern)
    heads, q_len, kv_len = q.shape[1], q.shape[2], k.shape[2]
    if k.shape[1] != heads or any(chosen.for_head(h) != chosen.for_head(0) for h in range(heads)):
        raise ValueError(f"pattern and heads must let one head stand for all, got {pattern}, {heads} heads, {k.shape[1]} for k")
    visited = {n: layout.layout(chosen, n, kv_len, 1).counts.visited for n in range(TILE, q_len + 1, TILE)}
    whole = heads * visited[q_len]
    few, last = min(
        ((h, n) for h in range(1, heads + 1) for n in visited), key=lambda hn: abs(hn[0] * visited[hn[1]] / whole - extra)
    )
    again, plain = (q[:, :few, -last:], k[:, :few], v[:, :few]), workload.candidate

    def candidate():
        with torch.no_grad():
            attention(*again, chosen, impl="tile")
        return plain()

    workload.candidate = candidate
    workload.note = f"{few * visited[last]} of {whole} tiles twice: +{100 * few * visited[last] / whole:.1f} %"
    return workload


def faulty(fault: str, **sizes) -> Workload:
    """Causal attention whose kernel is "dense", so no faster, returns "zeros", a copy of "yesterday"'s output or that output
    itself ("cached"), or is said to do more than the machine could do in its time ("impossible").
    """
    q, k, v, _ = tensors(**sizes)
    dense = {name: call for name, call in baselines.dense(q, k, v, causal=True).items() if name != baselines.COMPILED}
    kept: list[torch.Tensor] = []

    def cached():
        if not kept:
            kept.append(dense["sdpa"]())
        return kept[0]

    kernels = {"zeros": lambda: torch.zeros_like(q), "yesterday": lambda: cached().clone(), "cached": cached}
    work = {"flops": 1e15} if fault == "impossible" else {}
    check = Oracle(q, k, v, parse("Causal()")).check
    return Workload(kernels.get(fault, dense["sdpa"]), dense, check, inputs=(q, k, v), work=work)


def side_stream(**sizes) -> Workload:
    """Launches its work on a stream for which nobody waits, and enough of it that it is not over by chance when asked for."""
    if not torch.cuda.is_available():
        raise Unavailable("needs a CUDA device")
    q, k, v, _ = tensors(**sizes, device="cuda")
    dense = baselines.dense(q, k, v, causal=True)
    stream = torch.cuda.Stream()

    def candidate():
        with torch.cuda.stream(stream):
            return [dense["sdpa"]() for _ in range(20)][-1]

    return Workload(candidate, dense, lambda out: torch.testing.assert_close(out, dense["sdpa"]()), inputs=(q, k, v))


SMALL = shape(2, K, 64)
BROKEN = [
    Case("dense", "perf.proof:faulty", {"fault": "dense", **SMALL}, floor=1.05),
    Case("zeros", "perf.proof:faulty", {"fault": "zeros", **SMALL}),
    Case("yesterday", "perf.proof:faulty", {"fault": "yesterday", **SMALL}),
    Case("cached", "perf.proof:faulty", {"fault": "cached", **SMALL}),
    Case("impossible", "perf.proof:faulty", {"fault": "impossible", **SMALL}),
    Case("sound", "perf.workloads:forward", {"pattern": "SlidingWindow(256)", "causal": True, **SMALL}),
]
NONE: list[Case] = []


def faulty_gate(*arguments: str, table: str) -> tuple[str, ...]:
    settings = ["--thresholds", "none", "--threads", "1", "--policy", "sequential", "--budget", "60s", "--quiet"]
    return ("sparse_attention.breakeven", "gate", "--table", table, *arguments, *settings)


def gate(*arguments: str, table: str = "BROKEN") -> tuple[str, ...]:
    return faulty_gate(*arguments, table=f"perf.proof:{table}")


CONTROLS = [
    Control("the candidate is dense, at floor 1.05", gate("--cases", "dense"), (10,), "dense .*FAIL"),
    Control("a kernel that returns zeros", gate("--cases", "zeros"), (1,), "WRONG: AssertionError"),
    Control("a kernel that returns yesterday's output", gate("--cases", "yesterday"), (1,), "SUSPICIOUS: its output stayed"),
    Control("a kernel that returns its cached tensor", gate("--cases", "cached"), (1,), "SUSPICIOUS: it returned the memory"),
    Control("a kernel too fast for the machine", gate("--cases", "impossible"), (1,), "SUSPICIOUS: faster than this machine"),
    Control("a sound kernel", gate("--cases", "sound"), (0,), "sound .*PASS"),
    Control("the same beside busy neighbours", gate("--cases", "sound"), (12,), "NOT EVALUATED: contended", neighbours=True),
    Control("a renamed case", gate("--cases", "renamed"), (13,), "no case .* matches 'renamed'"),
    Control("an empty table", gate(table="NONE"), (13,), "no case"),
    Control("a renamed case, in pytest", ("pytest", "perf", "-q", "-k", "renamed", "-p", "no:cacheprovider"), (5,), "deselected"),
    Control("timing switched off, in pytest", ("pytest", "perf", "-q", "--benchmark-disable"), (4,), "would judge nothing"),
]
