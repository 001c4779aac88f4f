"""Measuring this machine for dispatch: the rates of its engines and the lengths from which the sparse ones win.

Both are measured by the break-even harness: fresh processes, checked outputs, disturbed pairs set aside.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch

from sparse_attention import dispatch, rates
from sparse_attention.breakeven import Case, Race, Sequential, Settings, Verdict, machine
from sparse_attention.breakeven.case import select
from sparse_attention.breakeven.crossing import Crossing, Family, geometric
from sparse_attention.breakeven.progress import Progress
from sparse_attention.breakeven.result import clean_share, results
from sparse_attention.breakeven.store import Record, Run
from sparse_attention.breakeven.study import POLICY, Study, scouted
from sparse_attention.breakeven.study_table import sentence
from sparse_attention.calibration_store import Runs
from sparse_attention.fitting import LEAST_SAMPLES, QUANTILES, Fit, Sample, fit
from sparse_attention.patterns import parse
from sparse_attention.rates import ENGINES, Rate, Table

TIMED = "sparse_attention.calibration_workloads:timed"
AGAINST_DENSE = "sparse_attention.calibration_workloads:against_dense"

# Rates are fitted to these calls: (q_len, kv_len) from one tile to many, patterns with few and with many keys a row.
DTYPES = ("float32", "bfloat16", "float16")
SHAPES = ((1, 256), (1, 4096), (8, 1024), (16, 16), (64, 64), (128, 128), (384, 384), (1024, 1024))
PATTERNS = ("SlidingWindow(window=64, causal=True)", "Causal()", "LogSparse(window=1)")
RATE_BLOCKS = 3

# Crossings are measured of these; when time is short the last ones keep wider intervals.
FAMILIES = tuple(
    (pattern, dtype, head_dim)
    for dtype, head_dim in (("float32", 64), ("float32", 128), ("bfloat16", 128))
    for pattern in (
        "SlidingWindow(window=256, causal=True)",
        "Causal()",
        "BigBird(block=64, window=3, globals=2, random=3, seed=0)",
        "LogSparse(window=1)",
    )
)
HEADS = 4
LENGTHS = geometric(16, 512, steps=4)
USABLE = (0.5, 2.0)  # predicted over measured time, of the middle eight tenths of the calls; other rates are left out
RATES_SHARE = 0.4  # of the time; crossings have the rest


class Call(NamedTuple):
    """A call that rates are fitted to."""

    pattern: str
    heads: int
    q_len: int
    kv_len: int
    head_dim: int

    def sizes(self, dtype: str = "float32") -> dispatch.Sizes:
        return dispatch.Sizes(1, self.heads, self.heads, self.q_len, self.kv_len, self.head_dim, getattr(torch, dtype), "cpu")

    def work(self, engine: str) -> rates.Work:
        return dispatch.work(parse(self.pattern), self.sizes())[engine]

    def seconds(self, engine: str, rate: Rate) -> float:
        return 1e-9 * rate.time(self.work(engine), self.head_dim)


class TooDisturbed(RuntimeError):
    """Others used the machine so much that nothing could be fitted."""


FamilyKey = tuple[str, str, int]  # pattern, dtype, head_dim


def families(patterns: Iterable[str] = ()) -> list[FamilyKey]:
    """Of FAMILIES those whose pattern/dtype/head_dim or dtype any shell pattern matches; NothingToCheck for one that matches none."""
    known = {"/".join(map(str, key)): key for key in FAMILIES}
    return [known[case.id] for case in select([Case(name, AGAINST_DENSE, tags=(key[1],)) for name, key in known.items()], patterns)]


def calibrate(
    budget_s: float,
    progress: Progress,
    device: str = "cpu",
    wanted: Iterable[FamilyKey] | None = None,
    save: Callable[[Runs], None] = lambda runs: None,
    resume: Runs | None = None,
) -> dict[str, Any]:
    """Measure on one thread and on all cores, in about `budget_s` seconds; returns what the machine's file holds.

    Crossings are those of `wanted`, or of all FAMILIES. `save` is called with all runs after each block; with these as `resume` it
    goes on. Raises TooDisturbed, and RuntimeError when an engine is wrong or cannot run here.
    """
    wanted, runs = list(FAMILIES if wanted is None else wanted), dict(resume or {})

    def keeping(name):
        def keep(run):
            runs[name] = run
            save(runs)

        return {"save": keep, "resume": runs.get(name)}

    start = time.perf_counter()
    data: dict[str, Any] = {"schema": rates.SCHEMA, "class": machine.machine_class(device), "measured": machine.describe(device)}
    data |= {"rates": [], "crossings": [], "left_out": []}
    counts = sorted({1, machine.cores()})
    for number, threads in enumerate(counts):
        share = (budget_s - (time.perf_counter() - start)) / (len(counts) - number)
        progress.line(f"rates on {_threads(threads)}")
        began = time.perf_counter()
        looks = Settings(RATES_SHARE * share, threads, Sequential((RATE_BLOCKS,)), device, first_look_share=1.0)
        further = f"crossings/{threads}"  # once begun, it is a search with these rates
        fits = measure_rates(looks, progress, **keeping(f"rates/{threads}"), enough=further in runs)
        for dtype, of_dtype in fits.items():
            poor = [engine for engine, found in of_dtype.items() if not USABLE[0] < found.spread[1] <= found.spread[-2] < USABLE[1]]
            data["left_out" if poor else "rates"].append(_rates_entry(threads, dtype, of_dtype))
        progress.line(f"break-even lengths on {_threads(threads)}")
        left = share - (time.perf_counter() - began)
        data["crossings"] += measure_crossings(fits, Settings(left, threads, POLICY, device), progress, wanted, **keeping(further))
    if not any(entry["dtype"] == "float32" for entry in data["rates"]):
        raise TooDisturbed(f"no rates of float32 predict what was measured; others used the machine\n{report(data)}")
    return data


def measure_rates(
    settings: Settings, progress: Progress, save: Callable[[Run], None], resume: Run | None, enough: bool = False
) -> dict[str, dict[str, Fit]]:
    """{dtype: {engine: Fit}} of the dtypes of which enough calls were timed undisturbed; of `resume` alone, if that is enough."""
    cases = {key: _timed(*key) for key in itertools.product(DTYPES, ENGINES, calls())}
    _, guess = rates.GENERIC.rates_for(1, "float32")
    race = Race(cases.values(), settings, progress, save, resume)
    for (_, engine, call), case in cases.items():
        race.run.records[case.id].scout = scouted(call.seconds(engine, guess[engine]), {})
    if not enough:
        race.measure()
    run = race.run
    _require_right(run)
    samples: dict[str, dict[str, list[Sample]]] = {dtype: {engine: [] for engine in ENGINES} for dtype in DTYPES}
    for (dtype, engine, call), case in cases.items():
        seconds = _seconds(run.records[case.id])
        if seconds is not None:
            samples[dtype][engine].append(Sample(call.work(engine), call.head_dim, 1e9 * seconds))
    known = {dtype: of for dtype, of in samples.items() if min(map(len, of.values())) >= LEAST_SAMPLES}
    fits = {dtype: {engine: fit(found) for engine, found in of.items()} for dtype, of in known.items()}
    if len(fits) < len(samples):
        missing = ", ".join(dtype for dtype in samples if dtype not in fits)
        progress.line(f"no rates of {missing}: {_undisturbed(run)} in {settings.budget_s:.0f} s")
    return fits


def calls() -> list[Call]:
    """Shapes and patterns, each with one of two numbers of heads and head_dims."""
    found = []
    for s, (q_len, kv_len) in enumerate(SHAPES):
        for p, pattern in enumerate(PATTERNS):
            found.append(Call(pattern, (1, HEADS)[(s + p) % 2], q_len, kv_len, (64, 128)[(s // 2 + p) % 2]))
    return found


def measure_crossings(
    fits: Mapping[str, Mapping[str, Fit]],
    settings: Settings,
    progress: Progress,
    wanted: Iterable[FamilyKey],
    save: Callable[[Run], None],
    resume: Run | None,
) -> list[dict[str, Any]]:
    """The file's entries: where the sparse engine that the new rates favour begins to win over the dense one."""
    families = {}
    for pattern, dtype, head_dim in wanted:
        if dtype not in fits:
            continue
        favour = {engine: list(fits[dtype][engine].rate) for engine in ENGINES if engine != "dense"}
        args = {"pattern": pattern, "rates": favour, "heads": HEADS, "head_dim": head_dim, "dtype": dtype}
        name = f"{pattern}/{dtype}/{head_dim}"
        families[pattern, dtype, head_dim] = Family(name, AGAINST_DENSE, ("length",), LENGTHS, args, rung=4)

    def foresee(case):
        call = Call(case.args["pattern"], HEADS, case.args["length"], case.args["length"], case.args["head_dim"])
        seconds = {engine: call.seconds(engine, found.rate) for engine, found in fits[case.args["dtype"]].items()}
        dense_s = seconds.pop("dense")
        return scouted(min(seconds.values()), {"dense": dense_s})

    study = Study(families.values(), settings, progress, save, resume, foresee=foresee)
    _require_right(study.execute())
    return [_crossing_entry(*key, settings.threads, found) for key, found in zip(families, study.crossings())]


