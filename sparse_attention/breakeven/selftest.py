"""The verdict code against noise whose truth is known: how often it cries wolf, and what it misses."""

from __future__ import annotations

import fnmatch
import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .case import NothingToCheck
from .progress import duration
from .statistics import block_log_speedup, clopper_pearson
from .verdict import LEAST_BLOCKS, Policy, TwoStage, Verdict, judge, surely_passes

PAIRS = 20
BASE_S = 10e-3
SPEEDUP = 3.0

Noise = Callable[[random.Random, int, int], tuple[float, float]]  # of generator, block, pair -> two factors of time


def _independent(rng, block, pair):
    return rng.lognormvariate(0, 0.05), rng.lognormvariate(0, 0.05)


def _autocorrelated():
    state = [0.0, 0.0]

    def draw(rng, block, pair):
        for side in (0, 1):
            state[side] = 0.9 * state[side] + rng.gauss(0, 0.02)
        return math.exp(state[0]), math.exp(state[1])

    return draw


def _bursts(rng, block, pair):
    busy = rng.random() < 0.2
    return tuple(f * (rng.uniform(1, 2.5) if busy and rng.random() < 0.7 else 1) for f in _independent(rng, block, pair))


def _drift(rng, block, pair):
    slower = 1 + 0.02 * block
    return tuple(f * slower for f in _independent(rng, block, pair))


def _quantised(rng, block, pair):
    # a slice of 8 ms lost now and then, by the longer half more often
    lost = (8e-3 / BASE_S * (rng.random() < 0.3), 8e-3 * SPEEDUP / BASE_S * (rng.random() < 0.1))
    return tuple(f + extra for f, extra in zip(_independent(rng, block, pair), lost))


def _plain_block(rng):
    return rng.gauss(0, 0.035)


def _two_modes(rng):
    return rng.choice((-0.03, 0.03)) + rng.gauss(0, 0.01)


# name -> (maker of pair noise, what a fresh process adds to the log ratio)
NOISES: dict[str, tuple[Callable[[], Noise], Callable[[random.Random], float]]] = {
    "independent": (lambda: _independent, _plain_block),
    "autocorrelated": (_autocorrelated, _plain_block),
    "bursts": (lambda: _bursts, _plain_block),
    "drift": (lambda: _drift, _plain_block),
    "bimodal": (lambda: _independent, _two_modes),
    "8 ms slices": (lambda: _quantised, _plain_block),
}


@dataclass(frozen=True)
class Rate:
    """How often FAIL and PASS came out, of `runs` gates whose candidate was `slowdown` slower than the floor allows. stops: how many
    would have been left at three blocks or a few more, as sure to pass.
    """

    noise: str
    slowdown: float
    fails: int
    runs: int
    passes: int = 0
    stops: int = 0

    @property
    def bounds(self) -> tuple[float, float]:
        return clopper_pearson(self.fails, self.runs)


def chosen(patterns: Iterable[str]) -> list[str]:
    """The kinds of noise that any shell pattern matches (all, without patterns); NothingToCheck for one that matches none."""
    for pattern in (patterns := list(patterns)):
        if not fnmatch.filter(NOISES, pattern):
            raise NothingToCheck(f"no noise matches {pattern!r}: there are {', '.join(NOISES)}")
    return [name for name in NOISES if not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def operating_characteristics(
    policy: Policy = TwoStage(),
    slowdowns: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2),
    runs: int = 400,
    seed: int = 0,
    noises: Iterable[str] = tuple(NOISES),
    tell: Callable[[str], None] = lambda text: None,
) -> list[Rate]:
    """Simulate gates for these kinds of noise; at slowdown 0 the floor is the true ratio, where alarms are likeliest."""
    rng = random.Random(seed)
    rates, start, asked = [], time.perf_counter(), [(name, slowdown) for name in noises for slowdown in slowdowns]
    for name in noises:
        make, block_noise = NOISES[name]
        truth = _true_log_speedup(make, rng)
        for slowdown in slowdowns:
            left_s = (time.perf_counter() - start) / max(len(rates), 1) * (len(asked) - len(rates))
            tell(f"{name}, {slowdown:.0%} slower" + (f", {duration(left_s)} left" if rates else ""))
            floor = math.exp(truth) * (1 + slowdown)
            gates = [_gate(make, block_noise, floor, policy, rng) for _ in range(runs)]
            said = [verdict for verdict, _ in gates]
            stops = sum(stopped for _, stopped in gates)
            rates.append(Rate(name, slowdown, said.count(Verdict.FAIL), runs, said.count(Verdict.PASS), stops))
    return rates


