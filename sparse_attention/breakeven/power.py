"""How often a gate found slowdowns of known size: the file that `selftest` and the proofs on real kernels write.

{"kind": "power", "schema": 1, "machine": {...} or null, "policy": {...},
 "points": [{"curve": "bursts", "slowdown": 0.05, "runs": 400, "caught": 371, "low": 0.897, "high": 0.951}, ...]}

`curve` names what was slowed down: a kind of noise, or a case. Slowdown 0 is the true ratio on the floor: what is caught there
is a false alarm. `low` and `high` are the Clopper-Pearson interval of caught / runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .statistics import clopper_pearson

KIND, SCHEMA = "power", 1


@dataclass(frozen=True)
class PowerPoint:
    curve: str
    slowdown: float
    runs: int
    caught: int
    low: float
    high: float

    @classmethod
    def of(cls, curve: str, slowdown: float, runs: int, caught: int, confidence: float = 0.95) -> PowerPoint:
        return cls(curve, slowdown, runs, caught, *clopper_pearson(caught, runs, confidence))

    @property
    def share(self) -> float:
        return self.caught / self.runs


@dataclass(frozen=True)
class Power:
    points: tuple[PowerPoint, ...]
    machine: Mapping[str, Any] | None = None  # None for simulated noise
    policy: Mapping[str, Any] = field(default_factory=dict)

    def curves(self) -> dict[str, list[PowerPoint]]:
        """Points of each curve in ascending slowdown."""
        found: dict[str, list[PowerPoint]] = {}
        for point in sorted(self.points, key=lambda p: p.slowdown):
            found.setdefault(point.curve, []).append(point)
        return found

    def save(self, path: str | os.PathLike) -> None:
        with open(path, "w") as f:
            json.dump({"kind": KIND, "schema": SCHEMA, **asdict(self)}, f, indent=1)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Power:
        with open(path) as f:
            return cls.from_dict(json.load(f), os.fspath(path))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], name: str = "the file") -> Power:
        try:
            if (data["kind"], data["schema"]) != (KIND, SCHEMA):
                raise ValueError(f"kind and schema must be {KIND!r} and {SCHEMA}, got {data['kind']!r} and {data['schema']!r}")
            return cls(tuple(PowerPoint(**point) for point in _some(data["points"])), data["machine"], data["policy"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{name} is not a stored power curve: {error!r}") from error


def _some(points: Iterable[Any]) -> list[Any]:
    found = list(points)
    if not found:
        raise ValueError("points must not be empty")
    return found
