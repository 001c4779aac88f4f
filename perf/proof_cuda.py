"""What the proof runs on a GPU: kernels that compute some of their heads twice, in the same launch, and gates that must not say yes.

A launch of a few more tiles costs a launch and a round of all multiprocessors, more than the slowdowns that are to be found. So the
kernel is given more heads than the caller looks at, copies of the first ones; of many heads each is a percent of the work. Work comes
in rounds of all multiprocessors, so lengths are those of which a head more takes about its share longer. Longer ones, whose dense
calls take 10 ms, met the board's power limit all the time.
"""

from __future__ import annotations

import functools

import torch

from perf.cases import K, shape
from perf.cuda_workloads import FIRST_SEED, check
from perf.proof import faulty_gate
from sparse_attention import attention, baselines
from sparse_attention.breakeven import Case, Unavailable, Workload
from sparse_attention.breakeven.controls import Control
from sparse_attention.breakeven.proof import Injected
from sparse_attention.patterns import parse

TWICE = (0, 2, 3, 4, 8, 15, 75)  # heads
HEAD_DIM = 128


def injected(name: str, pattern: str, length: int, heads: int) -> Injected:
    """A forward case, and the same with shares of its heads computed twice."""
    args = {"pattern": pattern, "length": length, "heads": heads}
    plain = case(name, share=f"proof {name}", **args)
    slowed = {extra / heads: case(f"{name} +{extra}", share=plain.share, extra=extra, **args) for extra in TWICE}
    return Injected(plain, slowed)


def only(name: str, pattern: str, length: int, heads: int = 16, causal: bool = True) -> Injected:
    """A forward case for false alarms alone."""
    return Injected(case(name, pattern=pattern, length=length, heads=heads, causal=causal), {})


def case(name: str, share: str | None = None, **args) -> Case:
    return Case(name, "perf.proof_cuda:forward", args, share=share)


INJECTED = [
    injected("window1024/4k", "SlidingWindow(1024)", 4 * K, 150),
    injected("window256/4k", "SlidingWindow(256)", 4 * K, 150),
    only("window256/16k", "SlidingWindow(256)", 16 * K),
    only("dilated1024x4/16k", "Dilated(1024, 4)", 16 * K),
    only("strided128/8k", "Strided(128)", 8 * K),
    only("bigbird/8k", "BigBird()", 8 * K, causal=False),
    only("longformer512/8k", "Longformer(512, 4)", 8 * K, causal=False),
]


def forward(pattern: str, length: int, heads: int, extra: int = 0, causal: bool = True) -> Workload:
    """Attention in bfloat16 against the best SDPA that needs no compiling; the first `extra` heads are computed twice."""
    if not torch.cuda.is_available():
        raise Unavailable("needs a CUDA device")
    made = _tensors(heads, length)
    q, k, v = made.seen
    more = [x[:, : heads + extra] for x in made.all]
    chosen = parse(pattern)

    def candidate():
        with torch.no_grad():
            return attention(*more, chosen, impl="tile")[:, :heads]

    return Workload(
        candidate,
        dense(q, k, v, causal),
        check=lambda out: check(out, q, k, v, chosen),
        inputs=(q, k, v),
        refresh=made.draw,
        note=f"{extra} of {heads} heads twice",
    )


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> dict[str, baselines.Call]:
    """SDPA but for the compiled one: compiling takes longer than all else in a block."""
    return {name: call for name, call in baselines.dense(q, k, v, causal=causal).items() if name != baselines.COMPILED}


class _Tensors:
    """q, k and v [1, heads, length, HEAD_DIM], `seen` by the caller, and `all`, with copies of the first half of the heads behind."""

    def __init__(self, heads: int, length: int):
        shape = (1, heads + heads // 2, length, HEAD_DIM)
        self.all = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
        self.seen = tuple(x[:, :heads] for x in self.all)
        self.draw(FIRST_SEED)

    def draw(self, seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        for x, seen in zip(self.all, self.seen):
            seen.normal_(generator=generator)
            x[:, seen.shape[1] :] = seen[:, : x.shape[1] - seen.shape[1]]


_tensors = functools.cache(_Tensors)


FAULTY = shape(16, 4 * K, HEAD_DIM, dtype="bfloat16")
BROKEN = [
    Case("dense", "perf.proof:faulty", {"fault": "dense", **FAULTY}, floor=1.05),
    *(Case(fault, "perf.proof:faulty", {"fault": fault, **FAULTY}) for fault in ("zeros", "yesterday", "cached", "impossible")),
    Case("side-stream", "perf.proof:side_stream", FAULTY),
    case("sound", pattern="SlidingWindow(256)", length=4 * K, heads=16),
]


def gate(name: str) -> tuple[str, ...]:
    return faulty_gate("--cases", name, "--device", "cuda", "--strict", table="perf.proof_cuda:BROKEN")


CONTROLS = [
    Control("the candidate is dense, at floor 1.05", gate("dense"), (10, 11), "dense .*(FAIL|INCONCLUSIVE)"),
    Control("a kernel that returns zeros", gate("zeros"), (1,), "WRONG: AssertionError"),
    Control("a kernel that returns yesterday's output", gate("yesterday"), (1,), "SUSPICIOUS: its output stayed"),
    Control("a kernel that returns its cached tensor", gate("cached"), (1,), "SUSPICIOUS: it returned the memory"),
    Control("a kernel too fast for the machine", gate("impossible"), (1,), "SUSPICIOUS: faster than this machine"),
    Control("a kernel on a side stream", gate("side-stream"), (1,), "SUSPICIOUS: work on another stream"),
    Control("a sound kernel", gate("sound"), (0,), "sound .*PASS"),
    Control("a renamed case", gate("renamed"), (13,), "no case .* matches 'renamed'"),
]
