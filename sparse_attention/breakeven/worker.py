"""The fresh process: rebuilds the cases it is told, and scouts, measures one block, or times the further columns."""

from __future__ import annotations

import json
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from .anchor import Anchor, ceilings
from .case import Case, NotInBase, Unavailable, Workload
from .checking import Suspicious, WrongOutput, check, check_fresh, recheck, summary
from .clock import Clock, make
from .device import require_on_device, use_clock
from .machine import Usage
from .memory import peak_bytes
from .peaks import Peak
from .sampling import Entry, GroupPlan, Samples, estimate, inner_calls, measure
from .suspicion import left_running, too_fast

Emit = Callable[..., None]

NEAR = 1.15  # times the seconds of the fastest baseline: those are timed again
MOST_ROUNDS, ROUNDS_S = 7, 2.0  # of them; calls of seconds are made once more


def main(job: dict[str, Any]) -> None:
    """Run `job` and write JSON lines to standard output; whatever the kernels print goes to standard error."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def emit(**message):
        lines.write(json.dumps(message) + "\n")

    if job["cores"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, job["cores"])
    use_clock(job["device"])
    emit(result=_KINDS[job["kind"]](job, emit))


def scout(job: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Check every case on changing inputs; choose the fastest baseline; take rough times and peak memory."""
    clock = make(job["device"])
    peak = clock.peak()
    found, baselines = {}, {}
    for number, case in enumerate(_cases(job)):
        where = f"{number + 1} of {len(job['cases'])}: {case.id}"
        emit(case=case.id, doing=f"building and checking {where}")
        start = time.perf_counter()
        try:
            workload = case.load()
            require_on_device(workload, job["device"])
            _require_seen(workload, clock)
            check_fresh(workload, seed=job["seed"] + number)  # cases that share inputs must not draw them alike
        except NotInBase as error:
            found[case.id] = {"status": "not in base", "reason": str(error)}
            continue
        except Unavailable as error:
            found[case.id] = {"status": "unavailable", "reason": str(error)}
            continue
        except Suspicious as error:
            found[case.id] = {"status": "suspicious", "reason": str(error)}
            continue
        except WrongOutput as error:
            found[case.id] = {"status": "wrong", "reason": str(error)}
            continue
        except Exception as error:
            found[case.id] = {"status": "wrong", "reason": f"cannot be built: {summary(error)}"}
            continue
        ready_s = time.perf_counter() - start
        seconds, peak_memory = _survey(workload.candidate, clock)
        if reason := too_fast(seconds, workload.work, workload.inputs, peak):
            found[case.id] = {"status": "suspicious", "reason": reason}
            continue
        group = case.share or case.id
        if group not in baselines:
            emit(case=case.id, doing=f"timing the baselines of {where}")
            baselines[group] = _baselines(workload, clock) if case.limit_s is None else ({}, {})
        if case.limit_s is None and not baselines[group][0]:
            found[case.id] = {"status": "unavailable", "reason": f"no baseline runs: {baselines[group][1] or 'there is none'}"}
            continue
        found[case.id] = {
            "status": "ok",
            "ready_s": ready_s,
            "candidate_s": seconds,
            "candidate_peak_bytes": peak_memory,
            "baselines": {name: s for name, (s, _) in baselines[group][0].items()},
            "baseline_peak_bytes": {name: p for name, (_, p) in baselines[group][0].items()},
            "baselines_absent": baselines[group][1],
            "scale": workload.scale,
            "work": dict(workload.work),
            "note": workload.note,
        }
    return found