def verdicts(rates: list[Rate], most_alarms: float = 0.01, least_power: float = 0.9, most_passes: float = 0.01) -> list[str]:
    """What is out of bounds: more alarms than `most_alarms` at the floor, 20 % slowdowns missed, or slowdowns of 5 % and more that
    passed, or were sure to pass, more often than `most_passes`; empty when sound.
    """
    out = []
    for rate in rates:
        low, high = rate.bounds
        share = rate.fails / rate.runs
        if rate.slowdown == 0 and low > most_alarms:
            out.append(f"{rate.noise}: false alarms {share:.3f}, at most {most_alarms} wanted")
        if rate.slowdown >= 0.2 and high < least_power:
            out.append(f"{rate.noise}: {rate.slowdown:.0%} slower is found in {share:.3f} of runs, {least_power} wanted")
        for what, count in (("passes", rate.passes), ("is sure to pass", rate.stops)):
            if rate.slowdown >= 0.05 and clopper_pearson(count, rate.runs)[0] > most_passes:
                out.append(f"{rate.noise}: {rate.slowdown:.0%} slower {what} in {count / rate.runs:.3f} of runs, at most {most_passes} wanted")
    return out


def report(rates: list[Rate]) -> str:
    slowdowns = sorted({r.slowdown for r in rates})
    by_noise: dict[str, list[Rate]] = {}
    for rate in rates:
        by_noise.setdefault(rate.noise, []).append(rate)
    lines = []
    for what, count in (("FAIL", "fails"), ("PASS", "passes"), (f"PASS early", "stops")):
        lines.append(f"{what} rate [95 % interval]".ljust(34) + "".join(f"{f'{s:.0%} slower':>22}" for s in slowdowns))
        for noise, row in by_noise.items():
            cells = []
            for rate in sorted(row, key=lambda r: r.slowdown):
                low, high = clopper_pearson(getattr(rate, count), rate.runs)
                cells.append(f"{getattr(rate, count) / rate.runs:.3f} [{low:.3f}, {high:.3f}]".rjust(22))
            lines.append(noise.ljust(34) + "".join(cells))
    return "\n".join(lines)


def _gate(make, block_noise, floor, policy, rng) -> tuple[Verdict, bool]:
    """The verdict, and whether the first blocks were sure to pass."""
    logs: list[float] = []
    more = policy.blocks
    noise = make()
    while more:
        for _ in range(more):
            logs.append(_block(noise, block_noise(rng), len(logs), rng))
        judged = judge(logs, floor, policy)
        more = judged.more
    looks = range(LEAST_BLOCKS, max(policy.blocks, LEAST_BLOCKS + 1))
    return judged.verdict, any(surely_passes(logs[:n], floor) for n in looks)


def _block(noise, shift, number, rng) -> float:
    factors = [noise(rng, number, pair) for pair in range(PAIRS)]
    baseline_s = [BASE_S * f for f, _ in factors]
    candidate_s = [BASE_S / SPEEDUP * math.exp(-shift) * g for _, g in factors]
    return block_log_speedup(baseline_s, candidate_s)


def _true_log_speedup(make, rng, blocks: int = 600) -> float:
    noise = make()
    return sum(_block(noise, 0.0, 0, rng) for _ in range(blocks)) / blocks
