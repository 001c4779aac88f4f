"""The command `ratchet`: propose tighter floors from stored runs, write them, or look for floors that were lowered silently."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import revision
from .case import Case
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
    cases = cases_of(options)
    path = Path(options.thresholds) if options.thresholds else _beside(options.table)
    thresholds = Thresholds.load(path) if path.exists() else Thresholds({}, str(path))
    if options.check:
        return _check(thresholds, path, options.check)
    runs = load_history(options.runs)
    if not runs:
        raise LookupError(f"no stored run in {', '.join(options.runs)}")
    proposals = propose(runs, thresholds, cases, options.margin, options.least_runs)
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


def _check(now: Thresholds, path: Path, name: str) -> int:
    commit = revision.resolve(name, ".")
    text = revision.read(commit, path)
    before = Thresholds.parse(text, f"{path} of {name}") if text is not None else Thresholds()
    silent = lowered(before, now)
    for line in silent:
        print(f"lowered silently: {line}")
    if not silent:
        print(f"no floor of {path} was lowered silently since {name}")
    return ExitCode.WRONG if silent else ExitCode.OK


def _beside(table: str) -> Path:
    """Where the table's thresholds file is or would be."""
    spec = importlib.util.find_spec(table.partition(":")[0])
    if spec is None or spec.origin is None:
        raise ValueError(f"table must be in a module with a file, got {table!r}")
    return Path(spec.origin).with_name(NAME)
