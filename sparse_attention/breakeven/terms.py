"""Against what cases are raced and judged: their baselines with this machine's floors, or themselves in a base revision."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from . import attribution, ratchet, regression
from .case import Case, NothingToCheck, load_table
from .machine import machine_class
from .regression import Base
from .result import Result, counted
from .store import Run
from .table import LABELS
from .thresholds import NAME, Thresholds, beside, key
from .verdict import ExitCode, exit_code

RESULTS = "results"  # the folder of stored runs beside a table
NO_FILE = "none"  # for --thresholds: the cases' own floors


@dataclass(frozen=True)
class Terms:
    cases: list[Case]
    base: Base | None = None
    unjudged: str = ""  # why nothing is judged on this machine
    allow_unjudged: bool = False
    since: str | None = None  # a stored run, or a folder of them, to say what moved
    asked: bool = True  # for `since`; otherwise it is the folder beside the table, which may hold nothing fitting

    @property
    def labels(self) -> tuple[str, str]:
        return regression.LABELS if self.base else LABELS

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of `Settings` that travel with the run."""
        return {"base": self.base.commit if self.base else None, "unjudged": self.unjudged}

    def remarks(self, run: Run, results: Sequence[Result]) -> list[str]:
        """What moved, and since when; for below the table."""
        if self.base:
            return regression.text(results, self.base.commit).splitlines()
        if self.since is None:
            return []
        then = latest(self.since, run)
        if then is None:
            return [f"{self.since} holds no earlier run of {ratchet.run_key(run)}"] if self.asked else []
        return attribution.remarks(then, run, results)

    def exit_code(self, results: Iterable[Result], strict: bool, allow_not_evaluated: bool) -> ExitCode:
        """As `verdict.exit_code`; what an unknown machine class holds back counts as nothing only where that is allowed."""
        results = counted(results)
        passed_over = self.allow_unjudged and self.unjudged
        left = [r for r in results if not (passed_over and r.reason == self.unjudged)]
        if results and not left:
            return ExitCode.OK
        return exit_code((r.verdict for r in left), strict, allow_not_evaluated)


def terms(
    options: Any, cases: Iterable[Case], threads: int, device: str, table: str = "", prefix: str = "", known: Iterable[str] = ()
) -> Terms:
    """From the options of `add_options`. `table` is where the cases came from: what lies beside it is the default. `known`
    stands in for a table: the ids of all its cases, selected or not.
    """

    def given(name):
        return getattr(options, prefix + name)

    cases = list(cases)
    if given("base"):
        base = Base.of(given("base"), given("package"), given("prepare") or "")
        return Terms(regression.against(cases, base, given("floor") or regression.floor_of(device)), base)
    since, asked = given("since"), given("since") is not None
    path = given("thresholds")
    if table:
        path, since = path or beside(table, NAME), since or beside(table, RESULTS)
    if path is None or os.fspath(path) == NO_FILE:
        return Terms(cases, since=since, asked=asked)
    floors, machine = Thresholds.load(path), key(machine_class(device), threads, device)
    known = [case.id for case in load_table(table)] if table else list(known)
    if known and (lost := floors.without_case(machine, known)):
        whose = table or "the table"
        raise NothingToCheck(f"{path} has floors for {', '.join(lost)}, of which {whose} has no case: rename or remove them there too")
    allowed = given("allow_unknown_class")
    return Terms(floors.applied(cases, machine), None, floors.unjudged(machine), allowed, since, asked)


def add_options(add: Callable[..., Any], prefix: str = "") -> None:
    """Add the options to a parser, of whose argument-adding function this is given."""
    add(f"--{prefix}base", metavar="REV", help="race each case against itself in this git revision, not against its baseline")
    add(f"--{prefix}package", action="append", default=[], metavar="NAME", help="what is taken from REV; default sparse_attention")
    add(f"--{prefix}prepare", metavar="COMMAND", help="build REV with this shell command, run in its unpacked root")
    floors = f"with REV: least speed against it; default {regression.FLOOR}, on a GPU {regression.CUDA_FLOOR}"
    add(f"--{prefix}floor", type=_floor, metavar="SPEEDUP", help=floors)
    add(f"--{prefix}thresholds", metavar="FILE", help="floors by machine class; 'none' for the cases' own")
    unknown = "exit 0 on a machine class without floors, where nothing is judged"
    add(f"--{prefix}allow-unknown-class", action="store_true", help=unknown)
    add(f"--{prefix}since", metavar="RUN", help="a stored run, or a folder of them: say which side moved")


def latest(path: str | os.PathLike, run: Run) -> Run | None:
    """The newest stored run at `path` of the same machine class, threads and clock that is older than `run`."""
    earlier = [
        stored
        for stored in ratchet.load_history([path])
        if ratchet.run_key(stored) == ratchet.run_key(run)
        and not stored.settings.get("base")
        and stored.machine["time"] < run.machine["time"]
        and set(stored.records) & set(run.records)
    ]
    return earlier[-1] if earlier else None


def _floor(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive speedup, got {text!r}")
    return value