def report(data: Mapping[str, Any]) -> str:
    """Rates with how well they predict, and crossings, one a line."""
    lines = [f"{'rates, nanoseconds':<28} {'call':>8} {'row':>7} {'pair':>7} {'element':>8} {'mask':>6} {'key':>6} {'lone':>6}   predicted / measured"]
    lines[0] += f" at {', '.join(map(str, QUANTILES))} %"
    for place, engine in itertools.product(("rates", "left_out"), ENGINES):
        for entry in data[place]:
            rate, spread = Rate(**entry[engine]), entry["spread"][engine]
            name = f"{engine}, {entry['dtype']}, {_threads(entry['threads'])}"
            terms = f"{rate.call:8,.0f} {rate.row:7.1f} {rate.pair:7.3f} {rate.element:8.4f} {rate.mask:6.3f} {rate.key:6.3f} {rate.lone_key:6.3f}"
            note = "  left out" * (place == "left_out")
            lines.append(f"{name:<28} {terms}   {'  '.join(f'{value:.2f}' for value in spread)}{note}")
    if data["left_out"]:
        lines.append("left out: they predict too badly, and nearby ones serve instead; measure again on a quiet machine")
    for entry in data["crossings"]:
        lines.append(f"{_family(entry['family'], entry['dtype'], entry['head_dim'], entry['threads'])}: {entry['says']}")
    return "\n".join(lines)


