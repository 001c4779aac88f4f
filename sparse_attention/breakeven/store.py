"""A run on disk: JSON with the raw times of every block, enough to judge again or to go on measuring."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .case import Case, select

SCHEMA = 1


@dataclass
class Block:
    """One fresh process's pairs of one case, in seconds a call."""

    number: int
    baseline: str | None  # which baseline was timed; None where a time limit stands in
    baseline_s: list[float]
    candidate_s: list[float]
    clean: list[bool]
    disturbed: dict[str, int] = field(default_factory=dict)  # pairs by what disturbed them
    figures: dict[str, float] = field(default_factory=dict)  # further ones of the clock, in seconds
    counted_s: list[float] = field(default_factory=list)  # the baseline at the candidate's clock; empty where that changes nothing
    clocks: list[list[float | None]] = field(default_factory=list)  # of baseline and candidate; empty where none was told

    @property
    def valid(self) -> bool:
        """At least half of the pairs, and one, were undisturbed."""
        return sum(self.clean) >= max(1, len(self.clean) / 2)

    def clean_pairs(self, counted: bool = True) -> tuple[list[float], list[float]]:
        """Times of both sides; the baseline's at the candidate's clock unless they are to be those measured."""
        baseline_s = self.counted_s if counted and self.counted_s else self.baseline_s
        kept = [(b, c) for b, c, clean in zip(baseline_s, self.candidate_s, self.clean) if clean]
        return [b for b, _ in kept], [c for _, c in kept]


@dataclass
class Record:
    """Everything known about one case."""

    case: Case
    scout: dict[str, Any] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: str | None = None

    @property
    def ready(self) -> bool:
        """It was scouted and can be timed."""
        return self.scout.get("status") == "ok" and self.error is None

    @property
    def baseline(self) -> str | None:
        """The fastest baseline found by the scout; None where a time limit stands in."""
        times = self.scout.get("baselines") or {}
        return min(times, key=times.get) if times else None


@dataclass
class Run:
    machine: dict[str, Any]
    settings: dict[str, Any]
    records: dict[str, Record]
    evidence: list[dict[str, Any]] = field(default_factory=list)  # one entry a block: switches, steal, load
    elapsed_s: float = 0.0

    def only(self, patterns: Iterable[str]) -> Run:
        """With the cases alone whose id or a tag matches a shell pattern (all, without patterns); NothingToCheck as `select`."""
        chosen = select([record.case for record in self.records.values()], patterns, "full")
        return replace(self, records={case.id: self.records[case.id] for case in chosen})

    def save(self, path: str | os.PathLike) -> None:
        write_json(path, self.as_dict())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Run:
        try:
            with open(path) as f:
                return cls.from_dict(json.load(f))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)} is not a stored run: {error!r}") from error

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "machine": self.machine,
            "settings": self.settings,
            "elapsed_s": self.elapsed_s,
            "evidence": self.evidence,
            "cases": [asdict(record) for record in self.records.values()],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Run:
        """KeyError, TypeError or ValueError for what is no run."""
        if data["schema"] != SCHEMA:
            raise ValueError(f"it has schema {data['schema']!r}, this version reads {SCHEMA}")
        records = [
            Record(
                Case.from_dict(entry["case"]),
                entry["scout"],
                [Block(**block) for block in entry["blocks"]],
                entry["columns"],
                entry["error"],
            )
            for entry in data["cases"]
        ]
        return cls(
            data["machine"],
            data["settings"],
            {record.case.id: record for record in records},
            data["evidence"],
            data["elapsed_s"],
        )


def write_json(path: str | os.PathLike, data: Any) -> None:
    """All of it or nothing, so that what is killed meanwhile can be gone on with from the file."""
    partial = f"{os.fspath(path)}.partial"
    with open(partial, "w") as f:
        json.dump(data, f, indent=1)
    os.replace(partial, path)