def block(job: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """One block of every case: check, measure, check again."""
    start = Usage.now()
    clock = make(job["device"])
    loaded, errors, unavailable, suspicious = {}, {}, {}, {}
    cases = _cases(job)
    for case in cases:
        emit(case=case.id, doing=f"checking {case.id}")
        try:
            loaded[case.id] = case.load()
            check(loaded[case.id])
            _prepare(loaded[case.id], job["baseline"][case.id])
        except Unavailable as error:
            unavailable[case.id] = str(error)
        except Suspicious as error:
            suspicious[case.id] = str(error)
        except Exception as error:
            errors[case.id] = summary(error)
    set_aside = {**errors, **unavailable, **suspicious}
    entries = [_entry(case, loaded[case.id], job) for case in cases if case.id not in set_aside]
    ready = Usage.now()
    plans = {group: GroupPlan(**plan) for group, plan in job["plans"].items()}
    samples, anchor = {}, Anchor(job["device"], clock)
    anchor.visit()
    if entries:
        samples = measure(entries, plans, clock, job["seed"], lambda text: emit(case=None, doing=text))
    anchor.visit()
    measured = Usage.now().since(ready)
    reached = ceilings([{"anchor": anchor.as_dict()}])
    peak = _not_below(clock.peak(), reached)
    for entry in entries:
        if reason := _impossible(entry.workload, samples[entry.id], peak, clock):
            suspicious[entry.id] = reason
    honest = {entry.id: entry.workload for entry in entries if entry.id not in suspicious}
    wrong = recheck(honest, job["seed"], lambda name: emit(case=name, doing=f"checking {name} again"), job["fresh"])
    for name, error in wrong.items():
        (suspicious if isinstance(error, Suspicious) else errors)[name] = f"after it was timed: {error}"
    return {
        "samples": {name: vars(s) for name, s in samples.items() if name not in {**errors, **suspicious}},
        "errors": errors,
        "unavailable": unavailable,
        "suspicious": suspicious,
        "evidence": {
            "ready_s": ready.since(start).wall_s,
            "measured_s": measured.wall_s,
            "involuntary_per_s": measured.involuntary / max(measured.wall_s, 1e-9),
            "others_s": measured.others_s,
            "steal_s": measured.steal_s,
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "anchor": anchor.as_dict(),
            "clock": clock.as_dict(),
        },
    }


def columns(job: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Time each case's further rivals beside its candidate, in one process: for information, no interval."""
    clock = make(job["device"])
    deadline = time.perf_counter() + job["budget_s"]
    found: dict[str, dict[str, Any]] = {}
    for case in _cases(job):
        found[case.id] = {}
        if time.perf_counter() > deadline:
            continue
        try:
            workload = case.load()
            check(workload)
        except Exception as error:
            found[case.id] = {name: {"error": str(error)} for name in case.columns}
            continue
        for name in case.columns:
            if time.perf_counter() > deadline:
                break
            emit(case=case.id, doing=f"{name} on {case.id}")
            found[case.id][name] = _column(workload, name, clock, job["seed"], deadline)
    return found


def _column(workload: Workload, name: str, clock: Clock, seed: int, deadline: float) -> dict[str, Any]:
    try:
        rival = workload.columns[name]()
        if workload.check is not None:
            workload.check(rival())
    except Exception as error:
        return {"error": summary(error)}
    times: dict[str, list[float]] = {"candidate": [], "rival": []}
    calls = {"candidate": workload.candidate, "rival": rival}
    inner = {key: inner_calls(estimate(call, clock), clock.least_s) for key, call in calls.items()}
    order = random.Random(seed)
    for _ in range(5):
        for key in order.sample(list(calls), len(calls)):
            clock.settle()
            times[key].append(clock.time(calls[key], inner[key]))
        if time.perf_counter() > deadline:
            break
    speedup = statistics.median(r / c for r, c in zip(times["rival"], times["candidate"]))
    return {"seconds": statistics.median(times["rival"]), "speedup": speedup}


def _survey(call: Callable[[], Any], clock: Clock) -> tuple[float, int | None]:
    """Rough seconds and peak bytes of a call; a slow one is made only once."""
    took = []

    def once():
        start = time.perf_counter()
        output = call()
        clock.settle()
        took.append(time.perf_counter() - start)
        return output

    peak = peak_bytes(once)
    return (took[0] if took[0] > 0.1 else estimate(call, clock)), peak


def _baselines(workload: Workload, clock: Clock) -> tuple[dict[str, tuple[float, int | None]], dict[str, str]]:
    """Seconds and peak bytes of each that runs here, and why the others do not."""
    found, absent = {}, {}
    for name, call in workload.baselines.items():
        try:
            _prepare(workload, name)
            if not clock.on_threads:
                call()  # kernels for other devices are often compiled by their first call
            found[name] = _survey(call, clock)
        except Exception as error:
            absent[name] = summary(error)
    again = _near(workload, clock, {name: seconds for name, (seconds, _) in found.items()})
    return {name: (again.get(name, seconds), peak) for name, (seconds, peak) in found.items()}, absent


def _near(workload: Workload, clock: Clock, rough: Mapping[str, float]) -> dict[str, float]:
    """Seconds of those that were about as fast as the fastest, alternating and warm: one cold call each is no choice."""
    names = [name for name, seconds in rough.items() if seconds <= NEAR * min(rough.values())]
    if len(names) < 2:
        return {}
    inner = {name: inner_calls(rough[name], clock.least_s) for name in names}
    round_s = sum(rough[name] * inner[name] for name in names)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(max(1, min(MOST_ROUNDS, int(ROUNDS_S / max(round_s, 1e-9))))):
        for name in names if turn % 2 == 0 else reversed(names):
            _prepare(workload, name)
            clock.settle()
            times[name].append(clock.time(workload.baselines[name], inner[name]))
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def _require_seen(workload: Workload, clock: Clock) -> None:
    if reason := left_running(workload.candidate, clock):
        raise Suspicious(reason)


def _impossible(workload: Workload, samples: Samples, peak: Peak | None, clock: Clock) -> str:
    return too_fast(statistics.median(samples.candidate_s), workload.work, workload.inputs, peak) or left_running(
        workload.candidate, clock
    )


def _not_below(peak: Peak | None, reached: Mapping[str, Any]) -> Peak | None:
    """The bound, but not below what this block's anchors reached."""
    if peak is None or "flops_per_s" not in reached:
        return peak
    rates = reached["flops_per_s"]
    return peak.reached({_ITEMSIZE[dtype]: rate for dtype, rate in rates.items()})


_ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


def _prepare(workload: Workload, baseline: str | None) -> None:
    if workload.prepare is not None and baseline is not None:
        workload.prepare(baseline)


def _entry(case: Case, workload: Workload, job: Mapping[str, Any]) -> Entry:
    return Entry(case.id, workload, case.share or case.id, job["baseline"][case.id], case.limit_s)


def _cases(job: Mapping[str, Any]) -> list[Case]:
    return [Case.from_dict(data) for data in job["cases"]]


_KINDS = {"scout": scout, "block": block, "columns": columns}