def changes(old: Table, new: Table) -> list[str]:
    """Where dispatch chooses another engine now, over the lengths and patterns that were measured."""
    found = []
    for (pattern, dtype, head_dim), threads in itertools.product(FAMILIES, sorted({t for t, _ in new.rates})):
        choices = []
        for length in LENGTHS:
            sizes = Call(pattern, HEADS, length, length, head_dim).sizes(dtype)
            choices.append(tuple(dispatch.choose(parse(pattern), sizes, threads, known).impl for known in (old, new)))
        moved = []
        for (before, after), group in itertools.groupby(zip(LENGTHS, choices), key=lambda pair: pair[1]):
            lengths = [length for length, _ in group]
            if before != after:
                span = f"{lengths[0]} to {lengths[-1]}" if len(lengths) > 1 else f"{lengths[0]}"
                moved.append(f"{span} {before} -> {after}")
        if moved:
            found.append(f"{_family(pattern, dtype, head_dim, threads)}: {', '.join(moved)}")
    return found


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _family(pattern: str, dtype: str, head_dim: int, threads: int) -> str:
    return f"{pattern}, {dtype}, head_dim {head_dim}, {_threads(threads)}"


def _timed(dtype: str, engine: str, call: Call) -> Case:
    name = f"{dtype}/{engine}/{call.pattern}/{call.heads}x{call.q_len}x{call.kv_len}x{call.head_dim}"
    return Case(name, TIMED, {"impl": engine, "dtype": dtype, **call._asdict()}, limit_s=1.0)


def _seconds(record: Record) -> float | None:
    """Median over valid blocks of their undisturbed calls' median; None where there is none."""
    medians = [statistics.median(block.clean_pairs()[1]) for block in record.blocks if block.valid]
    return statistics.median(medians) if medians else None


def _require_right(run: Run) -> None:
    for found in results(run, POLICY):
        if found.verdict in (Verdict.WRONG, Verdict.SUSPICIOUS):
            raise RuntimeError(f"{found.id}: {found.reason}")


def _undisturbed(run: Run) -> str:
    share = clean_share(run)
    return "nothing was timed" if share is None else f"{share:.0%} of the timed halves were undisturbed"


def _rates_entry(threads: int, dtype: str, fits: Mapping[str, Fit]) -> dict[str, Any]:
    return {
        "threads": threads,
        "dtype": dtype,
        **{engine: {name: float(f"{term:.4g}") for name, term in found.rate._asdict().items()} for engine, found in fits.items()},
        "spread": {engine: [round(value, 3) for value in found.spread] for engine, found in fits.items()},
        "samples": {engine: found.samples for engine, found in fits.items()},
    }


def _crossing_entry(pattern: str, dtype: str, head_dim: int, threads: int, found: Crossing) -> dict[str, Any]:
    return {
        "family": pattern,
        "dtype": dtype,
        "head_dim": head_dim,
        "heads": HEADS,
        "threads": threads,
        "dense_from": found.loses_from,
        "low": found.loses,
        "high": found.wins,
        "estimate": found.estimate and round(found.estimate, 1),
        "says": sentence(found),
        "speedups": {str(probe.size): probe.speedup and round(probe.speedup, 3) for probe in found.probes},
    }
