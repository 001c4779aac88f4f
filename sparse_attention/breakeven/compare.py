"""The `breakeven` fixture: two callables of a running test, raced in fresh processes that run the same test again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from .case import Case
from .forwarding import difference, forwarded
from .progress import Progress
from .race import Settings
from .result import Result, judge_record, result
from .store import Block, Record, Run

BLOCK_S = 2.0  # most time for the pairs of one comparison in one block
_MEASURED_SHARE = 0.3  # of the budget, for the pairs of the first look; the rest is for starting, checking and second looks


@dataclass(frozen=True)
class Failure:
    """Why a test in a fresh process gave no block; `everywhere`: not of those of its comparisons either that were measured."""

    reason: str
    everywhere: bool = False


class Comparisons:
    """All comparisons of a session. Blocks are measured for every selected test at once, so that each process that is
    started serves them all; only tests that need a second look are run again alone.
    """

    def __init__(self, config: pytest.Config, settings: Settings, options: Mapping[str, str]):
        self._config, self._settings, self._options = config, settings, options
        self._policy = settings.policy
        self.nodes: dict[str, str] = {}  # node id -> what to tell pytest to run it
        self._keys: dict[str, set[str]] = {}  # node id -> the comparisons that it was seen to make
        self._records: dict[str, Record] = {}
        self._judged: set[str] = set()
        self._evidence: list[dict[str, Any]] = []  # one entry a process
        self._spent_s = 0.0
        self._said = ""

    def judge(self, key: str, node: str, case: Case, progress: Progress) -> Result:
        """Measure as many blocks as the policy asks for and the budget allows."""
        if not self._evidence:
            self._first_look(progress)
        record = self._records.setdefault(key, Record(case))
        self._keys.setdefault(node, set()).add(key)
        self._judged.add(key)
        record.case = case
        if not record.blocks and not _set_aside(record) and self._left_s > 0:
            self._block([node])
            if not record.blocks and not _set_aside(record):
                record.error = f"run again in a fresh process, the test did not reach breakeven(): {self._said}"
        record.scout = record.scout or {"status": "ok", "baselines": {"baseline": 0.0}}
        spare = self._policy.blocks if any(b.valid for b in record.blocks) else 0  # in place of disturbed ones
        while not _set_aside(record) and judge_record(record, self._policy).more and spare and self._left_s > 0:
            before = sum(b.valid for b in record.blocks)
            progress.status(f"block {len(record.blocks) + 1} of {key}")
            self._block([node])
            spare -= sum(b.valid for b in record.blocks) == before
        return result(record, self._policy)

    def add_to(self, run: Run, unheard: Iterable[Result]) -> None:
        """Store what was judged, and what should have been and left no result, beside the cases of `run`."""
        first = len(run.evidence)
        for key in self._judged:
            record = self._records[key]
            run.records[key] = replace(record, blocks=[replace(b, number=first + b.number) for b in record.blocks])
        for found in unheard:
            case = Case(found.id, "pytest:test", floor=found.floor)
            run.records[found.id] = Record(case, {"status": "unavailable", "reason": found.reason})
        run.evidence += self._evidence
        run.elapsed_s += self._spent_s

    @property
    def _left_s(self) -> float:
        return self._settings.budget_s - self._spent_s

    def _first_look(self, progress: Progress) -> None:
        blocks = self._policy.blocks
        for number in range(blocks):
            sound = [node for node in self.nodes if not self._broken(node)]
            if not sound or (number and self._left_s <= 0):
                break
            progress.status(f"block {number + 1} of {blocks}+ of {len(sound)} tests")
            self._block(sound)
            if number >= 2 and not any(b.valid for r in self._records.values() for b in r.blocks):
                break  # three blocks, and not one of them was quiet

    def _broken(self, node: str) -> bool:
        keys = self._keys.get(node, ())
        return bool(keys) and all(_set_aside(self._records[key]) for key in keys)

    def _block(self, nodes: Sequence[str]) -> None:
        number, start_s = len(self._evidence), time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "block.jsonl")
            open(path, "w").close()
            done = subprocess.run(
                [*self._command(f"{number}:{self._block_s(len(self.nodes))}:{path}", folder), *(self.nodes[n] for n in nodes)],
                cwd=self._config.invocation_params.dir,
                env=self._environment(),
                text=True,
                errors="replace",
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            with open(path) as f:
                entries = [json.loads(line) for line in f if line.endswith("\n")]
        wall_s = time.perf_counter() - start_s
        self._spent_s += wall_s
        self._said = " ".join(done.stdout.split()[-40:])
        evidence = [entry["evidence"] for entry in entries if "evidence" in entry]
        self._evidence.append(evidence[0] if evidence else {"ready_s": wall_s, "measured_s": 0.0})
        compared = {entry["key"] for entry in entries if "key" in entry}
        for entry in entries:
            if "key" in entry:
                self._add(entry, number)
        for node, failure in self._failures(nodes, entries, done.returncode).items():
            for key in self._keys.setdefault(node, {node}):
                if key not in compared or failure.everywhere:
                    self._record(key).error = self._record(key).error or failure.reason

    def _failures(self, nodes: Sequence[str], entries: Sequence[Mapping[str, Any]], code: int) -> dict[str, Failure]:
        """By node, why this block of it is none: a kernel that crashes now and then is not taken again until it does not."""
        options = next((entry["options"] for entry in entries if "options" in entry), self._options)
        if reason := difference(self._options, options):
            return dict.fromkeys(nodes, Failure(reason, everywhere=True))
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        started = [entry["start"] for entry in entries if "start" in entry]
        ended = {entry["end"] for entry in entries if "end" in entry}
        died = [node for node in started if node not in ended]
        found = {node: Failure(f"its process ended with {how} while the test ran", everywhere=True) for node in died}
        for node in nodes:
            if node in ended:
                found[node] = Failure("run again in a fresh process, the test did not reach breakeven()")
                if code < 0 and not died:
                    found[node] = Failure(f"its process ended with {how} after the tests", everywhere=True)
            elif not died:
                found[node] = Failure(f"a fresh process did not run the test, and ended with {how}: {self._said}")
        return found

    def _add(self, entry: Mapping[str, Any], number: int) -> None:
        self._keys.setdefault(entry["node"], set()).add(entry["key"])
        record = self._record(entry["key"])
        if "error" in entry:
            record.error = entry["error"] if entry["status"] == "wrong" else None
            record.scout = {"status": entry["status"], "reason": entry["error"]}
            return
        seconds = entry["seconds"]
        record.scout = record.scout or {
            "status": "ok",
            "candidate_s": seconds["candidate"],
            "baselines": {"baseline": seconds["baseline"]},
        }
        record.blocks.append(Block(number, "baseline", **entry["samples"]))

    def _record(self, key: str) -> Record:
        return self._records.setdefault(key, Record(Case(key, "pytest:test")))

    def _block_s(self, tests: int) -> float:
        return min(BLOCK_S, _MEASURED_SHARE * self._settings.budget_s / (self._policy.blocks * max(tests, 1)))

    def _command(self, target: str, folder: str) -> list[str]:
        ours = ["--breakeven-worker", target, "--breakeven-device", self._settings.device]
        ours += ["--breakeven-threads", str(self._settings.threads)]
        return [sys.executable, "-m", "pytest", *forwarded(self._config, folder), *ours]

    def _environment(self) -> dict[str, str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            environment[name] = str(self._settings.threads)
        return environment


def _set_aside(record: Record) -> bool:
    """It is wrong, or cannot be measured here."""
    return record.error is not None or record.scout.get("status", "ok") != "ok"
