"""A case as a row: the words of its cells, for the page and for markdown alike."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..result import Result
from ..table import baseline, mebibytes, seconds
from ..verdict import Verdict
from .content import Row


@dataclass(frozen=True)
class Bar:
    """Places on the axis that the rows of a table share, in percent of its width."""

    low: float
    width: float
    value: float
    floor: float


@dataclass(frozen=True)
class Cells:
    id: str
    speedup: str
    floor: str
    detects: str
    times: str  # of the baseline, of the candidate
    memory: str  # likewise, peak bytes
    verdict: str
    remarks: tuple[str, ...]
    bar: Bar | None


def cells(rows: Iterable[Row], axis: tuple[float, float]) -> list[Cells]:
    return [_cells(row, axis) for row in rows]


def axis(rows: Iterable[Row]) -> tuple[float, float]:
    """Logarithms of the least and the largest speedup or floor among `rows`, with some room."""
    found = [(r.result.interval, r.result.floor) for r in rows if r.result.interval and r.result.interval.blocks > 1]
    values = [x for interval, floor in found for x in (interval.low, interval.high, floor)]
    low, high = (math.log(min(values)), math.log(max(values))) if values else (0.0, 0.0)
    room = max(0.03 * (high - low), 0.01)
    return low - room, high + room


def _cells(row: Row, axis: tuple[float, float]) -> Cells:
    found = row.result
    seen = found.interval
    speedup, bar = "-", None
    if seen is not None:
        certain = seen.blocks > 1
        speedup = f"{seen.speedup:.2f}x [{seen.low:.2f}, {seen.high:.2f}]" if certain else f"{seen.speedup:.2f}x in one block"
        if certain:
            low, high, value, floor = (_place(x, axis) for x in (seen.low, seen.high, seen.speedup, found.floor))
            bar = Bar(low, round(high - low, 2), value, floor)
    detects = f"{100 * found.detects:.2g} %" if found.detects is not None and math.isfinite(found.detects) else ""
    times = f"{baseline(found)}, {seconds(found.candidate_s)}" if found.candidate_s is not None else ""
    floor = f"{found.floor:.3g}x"
    return Cells(found.id, speedup, floor, detects, times, _memory(found), found.verdict.value, _remarks(row), bar)


def _remarks(row: Row) -> tuple[str, ...]:
    found = row.result
    lines = [row.remark] if row.remark else []
    if row.change:
        lines.append(change(row))
    if found.reason and found.verdict is not Verdict.PASS and not row.unjudged:
        lines.append(found.reason)
    if found.clock_note:
        lines.append(found.clock_note)
    return tuple(lines)


def change(row: Row) -> str:
    """Which way the speedup moved, and which side did it."""
    moved = row.change
    before = math.exp(-moved.speedup.log) * row.result.speedup
    sides = [f"kernel {moved.kernel}"] + ([f"baseline {moved.baseline}"] if moved.baseline else [])
    sides += [f"machine's {kind} {seen}" for kind, seen in moved.machine.items() if seen.moved]
    who = {"": "nothing alone", "unclear": "unclear what"}.get(moved.side, moved.side)
    return f"was {before:.2f}x, {100 * math.expm1(moved.speedup.log):+.1f} %: {who} moved: {', '.join(sides)}"


def _memory(found: Result) -> str:
    if found.baseline_peak_bytes is None and found.candidate_peak_bytes is None:
        return ""
    return f"{mebibytes(found.baseline_peak_bytes)}, {mebibytes(found.candidate_peak_bytes)}"


def _place(speedup: float, axis: tuple[float, float]) -> float:
    low, high = axis
    return round(100 * (math.log(speedup) - low) / (high - low), 2)
