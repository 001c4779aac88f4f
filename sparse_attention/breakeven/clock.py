"""How long a call takes on a device. A further device is one more class like these."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from .peaks import Peak, cpu_peak


class Clock:
    """Made without arguments, in the process that measures. `time`, `settle` and `least_s` make a clock; the rest tells more
    about the device where that is known, and has these defaults in a class that is not derived from this one too.
    """

    least_s: float  # a timed half shorter than this is repeated in an inner loop
    on_threads = False  # whether what is timed runs on the threads that were asked for

    def time(self, call: Callable[[], Any], inner: int) -> float:
        """Seconds for one of `inner` calls made in a row."""
        raise NotImplementedError

    def settle(self) -> None:
        """Return once the device is idle."""
        raise NotImplementedError

    def rest(self) -> None:
        """Wait until the last half no longer holds the device back; told before the next, in the time of neither."""

    def together(self, calls: Sequence[Callable[[], Any]]) -> None:
        """Told before calls are raced against each other, so that they are timed in one way."""

    def figures(self, call: Callable[[], Any]) -> dict[str, float]:
        """Further figures of a call that was timed, in seconds: for information."""
        return {}

    def speed(self) -> float | None:
        """How fast the device's clock ran in the last timed half, in any unit; None where it cannot be told."""
        return None

    def throttled(self) -> str:
        """Why the device was held back in the last timed half; "" where it was not, or cannot be told."""
        return ""

    def average_speed(self) -> float | None:
        """The mean of the device's clock over the call of the last timed half, counted rather than read now and then, in any unit;
        None where it cannot be told.
        """
        return None

    def capped(self) -> str:
        """What held the device's clock back in the last timed half, if that matters only where `average_speed` is not known of both sides."""
        return ""

    def unfinished(self, call: Callable[[], Any]) -> tuple[float, float] | None:
        """Seconds until a call was over for whoever waits for it as `time` does, and until the whole device was idle."""
        return None

    def peak(self) -> Peak | None:
        """What no kernel on this device can exceed."""
        return None

    def as_dict(self) -> dict[str, Any]:
        """Evidence about the device, for the record."""
        return {}


class CpuClock(Clock):
    least_s = 2e-3
    on_threads = True

    def __init__(self):
        self._speeds: list[float] = []

    def time(self, call: Callable[[], Any], inner: int) -> float:
        repeat = range(inner)
        start = time.perf_counter_ns()
        for _ in repeat:
            call()
        return (time.perf_counter_ns() - start) * 1e-9 / inner

    def settle(self) -> None:
        pass

    def speed(self) -> float:
        """Turns of an empty loop a second on this thread's core, the best of some tries of about 10 us."""
        best = math.inf
        for _ in range(_SPINS):
            start = time.perf_counter_ns()
            for _ in _SPIN:
                pass
            best = min(best, time.perf_counter_ns() - start)
        self._speeds.append(len(_SPIN) / best * 1e9)
        return self._speeds[-1]

    def peak(self) -> Peak | None:
        return cpu_peak()

    def as_dict(self) -> dict[str, Any]:
        if not self._speeds:
            return {}
        return {"spins_per_s": max(self._speeds), "slowest_share": min(self._speeds) / max(self._speeds)}


_SPIN, _SPINS = range(1000), 5
_CUDA = f"{__package__}.cuda_clock"
CLOCKS: dict[str, str | type] = {"cpu": CpuClock, "cuda": f"{_CUDA}:CudaClock", "cuda-graph": f"{_CUDA}:CudaGraphClock"}


def kind(device: str) -> type:
    """The clock class of `device`: a key of CLOCKS, or the "package.module:Class" of one of your own."""
    found = CLOCKS.get(device, device)
    if isinstance(found, type):
        return found
    module, _, name = found.partition(":")
    if not name:
        raise ValueError(f"device must be one of {', '.join(CLOCKS)} or 'package.module:Class', got {device!r}")
    return getattr(importlib.import_module(module), name)


def make(device: str) -> Clock:
    """A clock of `device`; one of your own that lacks what a clock need not have gets the defaults."""
    found = kind(device)
    return found() if issubclass(found, Clock) else type(found.__name__, (found, Clock), {})()
