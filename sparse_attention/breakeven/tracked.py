"""What asv tracks of a run, whether `asv run` measured it or `ingest` brings it from a machine without asv.

asv knows only "lower is better". So a ratio is candidate / baseline time, 1 being break-even, and a crossing is the length from
which the candidate wins or, for a density, one over it.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .case import Case
from .crossing import Family
from .result import block_logs
from .store import Record, Run
from .verdict import LEAST_BLOCKS

THREADS = "BREAKEVEN_THREADS"  # variable of asv's matrix that says on how many threads of a CPU a curve was measured
LEAST_BYTES = 4 << 20  # below, what is seen on a CPU is the allocator
DIGITS = 5  # asv prints floats whole

Figure = float | list[float]  # a list has a sample for each block
Tracked = dict[str, dict[str, Figure]]  # track -> case or family -> figure

_BESIDE = ("eager", "warm")  # figures of a GPU's clock: calls launched one by one, calls in a row without a flush


def figures(record: Record) -> dict[str, Figure]:
    """The figures of one case by name, less those that it has not; none of one that is wrong or was not quiet long enough."""
    blocks = [block for block in record.blocks if block.valid]
    if not record.ready or len(blocks) < LEAST_BLOCKS:
        return {}
    found: dict[str, Figure] = {
        "time_ratio": [math.exp(-log) for log in block_logs(record)],
        "sparse_time": [statistics.median(block.candidate_s) for block in blocks],
    }
    if record.baseline:
        found["dense_time"] = [statistics.median(block.baseline_s) for block in blocks]
    if (record.scout.get("candidate_peak_bytes") or 0) >= LEAST_BYTES:
        found["peak_memory"] = record.scout["candidate_peak_bytes"]
    for name, column in record.columns.items():
        if re.fullmatch(r"dense, \d+ threads", name) and column.get("speedup"):
            found["all_cores_time_ratio"] = 1 / column["speedup"]
    for name in _BESIDE:
        pairs = [(block.figures.get(f"candidate_{name}_s"), block.figures.get(f"baseline_{name}_s")) for block in blocks]
        if all(c and b for c, b in pairs):
            found[f"{name}_time_ratio"] = [c / b / record.scout.get("scale", 1.0) for c, b in pairs]
    return {name: _rounded(figure) for name, figure in found.items()}


def crossing_figure(family: Family, found: Mapping[str, Any]) -> Figure | None:
    """The size from which on the candidate wins, of a `Crossing` as a dict; None where that is not known.

    The ends of its interval stand beside it as samples. Where the candidate wins at every size tried the crossing is at most
    the first of them, where it loses even at the last it is at least that one: these stand for it, so that a crossing which
    leaves the sizes tried still moves the curve.
    """
    sizes = {probe["size"] for probe in found["probes"]}
    tried = [size for size in family.ordered if size in sizes]
    if found["outcome"] == "crosses":
        return _rounded(sorted(_ascending(family, found[key]) for key in ("loses", "estimate", "wins")))
    if found["outcome"] == "always":
        return _rounded(_ascending(family, found["wins"]))
    if tried and found["wins"] is None and found["loses"] == tried[-1]:
        return _rounded(_ascending(family, tried[-1]))
    return None


def known(run: Run, cases: Sequence[Case]) -> set[str]:
    """The ids of a run's cases that are races of this table."""
    races = {case.id: _race(case) for case in cases}
    return {name for name, record in run.records.items() if races.get(name) == _race(record.case)}


def of_cases(run: Run, cases: Sequence[Case]) -> tuple[Tracked, list[str]]:
    """The figures of a run by track and case; and, in words, which cases have none, since only the table's can be told to asv."""
    ids, raced = {case.id for case in cases}, known(run, cases)
    tracked: Tracked = {}
    left: dict[str, list[str]] = {}
    for name, record in run.records.items():
        if name not in ids:
            left.setdefault("not in the table", []).append(name)
        elif name not in raced:
            left.setdefault("another race than the table's of that name", []).append(name)
        elif found := figures(record):
            for figure, value in found.items():
                tracked.setdefault(figure, {})[name] = value
        else:
            left.setdefault("n/a, not measured in quiet or wrong", []).append(name)
    return tracked, [f"{why}: {', '.join(names)}" for why, names in left.items()]


def of_study(run: Run, crossings: Iterable[Mapping[str, Any]], families: Sequence[Family]) -> tuple[Tracked, list[str]]:
    """The crossings of a study, and which have none."""
    known = {family.id: family for family in families}
    tracked: Tracked = {}
    left: dict[str, list[str]] = {}
    for found in crossings:
        name = found["family"]
        family = known.get(name)
        if family is None:
            left.setdefault("not in the table of families", []).append(name)
        elif not all(_same_race(run, family, probe["size"]) for probe in found["probes"]):
            left.setdefault("other races than the family's of that name", []).append(name)
        elif (value := crossing_figure(family, found)) is not None:
            tracked.setdefault("crossing", {})[name] = value
        else:
            left.setdefault("n/a, no crossing found", []).append(name)
    return tracked, [f"{why}: {', '.join(names)}" for why, names in left.items()]


def _same_race(run: Run, family: Family, size: float) -> bool:
    case = family.case(size)
    return size in family.sizes and case.id in run.records and _race(run.records[case.id].case) == _race(case)


def _race(case: Case) -> str:
    """What is timed; floors, tags and columns may change without starting a new history."""
    return json.dumps([case.build, dict(case.args), case.limit_s, case.allowance_s], sort_keys=True)


def for_asv(figure: Figure | None) -> Any:
    """What a `track_` function returns: asv makes its statistics from a dict of samples, and shows NaN as n/a."""
    if isinstance(figure, list):
        return {"samples": figure, "number": 1}
    return math.nan if figure is None else figure


def _ascending(family: Family, size: float) -> float:
    return size if family.wins_at == "large" else 1 / size


def _rounded(figure: Figure) -> Figure:
    if isinstance(figure, list):
        return [_rounded(sample) for sample in figure]
    return float(f"{figure:.{DIGITS}g}") if isinstance(figure, float) else figure
