"""Timing live workloads in this process. Nothing here decides anything: it returns times and evidence."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .case import Workload
from .clock import Clock
from .machine import Usage

LEAST_PAIRS, MOST_PAIRS = 2, 20
LEAST_SPEED = 0.75  # of the block's fastest clock
ALIKE = 0.02  # by so much may the clocks of a pair differ, for both sides to have run in the same condition


@dataclass
class Entry:
    """A case inside a block: what is called, and in which group (one baseline, shared) it is timed."""

    id: str
    workload: Workload
    group: str
    baseline: str | None  # name in workload.baselines; None where a fixed limit is the baseline
    limit_s: float | None = None
    allowance_s: float = 0.0


@dataclass(frozen=True)
class GroupPlan:
    """How a group is measured: pairs kept, rounds dropped before them, calls in a row for each member."""

    pairs: int
    warmup: int
    inner: Mapping[str, int]  # entry id, or "" for the baseline

    def as_dict(self) -> dict[str, Any]:
        return {"pairs": self.pairs, "warmup": self.warmup, "inner": dict(self.inner)}


@dataclass
class Samples:
    """One block of one case: seconds a call, and whether the pair was undisturbed."""

    baseline_s: list[float] = field(default_factory=list)
    candidate_s: list[float] = field(default_factory=list)
    clean: list[bool] = field(default_factory=list)
    disturbed: dict[str, int] = field(default_factory=dict)  # pairs by what disturbed them
    figures: dict[str, float] = field(default_factory=dict)  # further ones of the clock, in seconds
    counted_s: list[float] = field(default_factory=list)  # the baseline at the candidate's clock; empty where that changes nothing
    clocks: list[list[float | None]] = field(default_factory=list)  # of baseline and candidate; empty where none was told

    def add(self, pair: Pair, fastest: float) -> None:
        """Keep a pair; `fastest` is the fastest clock of the block."""
        slow = min(pair.speeds, default=fastest) < LEAST_SPEED * fastest
        cause = pair.candidate.disturbed or pair.baseline.disturbed or pair.capped or ("slow clock" if slow else "")
        self.baseline_s.append(pair.baseline.seconds)
        self.counted_s.append(pair.counted_s)
        self.clocks.append([pair.baseline.average, pair.candidate.average])
        self.candidate_s.append(pair.candidate.seconds)
        self.clean.append(not cause)
        if cause:
            self.disturbed[cause] = self.disturbed.get(cause, 0) + 1

    def end(self, figures: dict[str, float]) -> None:
        """No pair follows."""
        self.figures = figures
        self.counted_s = [] if self.counted_s == self.baseline_s else self.counted_s
        self.clocks = self.clocks if any(map(any, self.clocks)) else []


@dataclass(frozen=True)
class Half:
    seconds: float
    disturbed: str = ""  # by what
    speed: float | None = None  # of the device's clock, as read once
    average: float | None = None  # of the device's clock, as counted over the call
    capped: str = ""  # by what the clock was held back, where that could be counted


@dataclass(frozen=True)
class Pair:
    baseline: Half
    candidate: Half

    @property
    def counted_s(self) -> float:
        """The baseline's seconds, as if it had run at the candidate's clock where its own was slower. No call gains more from a faster
        clock than the clocks' ratio, so the speedup is then at most that at equal clock.
        """
        rival, ours = self.baseline.average, self.candidate.average
        if rival is None or ours is None or rival >= (1 - ALIKE) * ours:
            return self.baseline.seconds
        return self.baseline.seconds * rival / ours

    @property
    def speeds(self) -> list[float]:
        """Of the halves where it is known; none where the averages of both are."""
        return [] if self.both_counted else [half.speed for half in (self.baseline, self.candidate) if half.speed is not None]

    @property
    def both_counted(self) -> bool:
        return self.baseline.average is not None and self.candidate.average is not None

    @property
    def capped(self) -> str:
        """What held back a side whose clock was counted, which says nothing while the other's was not. A time limit has no clock."""
        said = "" if self.both_counted or self.baseline.speed is None else self.baseline.capped or self.candidate.capped
        return f"throttled ({said})" if said else ""


def estimate(call: Callable[[], Any], clock: Clock) -> float:
    """Seconds for one call, roughly: repeated until it fills the clock's least half or twenty times are known."""
    seconds = clock.time(call, 1)
    for _ in range(20):
        inner = inner_calls(seconds, clock.least_s)
        if seconds * inner > 10 * clock.least_s:
            break
        seconds = min(seconds, clock.time(call, inner))
    return seconds


def inner_calls(seconds: float, least_s: float) -> int:
    """Calls in a row that make a half of at least about `least_s` seconds."""
    return max(1, min(100_000, round(least_s / max(seconds, 1e-9))))


