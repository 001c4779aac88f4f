"""Tighter floors from history: what runs of this machine class have shown, less what the next one may lose by chance."""

from __future__ import annotations

import difflib
import math
import os
import statistics as _stdlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .case import Case
from .result import block_logs
from .statistics import t_quantile
from .store import Run
from .thresholds import Thresholds, key

LEAST_RUNS = 3
LEAST_BLOCKS = 5
NEWEST = 30  # runs of a class that are looked at
MARGIN = 0.05  # on top of chance
ALPHA = 0.01  # that the next run of an unchanged kernel lies below its floor, before the margin
LEAST_STEP = 0.01  # smaller changes of a floor are not worth a diff


@dataclass(frozen=True)
class Proposal:
    key: str
    case: str
    current: float
    floor: float
    runs: int
    typical: float  # geometric mean speedup of those runs

    @property
    def lowers(self) -> bool:
        return self.floor < self.current

    def __str__(self) -> str:
        return f"{self.key}: {self.case}: {self.current:.3g}x -> {self.floor:.3g}x ({self.runs} runs at {self.typical:.3g}x)"


def load_history(paths: Iterable[str | os.PathLike]) -> list[Run]:
    """Stored runs in these files and, recursively, folders, oldest first. Other JSON in the folders is passed over."""
    runs = []
    for path in map(Path, paths):
        if not path.is_dir():
            runs.append(Run.load(path))
            continue
        for file in sorted(path.rglob("*.json")):
            try:
                runs.append(Run.load(file))
            except ValueError:
                continue
    return sorted(runs, key=lambda run: run.machine.get("time") or "")


def run_key(run: Run) -> str:
    return key(run.machine["class"], run.settings["threads"], run.settings["device"])


def propose(
    runs: Sequence[Run], thresholds: Thresholds, cases: Iterable[Case], margin: float = MARGIN, least_runs: int = LEAST_RUNS
) -> list[Proposal]:
    """Floors that history supports and that differ from today's by LEAST_STEP or more, lower ones included."""
    if least_runs < 2 or not 0 <= margin < 1:
        raise ValueError(f"least_runs must be 2 or more and margin lie in [0, 1), got {least_runs} and {margin}")
    history: dict[tuple[str, str], list[list[float]]] = {}
    for run in runs:
        if run.settings.get("base"):
            continue  # a race against another revision, not against the baseline
        for name, record in run.records.items():
            logs = block_logs(record) if record.ready else []
            if len(logs) >= LEAST_BLOCKS:
                history.setdefault((run_key(run), name), []).append(logs)
    own = {case.id: case for case in cases}
    proposals = []
    for (machine, name), found in sorted(history.items()):
        found = _of_today(found[-NEWEST:])
        if name not in own or len(found) < least_runs:
            continue
        current, floor = thresholds.floor(machine, own[name]), supported(found, margin)
        if abs(math.log(floor / current)) >= LEAST_STEP:
            typical = math.exp(_stdlib.fmean(_stdlib.fmean(logs) for logs in found))
            proposals.append(Proposal(machine, name, current, floor, len(found), typical))
    return proposals


def supported(runs: Sequence[Sequence[float]], margin: float = MARGIN) -> float:
    """A speedup that the next run of the same kernel reaches: lower prediction bound of its mean, less the margin.

    `runs` are the block log speedups of earlier runs. Runs differ by more than their blocks let one expect.
    """
    means = [_stdlib.fmean(logs) for logs in runs]
    within = _stdlib.fmean(_stdlib.variance(logs) / len(logs) for logs in runs)
    spread = math.sqrt(max(_stdlib.variance(means), within))
    bound = _stdlib.fmean(means) - t_quantile(1 - ALPHA, len(means) - 1) * spread * math.sqrt(1 + 1 / len(means))
    return _rounded_down(math.exp(bound) * (1 - margin))


def written(thresholds: Thresholds, proposals: Iterable[Proposal], date: str, commit: str | None, reason: str = "") -> Thresholds:
    """The file with these floors. Lowering one takes a reason, which is kept beside what the floor was."""
    classes = {name: dict(entries) for name, entries in thresholds.classes.items()}
    for found in proposals:
        if found.lowers and not reason.strip():
            step = f"from {found.current:.3g} to {found.floor:.3g}"
            raise ValueError(f"reason must say why {found.case} is lowered {step}, got {reason!r}")
        entry = {"floor": found.floor, "date": date, "commit": (commit or "unknown")[:10]}
        if found.lowers:
            entry |= {"was": found.current, "reason": reason.strip()}
        else:
            entry["reason"] = f"ratchet: {found.runs} runs at {found.typical:.3g}x"
        entries = classes.setdefault(found.key, {})
        entries.pop(found.case, None)  # to the end, where it holds over patterns
        entries[found.case] = entry
    return Thresholds(classes, thresholds.path)


def diff(before: Thresholds, after: Thresholds) -> str:
    lines = difflib.unified_diff(
        before.text().splitlines(), after.text().splitlines(), before.path, after.path, lineterm="", n=1
    )
    return "\n".join(lines)


def _of_today(runs: list[list[float]]) -> list[list[float]]:
    """The runs since the last step of the history."""
    from .changepoint import find  # imports numpy, which no command that only measures needs

    steps = find([_stdlib.fmean(logs) for logs in runs])
    return runs[steps[-1].index :] if steps else runs


def _rounded_down(x: float) -> float:
    digits = 2 - math.floor(math.log10(x))
    return math.floor(x * 10**digits) / 10**digits
