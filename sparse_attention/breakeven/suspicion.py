"""Signs that a candidate was not timed at its work: too fast for the machine, still running elsewhere, or not computed again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .arrays import arrays, is_floating, memory, sample, size
from .clock import Clock
from .peaks import Peak

SLACK = 1.05  # a time must be shorter by this factor than the shortest possible
LONGER = 1.5  # the device is busy for so many times what was timed
LEAST_LEFT_S = 50e-6  # and for so much longer


def too_fast(seconds: float, work: Mapping[str, float], inputs: Sequence[Any], peak: Peak | None) -> str:
    """Why a call cannot have done its `work` in this time; "" where it can, or too little is known."""
    if peak is None:
        return ""
    sizes = [array.dtype.itemsize for array in arrays(list(inputs)) if is_floating(array)]
    least_s, bound = peak.least_s(work, min(sizes, default=1))
    if seconds * SLACK >= least_s:
        return ""
    said = f"{seconds:.3g} s for work that takes at least {least_s:.3g} s: {bound} ({peak.source})"
    return f"faster than this machine allows: {said}"


def left_running(call: Any, clock: Clock) -> str:
    """Why the clock does not see all of a call's work: the device goes on after the call is over for those who wait for it."""
    found = clock.unfinished(call)
    if found is None:
        return ""
    here, whole = found
    if whole < LONGER * here or whole - here < LEAST_LEFT_S:
        return ""
    said = f"over after {here:.3g} s on the stream that is timed, but the device was busy for {whole:.3g} s"
    return f"work on another stream: {said}"


@dataclass(frozen=True)
class Print:
    """Some values of an output, to tell whether it changed."""

    values: tuple[bytes, ...]
    telling: bool  # among them are floating-point numbers that would hardly come out equal twice

    @classmethod
    def of(cls, output: Any) -> Print:
        taken = [(array, some) for array in arrays(output) if (some := sample(array)) is not None]
        telling = any(is_floating(array) and len(set(some.tolist())) > 8 for array, some in taken)
        return cls(tuple(some.tobytes() for _, some in taken), telling)


def same_memory(one: Any, other: Any) -> bool:
    """Whether two outputs that both still live share an array's memory."""
    return bool({memory(a) for a in arrays(one) if size(a)} & {memory(a) for a in arrays(other) if size(a)})
