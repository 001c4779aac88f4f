"""The fresh process of the `breakeven` fixture: measures one block of each comparison it meets and writes it down."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import Any

from . import checking, machine, sampling, suspicion
from . import clock as clocks
from .anchor import Anchor
from .case import Unavailable, Workload
from .device import require_on_device, use_clock


class BlockWriter:
    """Appends a JSON object a line to a file, at once, so that it is known how far a process came that died.

    {"options": ...} of this process; {"start": node} and {"end": node} around every test; {"key": ..., "samples": ...} or
    {"key": ..., "error": ...} for a comparison; {"evidence": ...} of the whole process.
    """

    def __init__(self, target: str, threads: int, device: str, options: Mapping[str, str]):
        number, block_s, self._path = target.split(":", 2)
        self._number, self._block_s, self._device = int(number), float(block_s), device
        self._started_s, self._total = time.perf_counter(), machine.Usage(0.0, 0.0, 0)
        self._clock: clocks.Clock | None = None
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, machine.pinned(threads))
        use_clock(device)
        self._write(options=dict(options))

    def start(self, node: str) -> None:
        self._write(start=node)

    def end(self, node: str) -> None:
        self._write(end=node)

    def block(self, key: str, node: str, workload: Workload) -> None:
        try:
            found = self._measure(workload)
        except Unavailable as error:
            found = {"error": str(error), "status": "unavailable"}
        except Exception as error:
            suspicious = isinstance(error, checking.Suspicious)
            found = {"error": checking.summary(error), "status": "suspicious" if suspicious else "wrong"}
        self._write(key=key, node=node, **found)

    def finish(self) -> None:
        if self._clock is None:
            return
        self._anchor.visit()
        total = self._total
        self._write(
            evidence={
                "ready_s": time.perf_counter() - self._started_s - total.wall_s,
                "measured_s": total.wall_s,
                "involuntary_per_s": total.involuntary / max(total.wall_s, 1e-9),
                "others_s": total.others_s,
                "steal_s": total.steal_s,
                "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
                "anchor": self._anchor.as_dict(),
                "clock": self._clock.as_dict(),
            }
        )

    def _measure(self, workload: Workload) -> dict[str, Any]:
        if self._clock is None:
            self._clock = clocks.make(self._device)
            self._anchor = Anchor(self._device, self._clock)
            self._anchor.visit()
        clock = self._clock
        require_on_device(workload, self._device)
        _require_seen(workload, clock)
        checking.check_fresh(workload, seed=self._number)
        members = {"": workload.baselines["baseline"], "candidate": workload.candidate}
        seconds = {name: sampling.estimate(call, clock) for name, call in members.items()}
        plans = sampling.plan({"pair": seconds}, clock.least_s, self._block_s)
        entry = sampling.Entry("candidate", workload, "pair", "baseline")
        ready = machine.Usage.now()
        samples = sampling.measure([entry], plans, clock, seed=self._number)
        self._add(machine.Usage.now().since(ready))
        for error in checking.recheck({"candidate": workload}, seed=self._number + 1).values():
            raise error
        _require_seen(workload, clock)
        return {"samples": vars(samples["candidate"]), "seconds": {"baseline": seconds[""], "candidate": seconds["candidate"]}}

    def _add(self, used: machine.Usage) -> None:
        self._total = machine.Usage(*(a + b for a, b in zip(vars(self._total).values(), vars(used).values())))

    def _write(self, **entry: Any) -> None:
        with open(self._path, "a") as f:
            f.write(json.dumps(entry) + "\n")


def _require_seen(workload: Workload, clock: clocks.Clock) -> None:
    if reason := suspicion.left_running(workload.candidate, clock):
        raise checking.Suspicious(reason)
