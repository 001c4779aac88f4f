"""Checking and timing live workloads in this process. Nothing here decides anything: it returns times and evidence."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .case import Workload
from .clock import Clock
from .machine import Usage

LEAST_PAIRS, MOST_PAIRS = 2, 20


class WrongOutput(Exception):
    """The candidate's output failed its check, or computing it raised."""


@dataclass
class Entry:
    """A case inside a block: what is called, and in which group (one baseline, shared) it is timed."""

    id: str
    workload: Workload
    group: str
    baseline: str | None  # name in workload.baselines; None where a fixed limit is the baseline
    limit_s: float | None = None
    allowance_s: float = 0.0


@dataclass(frozen=True)
class GroupPlan:
    """How a group is measured: pairs kept, rounds dropped before them, calls in a row for each member."""

    pairs: int
    warmup: int
    inner: Mapping[str, int]  # entry id, or "" for the baseline

    def as_dict(self) -> dict[str, Any]:
        return {"pairs": self.pairs, "warmup": self.warmup, "inner": dict(self.inner)}


@dataclass
class Samples:
    """One block of one case: seconds a call, and whether the pair was undisturbed."""

    baseline_s: list[float] = field(default_factory=list)
    candidate_s: list[float] = field(default_factory=list)
    clean: list[bool] = field(default_factory=list)


def check(workload: Workload) -> None:
    """Run the candidate over freed memory full of NaN and check what it returns; without a check, against the first baseline."""
    try:
        if len(workload.inputs):
            poison(workload.candidate(), workload.inputs)
        output = workload.candidate()
        if workload.check is not None:
            workload.check(output)
        elif workload.baselines:
            agree(output, next(iter(workload.baselines.values()))())
    except Exception as error:
        raise WrongOutput(summary(error)) from error


def summary(error: Exception) -> str:
    """The error in one line; long ones, such as arrays compared, are cut."""
    kind = "" if isinstance(error, WrongOutput) else type(error).__name__
    return ": ".join(filter(None, (kind, " ".join(str(error).split())[:300])))


def check_fresh(workload: Workload, seed: int) -> None:
    """Check, change the inputs in place, check again: an output kept from an earlier call does not survive this."""
    check(workload)
    if workload.refresh is not None:
        workload.refresh(seed)
    elif len(workload.inputs):
        redraw(workload.inputs, seed)
    else:
        return
    try:
        check(workload)
    except WrongOutput as error:
        raise WrongOutput(f"after its inputs changed: {error}") from error


def agree(output: Any, expected: Any) -> None:
    """AssertionError unless the two are equal, floating-point numbers within the usual tolerance of their type."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(expected, torch.Tensor):
        torch.testing.assert_close(output, expected)
    elif isinstance(expected, (tuple, list)):
        assert len(output) == len(expected), f"{len(output)} outputs, the baseline has {len(expected)}"
        for one, other in zip(output, expected):
            agree(one, other)
    elif hasattr(expected, "dtype") or isinstance(expected, float):
        import numpy as np

        np.testing.assert_allclose(output, expected, rtol=1e-5)
    else:
        assert output == expected, f"{output!r} is not the baseline's {expected!r}"


def poison(output: Any, inputs: Sequence[Any]) -> None:
    """Fill floating-point outputs with NaN; once freed, their memory is what the next call is likely to be given.

    Needs the inputs, so that an output that is a view of one is left alone; does nothing when there are none.
    """
    kept = {_memory(array) for array in _arrays(list(inputs))}
    for array in _arrays(output) if kept else ():
        if not _is_floating(array) or _memory(array) in kept:
            continue
        try:
            array.detach().fill_(float("nan")) if hasattr(array, "detach") else array.fill(float("nan"))
        except (RuntimeError, ValueError):
            pass  # a read-only view


def redraw(inputs: Sequence[Any], seed: int) -> None:
    """New normal values of the same standard deviation, in place, in floating-point tensors and arrays."""
    import numpy as np

    generator = np.random.default_rng(seed)
    for array in inputs:
        if not _is_floating(array):
            continue
        drawn = generator.standard_normal(tuple(array.shape), dtype=np.float32)
        if hasattr(array, "detach"):
            import torch

            with torch.no_grad():
                array.copy_(torch.from_numpy(drawn) * (float(array.float().std()) or 1.0))
        else:
            array[...] = drawn * (array.std() or 1.0)


def estimate(call: Callable[[], Any], clock: Clock) -> float:
    """Seconds for one call, roughly: repeated until it fills the clock's least half or twenty times are known."""
    seconds = clock.time(call, 1)
    for _ in range(20):
        inner = inner_calls(seconds, clock.least_s)
        if seconds * inner > 10 * clock.least_s:
            break
        seconds = min(seconds, clock.time(call, inner))
    return seconds


