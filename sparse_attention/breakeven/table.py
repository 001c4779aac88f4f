"""The table of a run, as plain text or markdown."""

from __future__ import annotations

import math
import statistics as _stdlib
from collections.abc import Sequence

from .result import Result, clean_share
from .store import Run
from .verdict import Verdict

LABELS = ("dense", "sparse")


def text(results: Sequence[Result], labels: tuple[str, str] = LABELS, memory: bool = False) -> str:
    """Aligned columns, on demand with peak memory; reasons of everything that did not simply pass follow below."""
    header, rows = _cells(results, labels, memory)
    widths = [max(len(row[c]) for row in [header, *rows]) for c in range(len(header))]

    def line(row):
        cells = [cell.ljust(w) if c in (0, _VERDICT) else cell.rjust(w) for c, (cell, w) in enumerate(zip(row, widths))]
        return "  ".join(cells).rstrip()

    lines = [line(header), *map(line, rows)]
    said: dict[str, list[str]] = {}
    for r in results:
        if r.reason and r.verdict is not Verdict.PASS:
            said.setdefault(f"{r.verdict.value}: {r.reason}", []).append(r.id)
        if r.clock_note:
            said.setdefault(r.clock_note, []).append(r.id)
    notes = [f"{_few(ids)}: {reason}" for reason, ids in said.items()]
    return "\n".join([*lines, *([""] + notes if notes else [])])


def markdown(results: Sequence[Result], labels: tuple[str, str] = LABELS, memory: bool = False) -> str:
    header, rows = _cells(results, labels, memory)
    rule = [":--" if c in (0, _VERDICT) else "--:" for c in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def headline(run: Run, results: Sequence[Result]) -> str:
    """Machine, versions and noise in one line."""
    machine = run.machine
    torch, threads = machine["versions"].get("torch"), run.settings["threads"]
    commit = (machine["commit"] or "no commit")[:10] + ("+changes" if machine["dirty"] else "")
    gpu = machine.get("gpu") or {}
    parts = [machine["class"], *([gpu["name"]] if gpu else []), machine["cpu"], f"{threads} thread{'s' * (threads != 1)}"]
    parts += [f"torch {torch}"] if torch else []
    share = clean_share(run)
    sds = [r.interval.sd for r in results if r.interval and math.isfinite(r.interval.sd)]
    noise = f"clean pairs {100 * share:.0f} %" if share is not None else "nothing timed"
    absent = {entry.get("clock", {}).get("nvml", "read") for entry in run.evidence} - {"read"}
    if absent:
        noise += f", clocks not watched (NVML {min(absent)})"
    if sds:
        noise += f", median block sd {100 * _stdlib.median(sds):.1f} %"
    return f"machine: {', '.join([*parts, commit])}   noise: {noise}"


def tally(results: Sequence[Result]) -> str:
    counts = [(verdict, sum(r.verdict is verdict for r in results)) for verdict in Verdict]
    return ", ".join(f"{count} {verdict.value.lower()}" for verdict, count in counts if count) or "no case"


def seconds(value: float | None) -> str:
    """A time with three significant digits and its unit."""
    if value is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= 0.9995 * size:
            return f"{_three(value / size)} {unit}"
    return f"{_three(value * 1e9)} ns"


def baseline(r: Result) -> str:
    """Its time as measured, with the share of the candidate's clock that it ran at where that is less; or the limit in its place."""
    clock = f" ({100 * r.baseline_clock:.0f} % clock)" if r.baseline_clock is not None else ""
    return f"limit {seconds(r.limit_s)}" if r.limit_s is not None else seconds(r.baseline_s) + clock


def mebibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.1f} MiB"


_VERDICT = 6


def _cells(results: Sequence[Result], labels: tuple[str, str], memory: bool) -> tuple[list[str], list[list[str]]]:
    further = list(dict.fromkeys(name for r in results for name in r.columns or {}))
    header = ["case", *labels, "speedup [interval]", "floor", "detects", "verdict", *(f"vs {name}" for name in further)]
    rows = [_row(r, further) for r in results]
    if memory:
        header += [f"{label} memory" for label in labels]
        rows = [[*row, mebibytes(r.baseline_peak_bytes), mebibytes(r.candidate_peak_bytes)] for row, r in zip(rows, results)]
    return header, rows


def _row(r: Result, further: Sequence[str]) -> list[str]:
    found = r.interval
    speedup = "-"
    if found:
        high = "inf" if math.isinf(found.high) else f"{found.high:.3g}"
        speedup = f"{found.speedup:.3g}x [{found.low:.3g}, {high}]"
    detects = f"{100 * r.detects:.3g} %" if r.detects is not None and math.isfinite(r.detects) else "-"
    cells = [_column(r.columns or {}, name) for name in further]
    return [r.id, baseline(r), seconds(r.candidate_s), speedup, f"{r.floor:.3g}x", detects, r.verdict.value, *cells]


def _column(columns, name: str) -> str:
    if name not in columns:
        return ""
    found = columns[name]
    return "n/a" if "error" in found else f"{found['speedup']:.3g}x"


def _few(ids: Sequence[str]) -> str:
    return ", ".join(ids) if len(ids) <= 3 else f"{', '.join(ids[:3])} and {len(ids) - 3} more"


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
