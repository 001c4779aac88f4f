"""The command `ratchet`: propose tighter floors from stored runs, write them, or look for floors that were lowered silently."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import revision
from .case import Case, NothingToCheck, load_table
from .machine import describe
from .ratchet import LEAST_RUNS, MARGIN, diff, load_history, propose, written
from .thresholds import NAME, Thresholds, lowered
from .verdict import ExitCode


def add_command(
    command: Callable[..., Any], parents: list, cases_of: Callable[[Any], list[Case]], fraction: Callable[[str], float]
) -> None:
    """Add it with `command(name, function, parents, text)`; `cases_of(options)` are the cases of the table."""

    def run(options):
        return _ratchet(options, cases_of)

    ratchet = command("ratchet", run, parents, "propose tighter floors from stored runs; nothing is lowered silently")
    ratchet.add_argument("runs", nargs="*", default=["perf/results"], metavar="RUN", help="stored runs, or folders of them")
    ratchet.add_argument("--thresholds", metavar="FILE", help=f"default: {NAME} beside the table")
    ratchet.add_argument("--margin", type=fraction, default=MARGIN, help="below what the next run would show by chance")
    ratchet.add_argument("--least-runs", type=int, default=LEAST_RUNS, metavar="N", help="runs of a class that a floor needs")
    ratchet.add_argument("--write", action="store_true", help="write the file; without it, show the difference")
    ratchet.add_argument("--allow-lower", action="store_true", help="lower floors too that history no longer supports")
    ratchet.add_argument("--reason", default="", help="why they may be lowered; kept in the file")
    ratchet.add_argument("--check", metavar="REV", help="only look for floors lowered since this git revision; exit 1 if there are")


def _ratchet(options, cases_of) -> int:
    if options.allow_lower and not options.reason.strip():
        raise ValueError("reason must say why floors are lowered (--allow-lower --reason TEXT), got ''")
    table = load_table(options.table)
    path = Path(options.thresholds) if options.thresholds else _beside(options.table)
    thresholds = Thresholds.load(path) if path.exists() else Thresholds({}, str(path))
    if options.check:
        return _check(thresholds, path, options.check, options.table, table)
    cases = cases_of(options)
    runs = load_history(options.runs)
    if not runs:
        raise NothingToCheck(f"no stored run in {', '.join(options.runs)}")
    proposals = propose(runs, thresholds, cases, options.margin, options.least_runs)
    if options.json:
        told = [{**vars(found), "lowers": found.lowers} for found in proposals]
        Path(options.json).write_text(json.dumps(told, indent=1))
    lower = [found for found in proposals if found.lowers]
    for found in lower if not options.allow_lower else []:
        print(f"not lowered: {found} (--allow-lower --reason TEXT lowers it)")
    chosen = [found for found in proposals if options.allow_lower or not found.lowers]
    if not chosen:
        print(f"{len(runs)} runs support no tighter floor")
        return ExitCode.OK
    for found in chosen:
        print(found)
    here = describe()
    after = written(thresholds, chosen, time.strftime("%Y-%m-%d"), here["commit"], options.reason)
    print(diff(thresholds, after))
    if options.write:
        after.save(path)
        print(f"wrote {path}")
    else:
        print(f"{path} is as it was: --write changes it")
    return ExitCode.OK


def _check(now: Thresholds, path: Path, name: str, table: str, cases: list[Case]) -> int:
    commit = revision.resolve(name, ".")
    text = revision.read(commit, path)
    own = Thresholds({machine_class: {} for machine_class in now.classes})  # what held before there was a file
    before = own if text is None else Thresholds.parse(text, f"{path} of {name}")
    silent = lowered(before, now, _cases_of(commit, table) or cases, cases)
    for line in silent:
        print(f"lowered silently: {line}")
    if not silent:
        print(f"no floor of {path} was lowered silently since {name}")
    return ExitCode.WRONG if silent else ExitCode.OK


def _cases_of(commit: str, table: str) -> list[Case] | None:
    """The cases of `table` in a revision, listed in a process of its own; None, which is said, where that cannot be done."""
    folder = revision.checkout(commit, ".")
    below = subprocess.run(["git", "rev-parse", "--show-prefix"], capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory() as scratch:
        listed = Path(scratch, "cases.json")
        command = [sys.executable, "-c", _LIST, table, str(listed)]
        done = subprocess.run(command, cwd=folder / below, capture_output=True, text=True)
        if done.returncode == 0:
            return [Case.from_dict(entry) for entry in json.loads(listed.read_text())]
    print(f"{table} of {commit[:10]} cannot be loaded ({_last(done.stderr)}): its cases' own floors are taken to be today's")
    return None


# Of -c, the working folder's modules come before those that are installed: the revision's own.
_LIST = """
import importlib, json, sys
table, listed = sys.argv[1:]
module, _, attribute = table.partition(":")
cases = getattr(importlib.import_module(module), attribute or "CASES")
json.dump([case.as_dict() for case in cases], open(listed, "w"))
"""


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]


def _beside(table: str) -> Path:
    """Where the table's thresholds file is or would be."""
    spec = importlib.util.find_spec(table.partition(":")[0])
    if spec is None or spec.origin is None:
        raise ValueError(f"table must be in a module with a file, got {table!r}")
    return Path(spec.origin).with_name(NAME)
