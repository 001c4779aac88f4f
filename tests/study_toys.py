"""Families whose break-even point is known, and processes that only say what they would have measured."""

from __future__ import annotations

import random
from collections.abc import Callable

from sparse_attention.breakeven import Case, Workload
from sparse_attention.breakeven.crossing import Family, geometric
from sparse_attention.breakeven.study import Published
from tests import breakeven_toys as toys

TRUTH = 400 / 3  # positions at which `growing` breaks even


def growing(size: float, fault: str = "", factor: float = 1.0) -> Workload:
    """n / 100 ms against 1 ms + n / 400 ms."""
    made = toys.doubling(fast=factor * (1e-3 + size / 400e3), slow=size / 100e3, fault=fault)
    return Workload(made.candidate, {"plain": made.baselines["plain"]}, made.check, made.inputs)


def family(name: str = "growing", sizes: tuple[float, ...] = geometric(16, 1024), wins_at: str = "large", **args) -> Family:
    return Family(name, "tests.study_toys:growing", ("size",), sizes, args, wins_at)


FAMILIES = [family(), family("slow", factor=50.0, sizes=geometric(16, 64))]
PUBLISHED = [
    Published(
        "paper/200",
        {"theirs": "1.07x"},
        tuple(Case(f"paper/200/{f}", "tests.study_toys:growing", {"size": 200, "factor": f}) for f in (1.0, 2.0)),
    )
]


class FakeProcesses:
    """Stands in for `run_worker`: a block is a draw around `log_speedup(case)`, with its own error in each process.

    `seconds(case)` -> (candidate, baseline) is told exactly but for noise between pairs. `disturbed` cases have no clean pair.
    """

    def __init__(self, seconds: Callable[[Case], tuple[float, float]], sd: float = 0.03, seed: int = 0, disturbed=()):
        self.seconds, self.sd, self.random, self.disturbed = seconds, sd, random.Random(seed), set(disturbed)
        self.started = []

    def __call__(self, kind, cases, *, plans=None, **fields):
        self.started.append((kind, [case.id for case in cases]))
        if kind == "scout":
            return {case.id: self._scout(case) for case in cases}
        samples = {case.id: self._samples(case, plans[case.share or case.id]["pairs"]) for case in cases}
        return {"samples": samples, "errors": {}, "evidence": {"ready_s": 0.0, "measured_s": 0.0}}

    def _scout(self, case):
        candidate_s, baseline_s = self.seconds(case)
        return {"status": "ok", "ready_s": 0.0, "candidate_s": candidate_s, "baselines": {"dense": baseline_s}}

    def _samples(self, case, pairs):
        candidate_s, baseline_s = self.seconds(case)
        candidate_s *= self.random.lognormvariate(0, self.sd)
        noisy = [self.random.lognormvariate(0, 0.01) for _ in range(pairs)]
        clean = [case.id not in self.disturbed] * pairs
        return {"baseline_s": [baseline_s] * pairs, "candidate_s": [candidate_s * x for x in noisy], "clean": clean}
