"""Which side moved: when a speedup differs between a stored run and a later one, was it the kernel, the baseline or the machine?

Both sides are measured against the anchor that was timed in their own block, so that a machine that is slower as a whole moves
neither. A side can only be blamed if something about it differs: a kernel has another commit (or uncommitted changes, or was
built against another torch), a baseline another torch or is another backend. Whatever moves without that is the machine's.
"""

from __future__ import annotations

import json
import math
import statistics as _stdlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from .anchor import KINDS
from .result import Result, block_logs
from .statistics import t_quantile
from .store import Record, Run
from .verdict import Verdict

LEAST = 0.02  # what moves less than this has not moved: runs of one commit differ by about as much between hours
ALPHA = 0.005  # error probability on each side


@dataclass(frozen=True)
class Move:
    """A change of the logarithm of a time, with its interval over the blocks of both runs."""

    log: float
    low: float
    high: float

    @property
    def moved(self) -> bool:
        return abs(self.log) >= math.log1p(LEAST) and not self.low <= 0.0 <= self.high

    def __str__(self) -> str:
        if not self.moved:
            return f"unchanged ({100 * math.expm1(self.log):+.1f} %)"
        change = math.expm1(self.log)
        edges = sorted((100 * math.expm1(self.low), 100 * math.expm1(self.high)))
        return f"{100 * abs(change):.1f} % {'slower' if change > 0 else 'faster'} [{edges[0]:+.1f}, {edges[1]:+.1f}]"


@dataclass(frozen=True)
class Attribution:
    """What moved in one case. `side` is "kernel", "baseline", "kernel and baseline", "machine", "unclear", or "" for nothing."""

    id: str
    side: str
    speedup: Move  # of the logarithm of the speedup: positive is better
    kernel: Move  # against the anchor, where one was timed in both runs
    baseline: Move | None
    machine: dict[str, Move] = field(default_factory=dict)  # by kind of anchor
    evidence: str = ""

    def __str__(self) -> str:
        change = f"{100 * abs(math.expm1(self.speedup.log)):.1f} % {'higher' if self.speedup.log > 0 else 'lower'}"
        sides = [f"kernel {self.kernel}"] + [f"baseline {self.baseline}"] * (self.baseline is not None)
        sides += [f"machine ({kind}) {found}" for kind, found in self.machine.items()] or ["machine not anchored"]
        return f"{self.id}: {self.side or 'nothing'} moved: speedup {change}; {', '.join(sides)}; {self.evidence}"


def move(then: Sequence[float], now: Sequence[float], alpha: float = ALPHA) -> Move:
    """The difference of two means of block logarithms, with Welch's interval; unbounded for fewer than two blocks a run."""
    change = _stdlib.fmean(now) - _stdlib.fmean(then)
    if min(len(then), len(now)) < 2:
        return Move(change, -math.inf, math.inf)
    a, b = (_stdlib.variance(x) / len(x) for x in (then, now))
    if a + b == 0:
        return Move(change, change, change)
    df = (a + b) ** 2 / (a * a / (len(then) - 1) + b * b / (len(now) - 1))
    half = t_quantile(1 - alpha, max(df, 1.0)) * math.sqrt(a + b)
    return Move(change, change - half, change + half)


def attribute(then: Run, now: Run, case_id: str) -> Attribution | None:
    """What moved in a case between two runs; None where either has no valid block of it, or they raced different things."""
    old, new = then.records.get(case_id), now.records.get(case_id)
    if old is None or new is None or not _same_race(then, now, old, new):
        return None
    logs = block_logs(old), block_logs(new)
    if not all(logs):
        return None
    kinds = _anchor_kinds(then, now)
    runs = ((then, old), (now, new))
    kernel = move(*(_side(run, record, "candidate_s", kinds) for run, record in runs))
    rival = None
    if old.case.limit_s is None:
        rival = move(*(_side(run, record, "baseline_s", kinds) for run, record in runs))
    machine = {kind: move(*(_anchor_logs(run, record, kind) for run, record in runs)) for kind in kinds}
    speedup, facts = move(*logs), _facts(then, now, old, new)
    side = _side_that_moved(kernel, rival, machine, facts) if speedup.moved else ""
    return Attribution(case_id, side, speedup, kernel, rival, machine, str(facts))


