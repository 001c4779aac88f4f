"""How long a call takes on a device. A further device is one more class like these."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any, Protocol


class Clock(Protocol):
    """Made without arguments, in the process that measures."""

    least_s: float  # a timed half shorter than this is repeated in an inner loop

    def time(self, call: Callable[[], Any], inner: int) -> float:
        """Seconds for one of `inner` calls made in a row."""
        ...

    def settle(self) -> None:
        """Return once the device is idle."""
        ...


class CpuClock:
    least_s = 2e-3
    on_threads = True  # what is timed runs on the threads that were asked for

    def time(self, call: Callable[[], Any], inner: int) -> float:
        repeat = range(inner)
        start = time.perf_counter_ns()
        for _ in repeat:
            call()
        return (time.perf_counter_ns() - start) * 1e-9 / inner

    def settle(self) -> None:
        pass


class CudaClock:
    """Events around the calls on the current stream, with the L2 cache overwritten before each half."""

    least_s = 50e-6

    def __init__(self):
        import torch

        self._cuda = torch.cuda
        l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(2 * l2_bytes, dtype=torch.uint8, device="cuda")

    def time(self, call: Callable[[], Any], inner: int) -> float:
        start, stop = (self._cuda.Event(enable_timing=True) for _ in range(2))
        run = self._runner(call, inner)
        self._flush.zero_()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e-3 / inner

    def settle(self) -> None:
        self._cuda.synchronize()

    def _runner(self, call, inner):
        def run():
            for _ in range(inner):
                call()

        return run


class CudaGraphClock(CudaClock):
    """Replays a captured graph of the inner loop, so that launches are not timed."""

    def __init__(self):
        super().__init__()
        self._graphs: dict[tuple[Callable[[], Any], int], Any] = {}

    def _runner(self, call, inner):
        key = (call, inner)
        if key not in self._graphs:
            call()
            self.settle()
            graph = self._cuda.CUDAGraph()
            with self._cuda.graph(graph):
                super()._runner(call, inner)()
            self._graphs[key] = graph
        return self._graphs[key].replay


CLOCKS: dict[str, type] = {"cpu": CpuClock, "cuda": CudaClock, "cuda-graph": CudaGraphClock}


def kind(device: str) -> type:
    """The clock class of `device`: a key of CLOCKS, or the "package.module:Class" of one of your own."""
    module, _, name = device.partition(":")
    if name:
        return getattr(importlib.import_module(module), name)
    if device not in CLOCKS:
        raise ValueError(f"device must be one of {', '.join(CLOCKS)} or 'package.module:Class', got {device!r}")
    return CLOCKS[device]
