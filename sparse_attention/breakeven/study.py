"""Finding break-even sizes: rounds of fresh processes, each with a block of every size that is still open in any family."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .case import Case
from .crossing import Crossing, Family, Probe, crossing, gaps, wanted
from .progress import Progress
from .race import Race, Settings, require_same
from .result import Result, block_logs, judge_record, result
from .store import Record, Run
from .verdict import Sequential, Verdict

# Each size is judged after 3, 5 and 8 blocks; at break-even it is called a win or a loss at most 5 % of the time each.
POLICY = Sequential(looks=(3, 5, 8), alpha=0.05)


Scouted = dict[str, Any]


def scouted(candidate_s: float, baselines_s: Mapping[str, float]) -> Scouted:
    """What a scout would say of a case whose times are known."""
    return {"status": "ok", "ready_s": 0.0, "candidate_s": candidate_s, "baselines": dict(baselines_s)}


@dataclass(frozen=True)
class Published:
    """A row of a table that was printed elsewhere, with cases to measure beside it: rival candidates, one baseline."""

    id: str
    figures: Mapping[str, str]  # column -> what was printed
    cases: tuple[Case, ...]
    tags: tuple[str, ...] = ()


class Study(Race):
    """One search over `families`, with the cases of `published` in the same processes.

    Which sizes are measured follows from the blocks measured so far, so a stored study goes on where it stopped.
    A block is a fresh process because sizes are judged by the spread between processes, which one process cannot show;
    all open sizes share it, so its start is paid once a round.

    `foresee`, where a case's times are known beforehand, gives what a scout would say (see `scouted`): then no process is spent
    on scouting. Every block checks outputs all the same.
    """

    def __init__(
        self,
        families: Iterable[Family],
        settings: Settings,
        progress: Progress,
        save: Callable[[Run], None] = lambda run: None,
        resume: Run | None = None,
        published: Iterable[Published] = (),
        foresee: Callable[[Case], Scouted] | None = None,
    ):
        self.families, self.published, self._foresee = list(families), list(published), foresee
        super().__init__([case for row in self.published for case in row.cases], settings, progress, save)
        self._unfinished = ""
        if resume is not None:
            self._take_over(resume)

    def execute(self) -> Run:
        """Measure until every size is decided or the time is used; returns the run."""
        while records := self._open():
            if any(not r.scout for r in self.run.records.values()):
                self.scout()
                continue
            chosen = self._fitting(records)
            if not chosen:
                self._unfinished = "out of time"
                break
            self._block(chosen, self.left_s / self._rounds_left())
        self._keep()
        return self.run

    def scout(self) -> None:
        if self._foresee is None:
            super().scout()
        for record in self.run.records.values():
            record.scout = record.scout or self._foresee(record.case)

    def crossings(self) -> list[Crossing]:
        return [self._crossing(family) for family in self.families]

    def results(self) -> list[tuple[Published, list[Result]]]:
        """Each published row with its cases' results."""
        found = []
        for row in self.published:
            records = [self.run.records[case.id] for case in row.cases]
            found.append((row, [result(record, self.settings.policy) for record in records]))
        return found

    def _crossing(self, family: Family) -> Crossing:
        records = {size: record for size in family.sizes if (record := self._record(family, size)) and record.scout}
        probes = [p for size, record in records.items() if (p := _probe(size, record, self.settings.policy))]
        open_ = wanted(self._verdicts(family), len(family.sizes), family.rung)
        logs = {size: block_logs(record) for size, record in records.items()}
        return crossing(family, probes, logs, self._unfinished if open_ else "")

    def _open(self) -> list[Record]:
        """Records that want another block; those that the next step may ask for are added, so as to be scouted together."""
        found = [r for row in self.published for c in row.cases if self._verdict(r := self.run.records[c.id]) is None]
        for family in self.families:
            verdicts, count = self._verdicts(family), len(family.sizes)
            ahead = [p for low, high in gaps(verdicts) if high - low <= 16 for p in range(low + 1, high)]
            now = wanted(verdicts, count, family.rung)
            for position in {*ahead, *now} if now else ():
                case = family.case(family.ordered[position])
                self.run.records.setdefault(case.id, Record(case))
            found += [self._record(family, family.ordered[position]) for position in now]
        return found

    def _fitting(self, records: list[Record]) -> list[Record]:
        """Those that fit into the time left, the cheap ones first."""
        chosen: list[Record] = []
        for record in sorted(records, key=lambda r: self.planned([r], 0.0)[1]):
            if self.planned([*chosen, record], 0.0)[1] > self.left_s:
                break
            chosen.append(record)
        return chosen

    def _rounds_left(self) -> int:
        """About how many more rounds there will be."""
        looks = self.settings.policy.looks
        rounds = looks[0]
        for family in self.families:
            spans = [math.ceil(math.log2(high - low)) for low, high in gaps(self._verdicts(family))]
            unseen = not spans and wanted(self._verdicts(family), len(family.sizes), family.rung)
            levels = math.ceil(math.log2(family.rung)) + 1 if unseen else max(spans, default=0)
            rounds = max(rounds, levels * looks[0])
        return rounds

    def _verdicts(self, family: Family) -> dict[int, Verdict]:
        """Final verdicts, by position in the family's order."""
        found = {}
        for position, size in enumerate(family.ordered):
            record = self._record(family, size)
            verdict = record and self._verdict(record)
            if verdict is not None:
                found[position] = verdict
        return found

    def _verdict(self, record: Record) -> Verdict | None:
        """The final verdict of a size, or None while more blocks may change it."""
        if not record.scout:
            return None
        if not record.ready:
            return result(record, self.settings.policy).verdict
        judged = judge_record(record, self.settings.policy)
        if not judged.more:
            return judged.verdict
        invalid = sum(not block.valid for block in record.blocks)
        given_up = invalid >= (3 if invalid == len(record.blocks) else self.settings.policy.looks[-1])
        return Verdict.NOT_EVALUATED if given_up else None

    def _record(self, family: Family, size: float) -> Record | None:
        return self.run.records.get(family.case(size).id)

    def _take_over(self, resume: Run) -> None:
        require_same(resume, self.run)
        known = {case.id: case for case in [family.case(s) for family in self.families for s in family.sizes]}
        known.update({case.id: case for row in self.published for case in row.cases})
        for name, record in resume.records.items():
            if name not in known or record.case != known[name] or dict(record.case.args) != dict(known[name].args):
                raise ValueError(f"resume: {name!r} of the stored run is not a size of the families selected now")
            self.run.records[name] = record
        self.run.evidence = resume.evidence


def _probe(size: float, record: Record, policy: Sequential) -> Probe | None:
    """None where nothing was asked of the size beyond its scouting."""
    found = result(record, policy)
    if record.ready and not record.blocks:
        return None
    interval = found.interval
    if interval is None or interval.blocks < 2:
        return Probe(size, found.verdict, reason=found.reason)
    return Probe(size, found.verdict, interval.speedup, interval.low, interval.high, interval.blocks, found.reason)


def as_dict(study: Study) -> dict[str, Any]:
    """What a stored study has beside its run."""
    rows = [
        {"id": row.id, "figures": dict(row.figures), "here": {r.id: r.as_dict() for r in found}}
        for row, found in study.results()
    ]
    return {"crossings": [found.as_dict() for found in study.crossings()], "published": rows}