def remarks(then: Run, now: Run, results: Sequence[Result]) -> list[str]:
    """A line for each case whose speedup moved, and for each that fails though it did not."""
    if _class(then) != _class(now):
        return [f"{_class(then)} then, {_class(now)} now: speedups of two machine classes are not compared"]
    lines = []
    for result in results:
        found = attribute(then, now, result.id)
        if found is None:
            lines += [f"{result.id}: nothing to compare with in the earlier run"] * (result.verdict is Verdict.FAIL)
        elif found.side:
            lines.append(str(found))
        elif result.verdict is Verdict.FAIL:
            lines.append(f"{result.id}: below its floor, but its speedup did not move since {then.machine.get('time')}")
    return lines


@dataclass(frozen=True)
class _Facts:
    """What differs on record between two runs; "" for what does not."""

    processor: str
    commit: str
    backend: str
    versions: str

    def __str__(self) -> str:
        known = [text for text in (self.processor, self.commit, self.backend, self.versions) if text]
        return ", ".join(known) or "same processor, commit and versions"


def _facts(then: Run, now: Run, old: Record, new: Record) -> _Facts:
    a, b = then.machine, now.machine
    commits = [(m["commit"] or "unknown")[:10] for m in (a, b)]
    commit = f"commit {commits[0]} -> {commits[1]}" if commits[0] != commits[1] or a["commit"] is None else ""
    if not commit and (a["dirty"] or b["dirty"]):
        commit = "uncommitted changes"
    backends = [" or ".join(sorted({str(block.baseline) for block in record.blocks})) for record in (old, new)]
    versions = [f"{n} {a['versions'].get(n)} -> {b['versions'].get(n)}" for n in ("torch", "numpy")]
    return _Facts(
        f"{a['cpu']} -> {b['cpu']}" if a["cpu"] != b["cpu"] else "",
        commit,
        f"{backends[0]} -> {backends[1]}" if backends[0] != backends[1] else "",
        ", ".join(text for n, text in zip(("torch", "numpy"), versions) if a["versions"].get(n) != b["versions"].get(n)),
    )


def _side_that_moved(kernel: Move, baseline: Move | None, machine: dict[str, Move], facts: _Facts) -> str:
    rival = baseline is not None and baseline.moved
    kernel_may, baseline_may = bool(facts.commit or facts.versions), bool(facts.backend or facts.versions)
    shaken = bool(facts.processor) or any(found.moved for found in machine.values())
    if facts.processor:
        return "machine"
    if kernel.moved and rival:
        if kernel_may and baseline_may and machine and not shaken:
            return "kernel and baseline"
        return "machine" if shaken else "unclear"
    if kernel.moved:
        return "kernel" if kernel_may else "machine"
    if rival:
        return "baseline" if baseline_may else "machine"
    return "machine" if shaken else "unclear"


def _side(run: Run, record: Record, side: str, kinds: Sequence[str]) -> list[float]:
    """Log of the median seconds of each valid block, over its compute anchor's where there is one."""
    logs = []
    for block in record.blocks:
        if block.valid:
            clean = [s for s, ok in zip(getattr(block, side), block.clean) if ok]
            logs.append(math.log(_stdlib.median(clean)))
            if "compute" in kinds:
                logs[-1] -= math.log(run.evidence[block.number]["anchor"]["compute"])
    return logs


def _anchor_logs(run: Run, record: Record, kind: str) -> list[float]:
    return [math.log(run.evidence[b.number]["anchor"][kind]) for b in record.blocks if b.valid]


def _anchor_kinds(then: Run, now: Run) -> list[str]:
    """Kinds of anchor that every block of both runs has; none when they are not the same work."""
    seen = [entry.get("anchor") or {} for run in (then, now) for entry in run.evidence]
    if len({anchor.get("source") for anchor in seen}) != 1:
        return []
    return [kind for kind in KINDS if all(kind in anchor for anchor in seen)]


def _same_race(then: Run, now: Run, old: Record, new: Record) -> bool:
    def terms(run, record):
        args = json.dumps(dict(record.case.args), sort_keys=True)
        return record.case.build, args, record.case.limit_s, run.settings["threads"], run.settings["device"]

    return terms(then, old) == terms(now, new)


def _class(run: Run) -> str:
    return run.machine["class"]
