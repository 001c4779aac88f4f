"""Stored runs of one machine class in the order of commits, and the steps in each case's speedup."""

from __future__ import annotations

import json
import math
import os
import statistics as _stdlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..changepoint import find
from ..power import KIND as POWER
from ..power import Power
from ..result import block_logs
from ..statistics import interval
from ..store import Record, Run

LEAST_STEP = 0.02  # smaller steps are not shown: runs of one commit differ by about as much between hours


@dataclass(frozen=True)
class Point:
    """One run of one case: speedup with its 95 % interval over blocks, and median seconds of both sides."""

    commit: str | None
    time: str
    speedup: float
    low: float
    high: float
    candidate_s: float
    baseline_s: float

    @property
    def label(self) -> str:
        return self.commit[:7] if self.commit else self.time[:10]


@dataclass(frozen=True)
class Step:
    """The speedup changed its level: points from `index` on differ from those before. Changes are ratios, after / before."""

    index: int
    point: Point  # the first after the change
    speedup: float
    low: float
    high: float
    candidate: float  # of the seconds
    baseline: float

    @property
    def words(self) -> str:
        return (
            f"{_percent(self.speedup)} [{_percent(self.low)}, {_percent(self.high)}] at {self.point.label}: "
            f"candidate's time {_percent(self.candidate)}, baseline's {_percent(self.baseline)}"
        )


@dataclass(frozen=True)
class Series:
    id: str
    points: tuple[Point, ...]
    steps: tuple[Step, ...]
    floor: float
    open: bool  # the last point is the run at hand, which is not stored


@dataclass
class History:
    """What a folder of results holds; `notes` say what was passed over, and why."""

    runs: list[Run] = field(default_factory=list)
    powers: list[Power] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def before(self, run: Run) -> Run | None:
        """The latest stored run of another commit."""
        others = [r for r in self.runs if _commit(r) != _commit(run) and not r.settings.get("base")]
        return others[-1] if others else None


def read(folder: str | os.PathLike, machine_class: str) -> History:
    """Stored runs of `machine_class` below `folder`, and the newest power curves of each gate, of that class or simulated.

    Other JSON files, such as asv's, are ignored.
    """
    found, powers = History(), {}
    if not Path(folder).is_dir():
        raise ValueError(f"history must be a folder, got {os.fspath(folder)!r}")
    for path in sorted(Path(folder).rglob("*.json")):
        try:
            data = json.loads(path.read_text())
            if not isinstance(data, dict):
                continue
            if data.get("kind") == POWER:
                power = Power.from_dict(data, path.name)
                where, when = (power.machine or {}).get("class"), (power.machine or {}).get("time", "")
                gate = where, json.dumps(power.policy, sort_keys=True)
                if where in (None, machine_class) and when >= powers.get(gate, ("",))[0]:
                    powers[gate] = when, power
            elif {"schema", "machine", "cases"} <= data.keys() and data["machine"].get("class") == machine_class:
                found.runs.append(Run.load(path))
        except (ValueError, AttributeError) as error:
            found.notes.append(f"{path.name} was passed over: {error}")
    found.runs.sort(key=_order)
    found.powers = [power for _, power in powers.values()]
    return found


def series(runs: Iterable[Run], run: Run) -> list[Series]:
    """For each case of `run`, the stored runs that raced the same thing in the same way, and `run` itself if it is not stored.

    Steps are looked for among stored runs: the last point of the series of a pull request is no history yet.
    """
    runs = list(runs)
    is_stored = any(_key(r) == _key(run) for r in runs)
    found = []
    for name, record in run.records.items():
        points = [p for r in runs if (p := _point(r, r.records.get(name), run, record))]
        now = None if is_stored else _point(run, record, run, record)
        found.append(Series(name, (*points, *filter(None, [now])), tuple(steps(points)), record.case.floor, now is not None))
    return found


def steps(points: Sequence[Point]) -> list[Step]:
    """Changes of level in either direction."""
    cuts = find([math.log(p.speedup) for p in points])
    bounds = [0, *(cut.index for cut in cuts), len(points)]
    found = []
    for cut, first, last in zip(cuts, bounds, bounds[2:]):
        then, now = points[first : cut.index], points[cut.index : last]
        if abs(cut.step) < math.log1p(LEAST_STEP):
            continue
        sides = (_change([getattr(p, side) for p in then], [getattr(p, side) for p in now]) for side in _SIDES)
        found.append(Step(cut.index, points[cut.index], *(math.exp(x) for x in (cut.step, cut.low, cut.high)), *sides))
    return found


_SIDES = ("candidate_s", "baseline_s")


def _point(source: Run, record: Record | None, run: Run, wanted: Record) -> Point | None:
    if record is None or _race(source, record) != _race(run, wanted):
        return None
    logs = block_logs(record)
    if len(logs) < 2:
        return None
    found = interval(logs, 0.025)
    valid = [block for block in record.blocks if block.valid]
    medians = (_stdlib.median(_stdlib.median(getattr(b, side)) for b in valid) for side in _SIDES)
    return Point(source.machine.get("commit"), source.machine["time"], found.speedup, found.low, found.high, *medians)


def _race(run: Run, record: Record) -> tuple[Any, ...]:
    case = record.case
    return case.build, dict(case.args), case.limit_s, run.settings.get("threads"), run.settings.get("device")


def _change(then: Sequence[float], now: Sequence[float]) -> float:
    return _stdlib.median(now) / _stdlib.median(then)


def _order(run: Run) -> tuple[str, str]:
    return _utc(run.machine.get("committed") or run.machine["time"]), run.machine["time"]


def _utc(text: str) -> str:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone(timezone.utc).isoformat()


def _commit(run: Run) -> tuple[str | None, bool]:
    return run.machine.get("commit"), bool(run.machine.get("dirty"))


def _key(run: Run) -> tuple[Any, ...]:
    return *_commit(run), run.machine["time"]


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"
