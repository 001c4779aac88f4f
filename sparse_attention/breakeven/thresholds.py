"""Floors by machine class, kept in one readable file; a speedup is a property of a kernel and of a machine.

    {
      "cpu/zen4/2c/1t": {
        "window256/*": {"floor": 12.5, "date": "2026-01-31", "commit": "0123456789", "reason": "..."}
      }
    }

Keys are shell patterns on the machine class (with the number of threads behind a slash, see `key`) and on case ids; of those
that match, the last one holds. A case without an entry keeps its own floor. On a class that no key matches nothing is judged.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .case import Case

NAME = "thresholds.json"  # looked for beside the table of cases

Entry = Mapping[str, Any]  # floor, date, commit, reason; `was` where a floor was lowered


@dataclass(frozen=True)
class Thresholds:
    classes: Mapping[str, Mapping[str, Entry]] = field(default_factory=dict)
    path: str = ""

    @classmethod
    def load(cls, path: str | os.PathLike) -> Thresholds:
        """Read the file; ValueError naming what is wrong with it."""
        with open(path) as f:
            return cls.parse(f.read(), os.fspath(path))

    @classmethod
    def parse(cls, text: str, path: str) -> Thresholds:
        try:
            classes = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(classes, dict) or not all(isinstance(entries, dict) for entries in classes.values()):
            raise ValueError(f"{path} must hold an object of machine classes, each an object of case ids")
        for name, entries in classes.items():
            for pattern, entry in entries.items():
                floor = entry.get("floor") if isinstance(entry, dict) else None
                if isinstance(floor, bool) or not isinstance(floor, (int, float)) or not 0 < floor < math.inf:
                    raise ValueError(f"{path}: {name}: {pattern}: floor must be a positive speedup, got {floor!r}")
        return cls(classes, path)

    def text(self) -> str:
        """The file: a line for each floor, so that a diff shows what changed."""
        blocks = []
        for name, entries in self.classes.items():
            lines = [f"    {json.dumps(pattern)}: {json.dumps(dict(entry))}" for pattern, entry in entries.items()]
            blocks.append(f"  {json.dumps(name)}: {{" + ("\n" + ",\n".join(lines) + "\n  }" if lines else "}"))
        return "{\n" + ",\n".join(blocks) + "\n}\n" if blocks else "{}\n"

    def save(self, path: str | os.PathLike) -> None:
        partial = f"{os.fspath(path)}.partial"
        with open(partial, "w") as f:
            f.write(self.text())
        os.replace(partial, path)

    def knows(self, key: str) -> bool:
        """Whether the file has something to say about this machine, be it that the cases' own floors hold."""
        return any(_matches(key, pattern) for pattern in self.classes)

    def entry(self, key: str, case_id: str) -> Entry | None:
        found = None
        for name, entries in self.classes.items():
            if _matches(key, name):
                for pattern, entry in entries.items():
                    if fnmatch.fnmatchcase(case_id, pattern):
                        found = entry
        return found

    def floor(self, key: str, case: Case) -> float:
        entry = self.entry(key, case.id)
        return case.floor if entry is None else float(entry["floor"])

    def without_case(self, key: str, ids: Iterable[str]) -> list[str]:
        """Ids that have a floor on this machine but are no case's, such as after a rename; patterns and ids of tests are passed
        over.
        """
        known = set(ids)
        named = [id for name, entries in self.classes.items() if _matches(key, name) for id in entries if not set(id) & set("*?[")]
        return [id for id in dict.fromkeys(named) if id not in known and "::" not in id]

    def applied(self, cases: Iterable[Case], key: str) -> list[Case]:
        """The cases with this machine's floors."""
        return [replace(case, floor=self.floor(key, case)) for case in cases]

    def unjudged(self, key: str) -> str:
        """Why nothing is judged on this machine; "" where it is."""
        if self.knows(key):
            return ""
        return f"reported, not judged: {self.path or 'the thresholds file'} has no floors for machine class {key}"


def key(machine_class: str, threads: int, device: str = "cpu") -> str:
    """What floors are kept by: the class and, as ratios depend on it, the threads of a CPU or the clock of a GPU."""
    if not machine_class.startswith("cuda/"):
        return f"{machine_class}/{threads}t"
    return f"{machine_class}/graph" if device == "cuda-graph" else machine_class


def beside(table: str, name: str) -> Path | None:
    """The file or folder `name` beside the module of `table` ("module:name"), if there is one."""
    spec = importlib.util.find_spec(table.partition(":")[0])
    path = Path(spec.origin).with_name(name) if spec is not None and spec.origin else None
    return path if path is not None and path.exists() else None


def lowered(before: Thresholds, after: Thresholds, cases_before: Iterable[Case], cases: Iterable[Case]) -> list[str]:
    """Floors that `after` lowers, for any class of either file and any case, without saying why and what they were; and classes
    that are judged no more. What counts is the floor that holds, whichever pattern or own floor of a case it comes from.
    """
    old = {case.id: case for case in cases_before}
    pairs = [(old[case.id], case) for case in cases if case.id in old]
    out = []
    for name in dict.fromkeys([*before.classes, *after.classes]):
        if not before.knows(name):
            continue
        if not after.knows(name):
            out.append(f"{name}: nothing is judged there any more")
            continue
        for was, case in pairs:
            then, now, entry = before.floor(name, was), after.floor(name, case), after.entry(name, case.id) or {}
            if now < then and (entry.get("was") != then or not entry.get("reason")):
                out.append(f"{name}: {case.id}: {then:g} became {now:g} without a reason and what it was")
    return out


def _matches(key: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(key, pattern) or fnmatch.fnmatchcase(key.rpartition("/")[0], pattern)
