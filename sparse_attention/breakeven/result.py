"""What a run says about each case: times, speedup, interval and verdict, from stored blocks alone."""

from __future__ import annotations

import math
import statistics as _stdlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .statistics import Interval, block_log_speedup, detectable_slowdown
from .store import Record, Run
from .verdict import JUDGED, Judgement, Policy, Verdict, conclude, judge

ONLY_COUNTED = "below the floor with the rival counted at our clock, not as measured at its own"


@dataclass(frozen=True)
class Result:
    id: str
    verdict: Verdict
    floor: float
    reason: str = ""
    baseline: str | None = None
    baseline_s: float | None = None  # median over blocks of the block medians
    candidate_s: float | None = None
    interval: Interval | None = None
    detects: float | None = None  # slowdown that the judged blocks find with 95 % power
    limit_s: float | None = None
    columns: Mapping[str, Any] | None = None
    candidate_peak_bytes: int | None = None
    baseline_peak_bytes: int | None = None
    baselines: Mapping[str, float] | None = None  # rough seconds of every one that runs here; the first is the default
    figures: Mapping[str, float] | None = None  # further ones of the clock, in seconds: medians over blocks
    not_in_base: bool = False  # raced against another revision, which does not have the case
    counted_s: float | None = None  # what `baseline_s` was counted as, where the baseline's clock was slower

    @property
    def default_baseline(self) -> str | None:
        """What its users would get without asking."""
        return next(iter(self.baselines or {}), None)

    @property
    def speedup_over_default(self) -> float | None:
        """By how much the default was slower than the fastest when both were tried, times the speedup over the fastest."""
        times = self.baselines or {}
        if self.speedup is None or self.baseline not in times or not times[self.baseline]:
            return None
        return self.speedup * times[self.default_baseline] / times[self.baseline]

    @property
    def baseline_clock(self) -> float | None:
        """As a share of the candidate's, where it was slower."""
        return self.counted_s / self.baseline_s if self.counted_s is not None else None

    @property
    def clock_note(self) -> str:
        """What was made of a baseline whose clock was slower."""
        return f"rival at {100 * self.baseline_clock:.0f} % of our clock, counted at ours" if self.baseline_clock else ""

    @property
    def speedup(self) -> float | None:
        return self.interval.speedup if self.interval else None

    def as_dict(self) -> dict[str, Any]:
        found = self.interval
        return {
            "verdict": self.verdict.value,
            "speedup": found and found.speedup,
            "low": found and found.low,
            "high": found and _finite(found.high),
            "floor": self.floor,
            "detects": self.detects and _finite(self.detects),
            "blocks": found and found.blocks,
            "baseline": self.baseline,
            "baselines": dict(self.baselines or {}),
            "default_baseline": self.default_baseline,
            "speedup_over_default": self.speedup_over_default,
            "baseline_s": self.baseline_s,
            "baseline_counted_s": self.counted_s,
            "baseline_clock": self.baseline_clock,
            "clock_note": self.clock_note,
            "candidate_s": self.candidate_s,
            "limit_s": self.limit_s,
            "candidate_peak_bytes": self.candidate_peak_bytes,
            "baseline_peak_bytes": self.baseline_peak_bytes,
            "figures": dict(self.figures or {}),
            "columns": dict(self.columns or {}),
            "reason": self.reason,
        }


def block_logs(record: Record, counted: bool = True) -> list[float]:
    """Log speedup of each valid block: undisturbed pairs only, the case's scale and allowance applied. A baseline whose clock was slower
    counts at the candidate's, unless its times are to be those measured.
    """
    scale, allowance_s = record.scout.get("scale", 1.0), record.case.allowance_s
    logs = []
    for block in record.blocks:
        if block.valid:
            baseline_s, candidate_s = block.clean_pairs(counted)
            net = [max(c - allowance_s, 0.01 * c) for c in candidate_s]
            logs.append(block_log_speedup([scale * b for b in baseline_s], net))
    return logs


def judge_record(record: Record, policy: Policy) -> Judgement:
    return _judged(record, policy, judge)


