"""The tables that collected tests take their cases from: what pytest did not collect or deselects is in them all the same."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from .case import Case, NothingToCheck
from .thresholds import NAME, Thresholds


@dataclass(frozen=True)
class Tables:
    ids: frozenset[str] = frozenset()  # of all their cases
    floors: tuple[Path, ...] = ()  # the files of floors beside them

    def require_cases(self, key: str) -> None:
        """NothingToCheck where a file beside a table has a floor for this machine whose case is gone."""
        for path in self.floors:
            if lost := Thresholds.load(path).without_case(key, self.ids):
                raise NothingToCheck(f"{path} has floors for {', '.join(lost)}, of which its table has no case: rename them there too")


def tables_of(modules: Iterable[ModuleType], cases: Iterable[Case]) -> Tables:
    """The lists in these modules of tests that hold any of the collected `cases`."""
    raced = {id(case) for case in cases}
    held = [x for module in modules for x in vars(module).values() if isinstance(x, (list, tuple)) and any(id(c) in raced for c in x)]
    lists = {id(x): x for x in held}
    homes = [module for module in [*sys.modules.values()] if _holds(module, lists)]
    floors = {Path(module.__file__).with_name(NAME) for module in homes}
    ids = {case.id for found in lists.values() for case in found if isinstance(case, Case)}
    return Tables(frozenset(ids), tuple(sorted(path for path in floors if path.exists())))


def _holds(module: ModuleType, lists: dict[int, object]) -> bool:
    if not isinstance(getattr(module, "__file__", None), str):
        return False
    return any(id(x) in lists for x in [*vars(module).values()])
