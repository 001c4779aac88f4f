"""Running a race: scout once, then block after block, each a fresh process, until every case is judged or time is up."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from .case import Case
from .clock import kind
from .machine import cores, describe, pinned
from .process import WorkerDied, run_worker
from .progress import Progress, duration
from .result import block_logs, judge_record
from .sampling import LEAST_PAIRS, GroupPlan, plan, planned_seconds
from .store import Block, Record, Run
from .verdict import Policy, TwoStage, surely_passes


GRACE_S = 60.0  # when the time is up, a process that says nothing for so long hangs
BUILD_S = 900.0  # to build and check a case: kernels may have to be compiled, which no budget is for


@dataclass(frozen=True)
class Settings:
    budget_s: float = 255.0  # wall time for everything, builds included
    threads: int = 1
    policy: Policy = TwoStage()
    device: str = "cpu"
    seed: int = 0
    first_look_share: float = 0.62  # of the time left after scouting; the rest is for second looks and columns
    base: str | None = None  # the commit that the cases are raced against, where that is not their baseline
    unjudged: str = ""  # why no case may be judged, such as a machine class without floors

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "policy": {"name": type(self.policy).__name__, **vars(self.policy)}}

    @property
    def cores(self) -> list[int]:
        return pinned(self.threads)


class Race:
    """One run over `cases`; `save` is called with the run after each step, so that it can be resumed."""

    def __init__(
        self,
        cases: Iterable[Case],
        settings: Settings,
        progress: Progress,
        save: Callable[[Run], None] = lambda run: None,
        resume: Run | None = None,
    ):
        if os.environ.get("CUDA_LAUNCH_BLOCKING") == "1":
            raise ValueError("CUDA_LAUNCH_BLOCKING=1 times every launch: unset it")
        here = Run(describe(settings.device), settings.as_dict(), {case.id: Record(case) for case in cases})
        if resume is not None:
            require_same(resume, here)
            _require_same_cases(resume, here)
            resume.settings |= here.settings
        self.settings, self.progress, self._save = settings, progress, save
        self.run = resume or here
        self._start = time.perf_counter()
        self._deaths = 0
        self._overhead_s: float | None = None  # of one block: starting, building, checking twice

    def execute(self) -> Run:
        """Scout and measure: first looks, second looks of suspects, then what is for information, then what is undecided."""
        self.scout()
        self.first_look(leave_sure=True)
        self.further_looks(suspects=True)
        self.all_cores()
        self.columns()
        self.further_looks()
        self._keep()
        return self.run

    @property
    def left_s(self) -> float:
        return self.settings.budget_s - (time.perf_counter() - self._start)

    def scout(self) -> None:
        """Build and check every case that has not been; a case whose process dies is set aside as wrong."""
        while missing := [r.case for r in self.run.records.values() if not r.scout]:
            try:
                found = self._worker("scout", missing, "scouting", silence_s=max(self.left_s + GRACE_S, BUILD_S))
            except WorkerDied as died:
                culprit = died.case or missing[0].id
                self.run.records[culprit].scout = {"status": "wrong", "reason": str(died)}
                continue
            for case_id, entry in found.items():
                self.run.records[case_id].scout = entry
        self._keep()
        ready = sum(r.ready for r in self.run.records.values())
        self.progress.line(f"{ready} of {len(self.run.records)} cases build and are correct ({duration(self.elapsed_s)})")

    def measure(self) -> None:
        """All blocks that the policy asks for."""
        self.first_look()
        self.further_looks()

    def first_look(self, leave_sure: bool = False) -> None:
        """The policy's first blocks of every case; disturbed ones are taken again, but not in the time of what follows.

        With `leave_sure`, cases that surely pass on a few blocks are left at that where the time does not allow all.
        """
        first = self.settings.policy.blocks
        end_s = self.left_s * (1 - self.settings.first_look_share)  # time left when it should be over
        for number in range(2 * first):
            pending = self._pending(first_look=True)
            if leave_sure:
                pending = self._without_sure(pending, self.left_s - end_s)
            if not pending or self.left_s < (0 if number < first else end_s / 2) or self._hopeless():
                break
            self._block(pending, (self.left_s - end_s) / max(self._judged(r).more for r in pending))

    def further_looks(self, suspects: bool = False) -> None:
        """More blocks of the cases that need them, or of suspects alone, as many cases as the time allows."""
        while chosen := self._affordable([r for r in self._pending(first_look=False) if self._judged(r).suspect or not suspects]):
            self._block(chosen, self.left_s / max(self._judged(r).more for r in chosen))

    def all_cores(self) -> None:
        """One short block on all cores, for information, where the gate itself is on one thread of a CPU: of as many cases as the
        time allows, cheap ones first.
        """
        threads = cores()
        name = f"{'base' if self.settings.base else 'dense'}, {threads} threads"
        timed = [r for r in self.run.records.values() if r.ready and r.baseline and any(b.valid for b in r.blocks)]
        wanted = [r for r in timed if name not in r.columns]
        is_cpu = getattr(kind(self.settings.device), "on_threads", False)
        if not is_cpu or self.settings.threads != 1 or threads == 1 or not wanted:
            return
        wanted = self._cheapest(wanted, self.left_s, lambda records: self._shortest(records, threads)[1])
        if not wanted:
            return
        plans, _ = self._shortest(wanted, threads)
        what = f"{len(wanted)} cases on {threads} threads"
        try:
            found = self._block_worker(wanted, plans, what, threads=threads, cores=pinned(threads), timeout_s=self.left_s)
        except WorkerDied as died:
            self.progress.line(f"{what}: {died}")
            return
        for record in wanted:
            blocks = [Block(0, record.baseline, **samples) for samples in [found["samples"].get(record.case.id)] if samples]
            for log in block_logs(replace(record, blocks=blocks)):  # none where it was disturbed
                pairs = sum(blocks[0].clean)
                record.columns[name] = {"seconds": statistics.median(blocks[0].baseline_s), "speedup": math.exp(log), "pairs": pairs}

    def columns(self) -> None:
        """Further rivals of the cases that name some, in half of the time that is left."""
        ready = [r for r in self.run.records.values() if r.ready]
        wanted = [r.case for r in ready if any(name not in r.columns for name in r.case.columns)]
        budget_s = self.left_s / 2
        if not wanted or budget_s < 5:
            return
        try:
            found = self._worker("columns", wanted, "further rivals", budget_s=budget_s, timeout_s=self.left_s)
        except WorkerDied as died:
            self.progress.line(f"further rivals: {died}")
            return
        for case_id, entry in found.items():
            self.run.records[case_id].columns |= entry

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self._start

    def planned(self, records: list[Record], block_s: float, least_pairs: int = LEAST_PAIRS) -> tuple[dict[str, GroupPlan], float]:
        """How each group would be measured in a block of about `block_s` seconds, and how long that takes."""
        groups: dict[str, dict[str, float]] = {}
        for record in records:
            members = groups.setdefault(record.case.share or record.case.id, {})
            members[record.case.id] = record.scout["candidate_s"]
            if record.baseline is not None:
                members[""] = record.scout["baselines"][record.baseline]
        least_s = kind(self.settings.device).least_s
        plans = plan(groups, least_s, block_s - self._overhead(records), least_pairs)
        return plans, planned_seconds(groups, plans) + self._overhead(records)

    def _block(self, records: list[Record], block_s: float) -> None:
        number = len(self.run.evidence)
        plans, planned_s = self.planned(records, block_s)
        what = f"block {number + 1} of {self.settings.policy.blocks}+, {len(records)} cases"
        start = time.perf_counter()
        try:
            silence_s = max(self.left_s, 0.0) + GRACE_S + 3 * (planned_s + sum(r.scout["ready_s"] for r in records))
            found = self._block_worker(records, plans, what, seed=self.settings.seed + number + 1, silence_s=silence_s)
        except WorkerDied as died:
            self._deaths += 1
            self.progress.line(f"{what}: {died}")
            if died.case or self._deaths > 2:  # killed while timing: by whom cannot be told, so it is tried again
                for record in [self.run.records[died.case]] if died.case else records:
                    record.error = str(died)
            return
        for record in records:
            record.error = found["errors"].get(record.case.id)
            for status in ("unavailable", "suspicious"):
                if reason := found.get(status, {}).get(record.case.id):
                    record.scout = {**record.scout, "status": status, "reason": reason}
            samples = found["samples"].get(record.case.id)
            if samples:
                record.blocks.append(Block(number, record.baseline, **samples))
        self.run.evidence.append(found["evidence"])
        self._overhead_s = time.perf_counter() - start - found["evidence"]["measured_s"]
        self._keep()

    def _block_worker(self, records: list[Record], plans: dict[str, GroupPlan], what: str, **fields: Any) -> dict[str, Any]:
        plan_of = {group: chosen.as_dict() for group, chosen in plans.items()}
        baseline = {r.case.id: r.baseline for r in records}
        fresh = [r.case.id for r in records if not r.blocks]  # with changed inputs after timing: once is enough
        return self._worker("block", [r.case for r in records], what, plans=plan_of, baseline=baseline, fresh=fresh, **fields)

    def _worker(self, kind: str, cases: list[Case], what: str, **fields: Any) -> dict[str, Any]:
        def tell(text):
            self.progress.status(f"{what}, {duration(max(self.left_s, 0))} left: {text}")

        common = {"threads": self.settings.threads, "cores": self.settings.cores, "device": self.settings.device}
        return run_worker(kind, cases, progress=tell, **{**common, **fields})

    def _pending(self, first_look: bool) -> list[Record]:
        first = self.settings.policy.blocks
        ready = [r for r in self.run.records.values() if r.ready and self._judged(r).more]
        return [r for r in ready if (sum(b.valid for b in r.blocks) < first) == first_look]

    def _shortest(self, records: list[Record], threads: int) -> tuple[dict[str, GroupPlan], float]:
        """A block of as few pairs as may be on so many cores, and what it may take: seven tenths of a further core are a gain."""
        plans, one_s = self.planned(records, 0.0, least_pairs=1)
        overhead_s = self._overhead(records)
        return plans, (one_s - overhead_s) / (1 + 0.7 * (threads - 1)) + overhead_s

    def _without_sure(self, pending: list[Record], time_s: float) -> list[Record]:
        """Where `time_s` is too short for all: those that do not surely pass on the blocks that there are, and the cheap others."""
        more = max((self._judged(r).more for r in pending), default=0)
        sure = {r.case.id for r in pending if surely_passes(block_logs(r), r.case.floor)}
        unsure, rest = ([r for r in pending if (r.case.id in sure) == known] for known in (False, True))
        return unsure + self._cheapest(rest, time_s, lambda records: more * self.planned([*unsure, *records], 0.0)[1])

    def _cheapest(self, records: list[Record], time_s: float, seconds: Callable[[list[Record]], float]) -> list[Record]:
        """As many as take `time_s` together, cheap ones first; `seconds` tells what some take."""
        chosen: list[Record] = []
        for record in sorted(records, key=lambda r: self.planned([r], 0.0)[1]):
            if seconds([*chosen, record]) > time_s:
                break
            chosen.append(record)
        return chosen

    def _affordable(self, pending: list[Record]) -> list[Record]:
        """Those of `pending` whose missing blocks fit into the time left: suspects first, then the cheap ones."""
        chosen: list[Record] = []
        by_cost = sorted(pending, key=lambda r: (not self._judged(r).suspect, self.planned([r], 0.0)[1]))
        for record in by_cost:
            more = max(self._judged(r).more for r in [*chosen, record])
            if more * self.planned([*chosen, record], 0.0)[1] <= self.left_s:
                chosen.append(record)
        return chosen

    def _hopeless(self) -> bool:
        """Three blocks, and not one case had a quiet one."""
        blocks = [b for r in self.run.records.values() for b in r.blocks]
        return len(self.run.evidence) >= 3 and not any(b.valid for b in blocks)

    def _judged(self, record: Record):
        return judge_record(record, self.settings.policy)

    def _overhead(self, records: list[Record]) -> float:
        """Seconds a block spends on other than timing: as in the last one, or a guess from the scout."""
        if self._overhead_s is not None:
            share = len(records) / max(sum(r.ready for r in self.run.records.values()), 1)
            return self._overhead_s * (0.5 + 0.5 * share)
        return 2.0 + sum(min(r.scout["ready_s"], 0.5) for r in records)

    def _keep(self) -> None:
        self.run.elapsed_s = self.elapsed_s
        self._save(self.run)


def require_same(resume: Run, here: Run) -> None:
    """ValueError when the stored run measured other kernels than this one would, or in another way."""
    machine = ("class", "cpu", "commit", "changes", "harness")
    told = {name: (resume.machine.get(name), here.machine[name]) for name in machine}
    told |= {name: (resume.settings.get(name), here.settings[name]) for name in ("threads", "device", "base", "unjudged")}
    told["policy"] = (resume.settings.get("policy", {}).get("name"), here.settings["policy"]["name"])
    told["torch"] = (resume.machine.get("versions", {}).get("torch"), here.machine["versions"]["torch"])
    for name, (then, now) in told.items():
        if then != now:
            raise ValueError(f"resume: the stored run has {name} {then!r}, this is {now!r}")


def _require_same_cases(resume: Run, here: Run) -> None:
    def definitions(of):
        return json.dumps({name: record.case.as_dict() for name, record in of.records.items()}, sort_keys=True)

    if definitions(resume) != definitions(here):
        raise ValueError("resume: the stored run has other cases than are selected now")