def _judged(record: Record, policy: Policy, rule: Callable[..., Judgement]) -> Judgement:
    """What is counted at equal clock bounds the speedup from below: it lets a case pass, but fails none that is not below as measured. As
    long as either may still say so, more is measured.
    """
    found = rule(block_logs(record), record.case.floor, policy)
    if not _below(found) or not any(block.counted_s for block in record.blocks):
        return found
    measured = rule(block_logs(record, counted=False), record.case.floor, policy)
    if found.more and measured.verdict is not Verdict.PASS or _below(measured) and not measured.more:
        return found
    if rule is judge and measured.more:
        return replace(found, verdict=measured.verdict, more=measured.more, suspect=measured.suspect, reason=measured.reason)
    return replace(found, verdict=Verdict.NOT_EVALUATED, more=0, suspect=False, reason=ONLY_COUNTED)


def _below(judged: Judgement) -> bool:
    return judged.suspect or judged.verdict is Verdict.FAIL


def result(record: Record, policy: Policy) -> Result:
    """The case's verdict, no more blocks being measured."""
    case = record.case
    status = record.scout.get("status")
    if status == "suspicious":
        return Result(case.id, Verdict.SUSPICIOUS, case.floor, record.scout["reason"])
    if record.error is not None or status == "wrong":
        return Result(case.id, Verdict.WRONG, case.floor, record.error or record.scout["reason"])
    if status != "ok":
        reason = record.scout.get("reason", "never started")
        return Result(case.id, Verdict.NOT_EVALUATED, case.floor, reason, not_in_base=status == "not in base")
    judged = _judged(record, policy, conclude)
    valid = [b for b in record.blocks if b.valid]
    verdict, reason, disturbed = judged.verdict, judged.reason, len(record.blocks) - len(valid)
    if verdict is Verdict.NOT_EVALUATED and disturbed and not judged.suspect and reason != ONLY_COUNTED:
        pairs = [clean for b in record.blocks for clean in b.clean]
        reason = f"{_cause(record)}: {disturbed} of {len(record.blocks)} blocks disturbed, {_share(pairs)} of pairs clean"
    found = judged.interval
    blocks = valid or record.blocks
    baseline_s = _median([b.baseline_s for b in blocks]) if blocks else None
    counted_s = _median([b.counted_s or b.baseline_s for b in blocks]) if blocks else None
    return Result(
        case.id,
        verdict,
        case.floor,
        reason or record.scout.get("note", ""),
        record.baseline,
        baseline_s,
        _median([b.candidate_s for b in blocks]) if blocks else None,
        found,
        detectable_slowdown(found.sd, found.blocks, found.alpha) if found and found.blocks > 1 else None,
        case.limit_s,
        record.columns,
        record.scout.get("candidate_peak_bytes"),
        (record.scout.get("baseline_peak_bytes") or {}).get(record.baseline),
        record.scout.get("baselines"),
        {name: _stdlib.median(b.figures[name] for b in blocks) for name in _common([b.figures for b in blocks])},
        counted_s=counted_s if counted_s != baseline_s else None,
    )


def results(run: Run, policy: Policy) -> list[Result]:
    """Every case's verdict; where the run may not be judged, its figures without one."""
    found = [result(record, policy) for record in run.records.values()]
    reason = run.settings.get("unjudged")
    return [replace(r, verdict=Verdict.NOT_EVALUATED, reason=reason) if reason and r.verdict in JUDGED else r for r in found]


def counted(results: Iterable[Result]) -> list[Result]:
    """Those that an exit code depends on: cases that are new since the base revision do not count beside others that were judged."""
    results = list(results)
    judged = any(r.verdict in JUDGED for r in results)
    return [r for r in results if not (judged and r.not_in_base)]


def clean_share(run: Run) -> float | None:
    """Share of all pairs that nothing disturbed."""
    pairs = [clean for r in run.records.values() for b in r.blocks for clean in b.clean]
    return sum(pairs) / len(pairs) if pairs else None


def _cause(record: Record) -> str:
    """What disturbed most pairs."""
    counts = Counter({"contended": 0})
    for block in record.blocks:
        counts.update(block.disturbed)
    return max(counts, key=counts.get)


def _median(blocks: list[list[float]]) -> float:
    """Over blocks, of their medians."""
    return _stdlib.median(_stdlib.median(seconds) for seconds in blocks)


def _common(mappings: list[Mapping[str, float]]) -> list[str]:
    """Names that all have."""
    return [name for name in (mappings[0] if mappings else ()) if all(name in m for m in mappings)]


def _share(flags: list[bool]) -> str:
    return f"{100 * sum(flags) / max(len(flags), 1):.0f} %"


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