def inner_calls(seconds: float, least_s: float) -> int:
    """Calls in a row that make a half of at least about `least_s` seconds."""
    return max(1, min(100_000, round(least_s / max(seconds, 1e-9))))


def plan(groups: Mapping[str, Mapping[str, float]], least_s: float, budget_s: float) -> dict[str, GroupPlan]:
    """Share `budget_s` over groups of {member: seconds a call}: cheap groups get MOST_PAIRS, dear ones fewer."""
    inner = {g: {m: inner_calls(s, least_s) for m, s in members.items()} for g, members in groups.items()}
    rounds = {g: sum(s * inner[g][m] for m, s in members.items()) for g, members in groups.items()}

    def pairs(group: str, share_s: float) -> tuple[int, int]:
        warmup = 3 if rounds[group] < 0.1 else 1 if rounds[group] < 0.5 else 0
        least = LEAST_PAIRS if rounds[group] < 1.5 else 1  # seconds; a longer call evens itself out
        return max(least, min(MOST_PAIRS, int(share_s / rounds[group]) - warmup)), warmup

    def cost(share_s: float) -> float:
        return sum(sum(pairs(g, share_s)) * rounds[g] for g in groups)

    low, high = 0.0, max(budget_s, 0.0)
    for _ in range(40 if budget_s > 0 else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= budget_s else (low, middle)
    return {g: GroupPlan(*pairs(g, low), inner[g]) for g in groups}


def planned_seconds(groups: Mapping[str, Mapping[str, float]], plans: Mapping[str, GroupPlan]) -> float:
    total = 0.0
    for group, members in groups.items():
        chosen = plans[group]
        total += (chosen.pairs + chosen.warmup) * sum(s * chosen.inner[m] for m, s in members.items())
    return total


def measure(
    entries: Sequence[Entry],
    plans: Mapping[str, GroupPlan],
    clock: Clock,
    seed: int,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Samples]:
    """One block: groups round-robin, and in each visit the baseline and every candidate once, in random order."""
    order = random.Random(seed)
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.group, []).append(entry)
    for group, members in groups.items():
        if len({tuple(map(id, m.workload.inputs)) for m in members}) > 1:
            raise ValueError(f"cases that share {group!r} must be built over the same input tensors")
    samples = {entry.id: Samples() for entry in entries}
    rounds = max(plans[g].pairs + plans[g].warmup for g in groups)
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            progress(f"round {turn + 1} of {rounds}")
            for group in order.sample(list(groups), len(groups)):
                chosen = plans[group]
                wanted = chosen.pairs + chosen.warmup
                if (turn + 1) * wanted // rounds == turn * wanted // rounds:
                    continue  # groups of few pairs are spread evenly over the block
                visit(groups[group], chosen, clock, order, samples, keep=turn * wanted // rounds >= chosen.warmup)
    finally:
        if was_enabled:
            gc.enable()
    return samples


def visit(
    members: Sequence[Entry], chosen: GroupPlan, clock: Clock, order: random.Random, samples: dict[str, Samples], keep: bool
) -> None:
    """Time the group's baseline and each member once, in random order."""
    calls = {entry.id: entry.workload.candidate for entry in members}
    first = members[0]
    if first.baseline is not None:
        calls[""] = first.workload.baselines[first.baseline]
    times, clean = {}, {}
    for name in order.sample(list(calls), len(calls)):
        clock.settle()
        before = Usage.now()
        times[name] = clock.time(calls[name], chosen.inner[name])
        clean[name] = not Usage.now().since(before).contended
    if not keep:
        return
    for entry in members:
        kept = samples[entry.id]
        kept.baseline_s.append(entry.limit_s if entry.baseline is None else times[""])
        kept.candidate_s.append(times[entry.id])
        kept.clean.append(clean[entry.id] and clean.get("", True))


def _arrays(output: Any) -> list[Any]:
    if isinstance(output, (tuple, list)):
        return [a for item in output for a in _arrays(item)]
    return [output] if hasattr(output, "shape") and hasattr(output, "dtype") else []


def _memory(array: Any) -> int:
    """Address of the storage that `array` is a view of."""
    if hasattr(array, "untyped_storage"):
        return array.untyped_storage().data_ptr()
    while getattr(array, "base", None) is not None:
        array = array.base
    return array.ctypes.data if hasattr(array, "ctypes") else id(array)


def _is_floating(array: Any) -> bool:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return array.is_floating_point()
    return getattr(getattr(array, "dtype", None), "kind", "") == "f"
