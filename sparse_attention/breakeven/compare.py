"""The `breakeven` fixture: two callables of a running test, raced in fresh processes that run the same test again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import pytest

from . import clock as clocks
from . import checking, machine, sampling, suspicion
from .case import Case, Workload
from .progress import Progress
from .race import Settings
from .result import Result, judge_record, result
from .store import Block, Record

BLOCK_S = 2.0  # time for the pairs of one comparison in one block


class Comparisons:
    """All comparisons of a session. Blocks are measured for every selected test at once, so that each process that is
    started serves them all; only tests that need a second look are run again alone.
    """

    def __init__(self, config: pytest.Config, settings: Settings):
        self._config, self._policy, self._threads, self._device = config, settings.policy, settings.threads, settings.device
        self.nodes: dict[str, str] = {}  # node id -> what to tell pytest to run it
        self.records: dict[str, Record] = {}
        self._started = False
        self._said = ""

    def judge(self, key: str, node: str, case: Case, progress: Progress) -> Result:
        """Measure as many blocks as the policy asks for."""
        if not self._started:
            self._started = True
            for number in range(self._policy.blocks):
                progress.status(f"block {number + 1} of {self._policy.blocks}+ of {len(self.nodes)} tests")
                self._block(list(self.nodes))
                if self._hopeless(number + 1):
                    break
        record = self.records.setdefault(key, Record(case))
        record.case = case
        if not record.blocks and record.error is None:
            self._block([node])
        if not record.blocks and record.error is None:
            record.error = f"run again in a fresh process, the test did not reach breakeven(): {self._said}"
        record.scout = record.scout or {"status": "ok", "baselines": {"baseline": 0.0}}
        spare = self._policy.blocks if any(b.valid for b in record.blocks) else 0  # in place of disturbed ones
        while record.error is None and judge_record(record, self._policy).more and spare:
            before = sum(b.valid for b in record.blocks)
            progress.status(f"block {len(record.blocks) + 1} of {key}")
            self._block([node])
            spare -= sum(b.valid for b in record.blocks) == before
        return result(record, self._policy)

    def _hopeless(self, blocks: int) -> bool:
        """Every comparison is wrong, or had three blocks and not one of them was quiet."""
        records = self.records.values()
        noisy = blocks >= 3 and not any(b.valid for r in records for b in r.blocks)
        return bool(records) and (noisy or all(r.error is not None for r in records))

    def _block(self, nodes: Sequence[str]) -> None:
        number = max((len(r.blocks) for r in self.records.values()), default=0)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "block.jsonl")
            options = [option for name in self._config.option.plugins or [] for option in ("-p", name)]
            if self._config.inipath is not None:
                options += ["-c", str(self._config.inipath)]
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
            command += ["--rootdir", str(self._config.rootpath), "--breakeven-worker", f"{number}:{path}"]
            command += ["--breakeven-device", self._device, "--breakeven-threads", str(self._threads)]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
            for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
                environment[name] = str(self._threads)
            done = subprocess.run(
                [*command, *(self.nodes[node] for node in nodes)],
                cwd=self._config.invocation_params.dir,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            self._said = " ".join(done.stdout.split()[-40:])
            if not os.path.exists(path):
                return
            with open(path) as f:
                for line in f:
                    self._add(json.loads(line))

    def _add(self, entry: dict[str, Any]) -> None:
        record = self.records.setdefault(entry["key"], Record(Case(entry["key"], "pytest:test")))
        if entry["error"] is not None:
            record.error = entry["error"]
            record.scout = {"status": "suspicious", "reason": entry["error"]} if entry.get("suspicious") else {}
        else:
            record.blocks.append(Block(len(record.blocks), "baseline", **entry["samples"]))


class BlockWriter:
    """In the fresh process: measures one block of each comparison it meets and appends it to a file."""

    def __init__(self, target: str, threads: int, device: str):
        number, _, self._path = target.partition(":")
        self._number, self._device = int(number), device
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, machine.pinned(threads))

    def block(self, key: str, workload: Workload) -> None:
        entry: dict[str, Any] = {"key": key, "error": None}
        try:
            entry["samples"] = vars(_one_block(workload, self._number, self._device))
        except Exception as error:
            entry["error"] = checking.summary(error)
            entry["suspicious"] = isinstance(error, checking.Suspicious)
        with open(self._path, "a") as f:
            f.write(json.dumps(entry) + "\n")


def _one_block(workload: Workload, number: int, device: str) -> sampling.Samples:
    clock = clocks.make(device)
    _require_seen(workload, clock)
    checking.check_fresh(workload, seed=number)
    members = {"": workload.baselines["baseline"], "candidate": workload.candidate}
    seconds = {name: sampling.estimate(call, clock) for name, call in members.items()}
    plans = sampling.plan({"pair": seconds}, clock.least_s, BLOCK_S)
    entry = sampling.Entry("candidate", workload, "pair", "baseline")
    samples = sampling.measure([entry], plans, clock, seed=number)
    for error in checking.recheck({"candidate": workload}, seed=number + 1).values():
        raise error
    _require_seen(workload, clock)
    return samples["candidate"]


def _require_seen(workload: Workload, clock: clocks.Clock) -> None:
    if reason := suspicion.left_running(workload.candidate, clock):
        raise checking.Suspicious(reason)
