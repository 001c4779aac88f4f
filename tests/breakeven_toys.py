"""Workloads for the harness's own tests: they take no time, but say to a clock of their own how much they took."""

from __future__ import annotations

import os
import random
import sys
import time

import numpy as np

from sparse_attention.breakeven import Case, Unavailable, Workload
from sparse_attention.breakeven.case import NotInBase
from sparse_attention.breakeven.clock import Clock

DEVICE = "tests.breakeven_toys:ToldClock"


class ToldClock(Clock):
    """Reads the seconds that workloads add to `now`."""

    least_s = 1e-3
    on_threads = True
    now = 0.0

    def time(self, call, inner):
        start = ToldClock.now
        for _ in range(inner):
            call()
        return (ToldClock.now - start) / inner

    def settle(self):
        pass


def take(seconds: float, spread: float = 0.01) -> None:
    ToldClock.now += seconds * random.lognormvariate(0, spread)


def doubling(fast: float = 1e-3, slow: float = 3e-3, fault: str = "", factor: float = 2.0) -> Workload:
    """y = 2 x in `fast` seconds, against the same in `slow`. `fault` says what is wrong with it."""
    x = np.arange(8.0)
    kept = []

    def candidate():
        take(fast)
        if fault == "zeros":
            return np.zeros(8)
        if fault == "yesterday":
            kept.append(factor * x)
            return kept[0].copy()
        if fault == "cached":
            kept.append(factor * x)
            return kept[0]
        if fault == "later":
            kept.append(None)
            return factor * x + (len(kept) > 15)
        if fault == "raises":
            raise RuntimeError("no such kernel image")
        if fault == "hangs":
            time.sleep(600)
        if fault == "dies":
            os._exit(3)
        return factor * x

    def baseline():
        take(slow)
        return 2.0 * x

    def check(out):
        np.testing.assert_allclose(out, 2.0 * x)

    def rival():
        take(2 * fast)
        return 2.0 * x

    return Workload(
        candidate,
        {"plain": baseline, "worse": lambda: take(2 * slow)},
        check,
        inputs=[x],
        columns={"rival": lambda: rival, "wrong": lambda: lambda: np.zeros(8)},
    )


def working(flops: float) -> Workload:
    """`doubling` that says how much it must do."""
    workload = doubling()
    workload.work = {"flops": flops}
    return workload


_shared: list[np.ndarray] = []


def shared(fast: float) -> Workload:
    """Like `doubling`, over one array for all."""
    if not _shared:
        _shared.append(np.arange(8.0))
    workload = doubling(fast)
    workload.inputs, workload.check = _shared, None
    return workload


_drawn = np.random.default_rng(7).standard_normal(64)


def drawn() -> Workload:
    """Over one array for all, of which a seed says all there is."""

    def refresh(seed):
        _drawn[:] = np.random.default_rng(seed).standard_normal(64)

    def call():
        take(1e-3)
        return 2 * _drawn

    return Workload(call, {"plain": call}, lambda y: np.testing.assert_allclose(y, 2 * _drawn), [_drawn], refresh)


def light() -> Workload:
    """Wrong in a process that has loaded torch or the package above the harness."""
    heavy = {"torch", "sparse_attention"} & set(sys.modules)

    def check(out):
        assert not heavy, f"{heavy} were imported"

    return Workload(lambda: take(1e-3), {"plain": lambda: take(2e-3)}, check)


def nowhere() -> Workload:
    raise Unavailable("needs a device that is not here")


def cold(first: float = 25e-3, then: float = 20e-3, other: float = 22e-3) -> Workload:
    """A baseline whose first calls are slower than its rival's, and later ones faster."""
    workload, calls = doubling(), []

    def warming():
        calls.append(None)
        take(first if len(calls) < 3 else then, 0.0)
        return 2.0 * workload.inputs[0]

    def steady():
        take(other, 0.0)
        return 2.0 * workload.inputs[0]

    workload.baselines = {"warming": warming, "steady": steady, "slow": lambda: take(2 * other)}
    return workload


def hanging_later(scouted: str) -> Workload:
    """Hangs as soon as the file `scouted` exists."""
    return doubling(fault="hangs" if os.path.exists(scouted) else "")


def newer() -> Workload:
    raise NotInBase("not in the base: base abc")


def case(name: str, floor: float = 1.0, limit_s: float | None = None, tags=(), columns=(), **args) -> Case:
    return Case(name, "tests.breakeven_toys:doubling", args, floor, tuple(tags), limit_s=limit_s, columns=tuple(columns))


CASES = [
    case("quick", columns=("rival", "wrong")),
    case("par", slow=1e-3, floor=1.05),
    case("limited", limit_s=4e-3, tags=("small",)),
    case("largest", tags=("full",)),
]