def plan(
    groups: Mapping[str, Mapping[str, float]], least_s: float, budget_s: float, least_pairs: int = LEAST_PAIRS
) -> dict[str, GroupPlan]:
    """Share `budget_s` over groups of {member: seconds a call}: cheap groups get MOST_PAIRS, dear ones fewer."""
    inner = {g: {m: inner_calls(s, least_s) for m, s in members.items()} for g, members in groups.items()}
    rounds = {g: sum(s * inner[g][m] for m, s in members.items()) for g, members in groups.items()}

    def pairs(group: str, share_s: float) -> tuple[int, int]:
        warmup = 3 if rounds[group] < 0.1 else 1 if rounds[group] < 0.5 else 0
        least = least_pairs if rounds[group] < 1.5 else 1  # seconds; a longer call evens itself out
        return max(least, min(MOST_PAIRS, int(share_s / rounds[group]) - warmup)), warmup

    def cost(share_s: float) -> float:
        return sum(sum(pairs(g, share_s)) * rounds[g] for g in groups)

    low, high = 0.0, max(budget_s, 0.0)
    for _ in range(40 if budget_s > 0 else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= budget_s else (low, middle)
    return {g: GroupPlan(*pairs(g, low), inner[g]) for g in groups}


def planned_seconds(groups: Mapping[str, Mapping[str, float]], plans: Mapping[str, GroupPlan]) -> float:
    total = 0.0
    for group, members in groups.items():
        chosen = plans[group]
        total += (chosen.pairs + chosen.warmup) * sum(s * chosen.inner[m] for m, s in members.items())
    return total


def measure(
    entries: Sequence[Entry],
    plans: Mapping[str, GroupPlan],
    clock: Clock,
    seed: int,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Samples]:
    """One block: groups round-robin, and in each visit the baseline and every candidate once, in random order."""
    order = random.Random(seed)
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.group, []).append(entry)
    for group, members in groups.items():
        if len({tuple(map(id, m.workload.inputs)) for m in members}) > 1:
            raise ValueError(f"cases that share {group!r} must be built over the same input tensors")
        clock.together(list(_calls(members).values()))
    samples = {entry.id: Samples() for entry in entries}
    pairs: dict[str, list[Pair]] = {entry.id: [] for entry in entries}
    rounds = max(plans[g].pairs + plans[g].warmup for g in groups)
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            progress(f"round {turn + 1} of {rounds}")
            for group in order.sample(list(groups), len(groups)):
                chosen = plans[group]
                wanted = chosen.pairs + chosen.warmup
                if (turn + 1) * wanted // rounds == turn * wanted // rounds:
                    continue  # groups of few pairs are spread evenly over the block
                found = visit(groups[group], chosen, clock, order)
                if turn * wanted // rounds >= chosen.warmup:
                    for name, pair in found.items():
                        pairs[name].append(pair)
    finally:
        if was_enabled:
            gc.enable()
    fastest = max((speed for seen in pairs.values() for pair in seen for speed in pair.speeds), default=0.0)
    for entry in entries:
        for pair in pairs[entry.id]:
            samples[entry.id].add(pair, fastest)
        samples[entry.id].end(_figures(entry, clock))
    return samples


def visit(members: Sequence[Entry], chosen: GroupPlan, clock: Clock, order: random.Random) -> dict[str, Pair]:
    """Time the group's baseline and each member once, in random order."""
    calls = _calls(members)
    halves: dict[str, Half] = {}
    for name in order.sample(list(calls), len(calls)):
        clock.rest()
        clock.settle()
        before = Usage.now()
        seconds = clock.time(calls[name], chosen.inner[name])
        contended = Usage.now().since(before).contended
        throttled = clock.throttled()
        cause = "contended" if contended else f"throttled ({throttled})" if throttled else ""
        average = clock.average_speed()
        halves[name] = Half(seconds, cause, clock.speed(), average, "" if average is None else clock.capped())
    return {e.id: Pair(halves.get("", Half(e.limit_s or 0.0)), halves[e.id]) for e in members}


def _calls(members: Sequence[Entry]) -> dict[str, Callable[[], Any]]:
    """What is timed in a visit: the members by their ids, and the baseline as ""."""
    calls = {entry.id: entry.workload.candidate for entry in members}
    first = members[0]
    if first.baseline is not None:
        calls[""] = first.workload.baselines[first.baseline]
    return calls


def _figures(entry: Entry, clock: Clock) -> dict[str, float]:
    calls = _calls([entry])
    sides = {"candidate": calls[entry.id]} | ({"baseline": calls[""]} if "" in calls else {})
    return {f"{side}_{name}": value for side, call in sides.items() for name, value in clock.figures(call).items()}
