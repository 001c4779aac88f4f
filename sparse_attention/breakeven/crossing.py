"""Where a family of races begins to pay: which of its sizes to measure next, and what the measured ones say.

Sizes are measured in two steps. First every `rung`-th one, so that a family that wins, loses and wins again is seen as that;
then the gap below the last win is bisected until its two ends are neighbours or what lies between them is too close to call.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .case import Case
from .verdict import Verdict

WIN, LOSS = Verdict.PASS, Verdict.FAIL


@dataclass(frozen=True)
class Family:
    """Races that differ in one number, a size.

    `build` names a function ("package.module:function") that returns a `Workload`; it takes `args` and the size, which is
    passed as each argument named in `axis`. `sizes` ascend. The candidate is expected to win at "large" ones (lengths) or at
    "small" ones (densities).
    """

    id: str
    build: str
    axis: tuple[str, ...]
    sizes: tuple[float, ...]
    args: Mapping[str, Any] = field(default_factory=dict, hash=False)
    wins_at: Literal["large", "small"] = "large"
    rung: int = 8  # every rung-th size is measured first
    tags: tuple[str, ...] = ()

    def __post_init__(self):
        if len(self.sizes) < 2 or list(self.sizes) != sorted(set(self.sizes)):
            raise ValueError(f"sizes must be two or more ascending numbers, got {self.sizes}")
        if self.wins_at not in ("large", "small"):
            raise ValueError(f"wins_at must be 'large' or 'small', got {self.wins_at!r}")
        if self.rung < 1:
            raise ValueError(f"rung must be at least 1, got {self.rung}")

    @property
    def ordered(self) -> tuple[float, ...]:
        """The sizes, from those where the candidate should lose to those where it should win."""
        return self.sizes if self.wins_at == "large" else self.sizes[::-1]

    def case(self, size: float) -> Case:
        return Case(f"{self.id}/{size:.10g}", self.build, {**self.args, **{name: size for name in self.axis}})


def geometric(first: int, last: int, steps: int = 8) -> tuple[int, ...]:
    """Whole numbers from `first` to `last`, `steps` to a doubling."""
    if not 1 <= first < last or steps < 1:
        raise ValueError(f"first, last and steps must be positive and first less than last, got {first}, {last}, {steps}")
    count = math.ceil(steps * math.log2(last / first))
    return tuple(sorted({min(round(first * 2 ** (n / steps)), last) for n in range(count + 1)}))


@dataclass(frozen=True)
class Probe:
    """What was measured at one size."""

    size: float
    verdict: Verdict  # PASS: it wins, FAIL: it loses, else it could not be told
    speedup: float | None = None
    low: float | None = None
    high: float | None = None
    blocks: int = 0
    reason: str = ""


def wanted(verdicts: Mapping[int, Verdict], count: int, rung: int) -> list[int]:
    """Positions to measure next, of `count` ordered ones, given the final verdicts so far; empty when it is done.

    The rungs come first, then the middle of each gap that is `gaps`.
    """
    first = [position for position in rungs(count, rung) if position not in verdicts]
    return first or [(low + high) // 2 for low, high in gaps(verdicts)]


def rungs(count: int, rung: int) -> list[int]:
    return sorted({0, *range(count - 1, 0, -rung)})


def gaps(verdicts: Mapping[int, Verdict]) -> list[tuple[int, int]]:
    """Neighbouring tried positions with untried ones between them that hold the end of the losses or the begin of the wins."""
    loses, wins = bracket(verdicts)
    tried = sorted(verdicts)
    found = []
    if wins is not None and wins != tried[0]:
        found.append((tried[tried.index(wins) - 1], wins))
    if loses is not None and loses != tried[-1]:
        found.append((loses, tried[tried.index(loses) + 1]))
    return [gap for gap in dict.fromkeys(found) if gap[1] - gap[0] > 1]


def bracket(verdicts: Mapping[int, Verdict]) -> tuple[int | None, int | None]:
    """The last position that loses, and the first from which every tried one wins; None where there is none."""
    wins = None
    for position in sorted(verdicts, reverse=True):
        if verdicts[position] is not WIN:
            break
        wins = position
    losses = [position for position, verdict in verdicts.items() if verdict is LOSS]
    return max(losses, default=None), wins


@dataclass(frozen=True)
class Crossing:
    """The answer for one family. From `wins` on the candidate wins, at `loses` the baseline does, between them neither could
    be told; `estimate` lies between them. Any of them is None where it does not exist or was not found.

    `loses_from`: the baseline wins at every tried size from here to `loses`. `islands`: where else the candidate wins.
    """

    family: str
    outcome: Literal["crosses", "always", "never", "islands", "unknown"]
    loses: float | None
    wins: float | None
    estimate: float | None
    loses_from: float | None
    islands: tuple[tuple[float, float], ...]
    probes: tuple[Probe, ...]  # in ascending size
    unfinished: str = ""  # why the search stopped before its end

    @property
    def interval(self) -> tuple[float | None, float | None]:
        """(low, high): the sizes between which the crossing lies; (None, None) unless both ends are known."""
        if self.loses is None or self.wins is None:
            return None, None
        return min(self.loses, self.wins), max(self.loses, self.wins)

    def as_dict(self) -> dict[str, Any]:
        low, high = self.interval
        data = asdict(self)
        data["probes"] = [{**probe, "verdict": probe["verdict"].value} for probe in data["probes"]]
        return {**data, "low": low, "high": high}


def crossing(
    family: Family, probes: Iterable[Probe], logs: Mapping[float, Sequence[float]], unfinished: str = ""
) -> Crossing:
    """Read the probes of a family; `logs` holds the block log speedups of each size."""
    order = {size: position for position, size in enumerate(family.ordered)}
    by_position = {order[probe.size]: probe for probe in probes}
    verdicts = {position: probe.verdict for position, probe in by_position.items()}
    sizes = family.ordered
    loses, wins = bracket(verdicts)
    run, islands = _losing_run(verdicts, loses), _islands(verdicts, wins)
    if wins is None and loses is None:
        outcome = "islands" if islands else "unknown"
    elif loses is None:
        outcome = "always" if wins == min(verdicts) else "unknown"
    elif wins is None:
        outcome = "islands" if islands else "never" if loses == max(verdicts) else "unknown"
    else:
        outcome = "crosses"
    estimate = None
    if outcome == "crosses":
        between = [sizes[position] for position in sorted(verdicts) if loses <= position <= wins]
        estimate = _root([(size, logs[size]) for size in between if logs.get(size)])
    return Crossing(
        family.id,
        outcome,
        None if loses is None else sizes[loses],
        None if wins is None else sizes[wins],
        estimate,
        None if run is None else sizes[run],
        tuple((sizes[first], sizes[last]) for first, last in islands),
        tuple(sorted(by_position.values(), key=lambda probe: probe.size)),
        unfinished,
    )


def _losing_run(verdicts: Mapping[int, Verdict], loses: int | None) -> int | None:
    """The first position of the unbroken losses that end at `loses`."""
    start = loses
    for position in sorted(verdicts, reverse=True):
        if loses is not None and position <= loses:
            if verdicts[position] is not LOSS:
                break
            start = position
    return start


def _islands(verdicts: Mapping[int, Verdict], wins: int | None) -> list[tuple[int, int]]:
    """(first, last) of each unbroken run of wins other than the one that begins at `wins`."""
    runs: list[list[int]] = []
    previous = None
    for position in sorted(verdicts):
        if verdicts[position] is WIN and (wins is None or position < wins):
            if previous is WIN:
                runs[-1][1] = position
            else:
                runs.append([position, position])
        previous = verdicts[position]
    return [(first, last) for first, last in runs]


def _root(points: Sequence[tuple[float, Sequence[float]]]) -> float:
    """Where the line through (log size, mean log speedup), weighted by blocks, is zero; kept inside the sizes."""
    x = [math.log(size) for size, _ in points]
    y = [sum(logs) / len(logs) for _, logs in points]
    weight = [len(logs) for _, logs in points]
    total = sum(weight)
    x_mean = sum(w * a for w, a in zip(weight, x)) / total
    y_mean = sum(w * b for w, b in zip(weight, y)) / total
    slope_up = sum(w * (a - x_mean) * (b - y_mean) for w, a, b in zip(weight, x, y))
    slope_down = sum(w * (a - x_mean) ** 2 for w, a in zip(weight, x))
    root = x_mean - y_mean * slope_down / slope_up if slope_up else x_mean
    return math.exp(min(max(root, min(x)), max(x)))
