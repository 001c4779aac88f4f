"""Error rates of a gate on real kernels: gates drawn again and again from many blocks that were measured once.

Every drawn gate takes whole blocks. "shuffled" gates draw theirs from the whole session, as if each came at another time;
"in order" gates take blocks that follow each other, as real gates do, so that what lasts for minutes falls on all of one gate's
blocks alike. The floor of both is the mean speedup of the blocks that they do not judge. Such a floor is uncertain itself, which
adds alarms. "repeated" gates draw with replacement, and their floor is the mean of all blocks: the truth that they sample.
"""

from __future__ import annotations

import math
import random
import statistics as _stdlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .statistics import clopper_pearson
from .verdict import Policy, Sequential, TwoStage, Verdict, judge

Order = Literal["shuffled", "in order", "repeated"]
ORDERS: tuple[Order, ...] = ("shuffled", "in order", "repeated")

POLICIES: Mapping[str, Policy] = {
    "two-stage": TwoStage(),  # pull requests
    "two-stage, 0.01 %": TwoStage(second_alpha=0.0001),
    "sequential": Sequential(),  # nightly
    "10 blocks": Sequential(looks=(10,), alpha=0.01),
}


@dataclass(frozen=True)
class Rate:
    """Of `runs` gates `caught` said FAIL; the bounds hold 95 % of the time."""

    runs: int
    caught: int
    low: float
    high: float

    @property
    def share(self) -> float:
        return self.caught / self.runs

    def __str__(self) -> str:
        return f"{_percent(self.share)} [{_percent(self.low)}, {_percent(self.high)}]"


def blocks_needed(policy: Policy) -> int:
    """Blocks of a gate that goes to the end."""
    return policy.first + policy.second if isinstance(policy, TwoStage) else policy.looks[-1]


def rate(
    judged: Sequence[float],
    truth: Sequence[float],
    policy: Policy,
    runs: int,
    rng: random.Random,
    order: Order = "shuffled",
    below: float = 0.0,
    floor: float | None = None,
) -> Rate:
    """How often gates over the blocks `judged` (log speedups) fail.

    The floor of each is the speedup of blocks of `truth`, which has a value for each block of `judged`, less the share `below`;
    unless `floor` is given. Bounds are the wider of Clopper and Pearson's for this many draws and of two standard
    errors by leaving out a tenth of the session at a time, which tells how far the blocks themselves decide.
    """
    needed = blocks_needed(policy)
    if len(judged) != len(truth) or len(judged) < needed + 2:
        counts = f"{len(judged)} and {len(truth)}"
        raise ValueError(f"judged and truth must have equally many blocks, {needed + 2} or more, got {counts}")
    caught = _caught(judged, truth, policy, runs, rng, order, below, floor)
    low, high = clopper_pearson(caught, runs)
    spread = 2 * _standard_error(judged, truth, policy, runs, rng, order, below, floor)
    return Rate(runs, caught, max(min(low, caught / runs - spread), 0.0), min(max(high, caught / runs + spread), 1.0))


def disjoint(judged: Sequence[float], truth: Sequence[float], policy: Policy, floor: float | None = None) -> Rate:
    """Only gates that share no judged block: few, but independent."""
    needed = blocks_needed(policy)
    starts = range(0, len(judged) - needed + 1, needed)
    caught = sum(_fails(judged, truth, range(s, s + needed), policy, 0.0, floor) for s in starts)
    return Rate(len(starts), caught, *clopper_pearson(caught, len(starts)))


def pooled(rates: Iterable[Rate]) -> Rate:
    """Several cases as one; exact bounds, so for rates whose gates are independent."""
    rates = list(rates)
    runs, caught = sum(r.runs for r in rates), sum(r.caught for r in rates)
    return Rate(runs, caught, *clopper_pearson(caught, runs))


def mean_rate(rates: Sequence[Rate]) -> Rate:
    """Several cases as one: their mean, with bounds from those of each."""
    share = _stdlib.fmean(r.share for r in rates)
    below = math.sqrt(sum((r.share - r.low) ** 2 for r in rates)) / len(rates)
    above = math.sqrt(sum((r.high - r.share) ** 2 for r in rates)) / len(rates)
    return Rate(sum(r.runs for r in rates), sum(r.caught for r in rates), max(share - below, 0.0), min(share + above, 1.0))


def suite_alarm(rate: Rate, cases: int = 50) -> tuple[float, float, float]:
    """Probability, with its bounds, that a suite of so many independent cases fails at least once."""
    return tuple(1 - (1 - p) ** cases for p in (rate.share, rate.low, rate.high))


def suites(
    pools: Sequence[Sequence[float]],
    policy: Policy,
    runs: int,
    rng: random.Random,
    order: Order = "shuffled",
    below: float = 0.0,
    cases: int = 50,
) -> Rate:
    """Suites of `cases` gates drawn from these cases in turn, every one with its floor at its true speedup less `below`."""
    turns = [pools[n % len(pools)] for n in range(cases)]
    failed = sum(any(_caught(pool, pool, policy, 1, rng, order, below, None) for pool in turns) for _ in range(runs))
    return Rate(runs, failed, *clopper_pearson(failed, runs))


def _caught(judged, truth, policy, runs, rng, order, below, floor) -> int:
    needed, count, caught = blocks_needed(policy), len(judged), 0
    if order == "repeated" and floor is None:
        floor = math.exp(_stdlib.fmean(truth)) * (1 - below)
    for _ in range(runs):
        if order == "in order":
            start = rng.randrange(count)
            chosen = [(start + k) % count for k in range(needed)]
        else:
            chosen = rng.choices(range(count), k=needed) if order == "repeated" else rng.sample(range(count), needed)
        caught += _fails(judged, truth, chosen, policy, below, floor)
    return caught


def _fails(judged, truth, chosen, policy, below, floor) -> bool:
    if floor is None:
        kept = sum(truth) - sum(truth[i] for i in chosen)
        floor = math.exp(kept / (len(truth) - len(chosen))) * (1 - below)
    return judge([judged[i] for i in chosen], floor, policy).verdict is Verdict.FAIL


def _standard_error(judged, truth, policy, runs, rng, order, below, floor, groups: int = 10) -> float:
    """Delete-a-group jackknife over tenths of the session that follow each other."""
    shares, count = [], len(judged)
    for group in range(groups):
        kept = [i for i in range(count) if not group * count <= i * groups < (group + 1) * count]
        if len(kept) < blocks_needed(policy) + 2:
            return math.inf
        part = [[values[i] for i in kept] for values in (judged, truth)]
        shares.append(_caught(*part, policy, runs, rng, order, below, floor) / runs)
    mean = _stdlib.fmean(shares)
    drawn = mean * (1 - mean) / runs  # what the draws alone contribute
    return math.sqrt(max((groups - 1) * (_stdlib.fmean((s - mean) ** 2 for s in shares) - drawn), 0.0))


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
