"""CUDA devices: every call cold, between two events of its own, as it is called or as a node of a replayed graph."""

from __future__ import annotations

import collections
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from .clock import Clock
from .cold import ColdCache
from .cycles import Cycles
from .nvml import Absent, Nvml, Reading
from .peaks import Peak, gpu_peak

Call = Callable[[], Any]
Events = list[tuple[Any, Any]]

WARM_CALLS = 10  # in a row, for the figure without a flush
MOST_FLUSHES = 16  # before one call
REST, MOST_REST_S = 4.0, 0.02  # after a half under a power cap: so many times as long as it took, up to this or as long as it took


class CudaClock(Clock):
    """The L2 cache is made cold before each call and outside its events, as often as keeps the stream busy until the call's
    launch is queued; a call that the device came to before that is timed again behind more of it. Calls of less than
    `graph_below_s` are captured, each with its own flush and events as nodes of the graph, and what they take when launched one by
    one, after a single flush, is kept beside.

    A device under a power cap rests after each half, so that heavy calls do not slow down the ones that follow them. What the clock
    of a call outside a graph was on average is counted on the device.
    """

    least_s = 50e-6
    graph_below_s = 50e-6

    def __init__(self, cuda: Any = None, flush: Any = None, nvml: Nvml | str | None = None, cycles: Cycles | str | None = None):
        """Without arguments, of torch's current device; otherwise what stands in for `torch.cuda`, for what makes the
        cache cold, NVML and the cycle counters, or why there are none.
        """
        if cuda is None:
            import torch

            cuda = torch.cuda
        self._cuda = cuda
        self._properties = cuda.get_device_properties(cuda.current_device())
        self._flush = ColdCache(self._properties) if flush is None else flush
        self._nvml = _nvml(self._properties) if nvml is None else nvml
        self._cycles = _cycles(self._properties) if cycles is None else cycles
        self._average: float | None = None  # megahertz in the last half
        self._rest_s = 0.0  # before the next
        self._calls: dict[int, Call] = {}  # keeps them alive, so that no other has the same id
        self._flushes = 1  # before each call, whichever it is: what went before decides about clocks and caches
        self._queued_s: dict[int, float] = {}  # what each takes when its launch does not count
        self._figures: dict[int, dict[str, float]] = {}
        self._graphs: dict[tuple[int, int], tuple[Any, Events]] = {}
        self._in_graphs: set[int] = set()
        self._flush_s: float | None = None  # what that takes
        self._reading: Reading | None = None
        self._seen: list[Reading] = []
        self._refused: dict[str, int] = collections.Counter()
        self._late = [0, 0]  # calls that the device waited for: timed again, and kept at the most flushes

    def time(self, call: Call, inner: int) -> float:
        if id(call) not in self._calls:
            self.together([call])
        return statistics.fmean(self._timed(call, inner, id(call) in self._in_graphs, queued=True))

    def settle(self) -> None:
        self._cuda.synchronize()

    def rest(self) -> None:
        if self._rest_s:
            time.sleep(self._rest_s)
            self._rest_s = 0.0

    def together(self, calls: Sequence[Call]) -> None:
        """In graphs, all of them, if the shortest is short enough and each can be captured."""
        for call in calls:
            if id(call) not in self._calls:
                self._calls[id(call)] = call
                launch_s = self._launch_s(call)
                self._figures[id(call)] = {"eager_s": statistics.median(self._timed(call, 5, False))}
                self._flushes = max(self._flushes, self._flushes_for(launch_s))
                self._queued_s[id(call)] = statistics.median(self._timed(call, 5, False, queued=True))
        names = {id(call) for call in calls}
        short = min(self._queued_s[name] for name in names) < self.graph_below_s
        if short and all(self._captured(call) for call in calls):
            self._in_graphs |= names
        else:
            self._in_graphs -= names

    def figures(self, call: Call) -> dict[str, float]:
        """`eager_s`: launched one by one; `warm_s`: in a row without a flush, in a graph if it is timed in one."""
        found = dict(self._figures.get(id(call), {}))
        if found:
            found["warm_s"] = self._warm(call)
        return found

    def speed(self) -> float | None:
        return float(self._reading.sm_mhz) if self._reading else None

    def throttled(self) -> str:
        """A power cap counts only where nobody counted the clock, and it took it below nine tenths of the fastest seen: heavy work
        always meets it.
        """
        if self._reading is None:
            return ""
        return self._reading.hard or ("" if self._average else self.capped())

    def capped(self) -> str:
        deep = self._reading and self._reading.power_capped and self._reading.sm_mhz < 0.9 * max(r.sm_mhz for r in self._seen)
        return "power cap" if deep else ""

    def average_speed(self) -> float | None:
        return self._average

    def unfinished(self, call: Call) -> tuple[float, float]:
        found = []
        call()  # a first call that makes things ready would hide what it leaves behind
        for _ in range(3):
            stop = self._cuda.Event(enable_timing=False)
            self.settle()
            start = time.perf_counter()
            call()
            stop.record()
            stop.synchronize()
            here = time.perf_counter() - start
            self.settle()
            found.append((here, time.perf_counter() - start))
        return min(found, key=lambda seen: seen[1] - seen[0])

    def peak(self) -> Peak:
        return gpu_peak(self._properties, None if isinstance(self._nvml, str) else self._nvml)

    def as_dict(self) -> dict[str, Any]:
        about: dict[str, Any] = {"not captured": dict(self._refused)} if self._refused else {}
        about |= {"cycles": f"absent: {self._cycles}"} if isinstance(self._cycles, str) else {}
        refused = getattr(self._flush, "refused", "")
        about |= {"cache": f"overwritten, not read: {refused}"} if refused else {}
        about |= {"late calls": dict(zip(("timed again", "kept"), self._late))} if any(self._late) else {}
        if isinstance(self._nvml, str):
            return {"nvml": f"absent: {self._nvml}", **about}
        clocks = [reading.sm_mhz for reading in self._seen]
        bits = 0
        for reading in self._seen:
            bits |= reading.reasons
        about |= {"sm_mhz": [min(clocks), max(clocks)]} if clocks else {}
        return {"nvml": "read", "reasons": bits, **about, **self._nvml.state()}

    def _timed(self, call: Call, inner: int, in_graph: bool, queued: bool = False) -> list[float]:
        """Seconds of each of `inner` calls; with `queued` the device did not wait for their launch."""
        self.rest()
        if in_graph:
            graph, events = self._graph(call, inner)
            graph.replay()
        else:
            events = self._launched(call, inner, queued)
        self._read()  # while the device works
        self.settle()
        taken = [start.elapsed_time(stop) * 1e-3 for start, stop in events]
        self._average = self._cycles.megahertz() if not in_graph and self._counts(events) else None
        if self._reading is not None and self._reading.power_capped:
            self._rest_s = min(REST * sum(taken), max(MOST_REST_S, sum(taken)))
        return taken

    def _launch_s(self, call: Call) -> float:
        """What queueing a call takes the host; the first of three makes things ready."""
        took = []
        for _ in range(3):
            self.settle()
            start = time.perf_counter()
            call()
            took.append(time.perf_counter() - start)
        return statistics.median(took)

    def _flushes_for(self, launch_s: float) -> int:
        if self._flush_s is None:
            ((start, stop),) = self._events(1)
            self._flush()
            start.record()
            self._flush()
            stop.record()
            self.settle()
            self._flush_s = start.elapsed_time(stop) * 1e-3
        return min(MOST_FLUSHES, math.ceil(1.5 * launch_s / self._flush_s)) if self._flush_s > 0 else 1

    def _launched(self, call: Call, inner: int, queued: bool) -> Events:
        while True:
            events = self._events(inner)
            late = self._enqueue(call, events, self._flushes if queued else 1)
            if not (queued and late):
                return events
            last = self._flushes >= MOST_FLUSHES
            self._late[last] += late
            if last:
                return events
            self._flushes = min(2 * self._flushes, MOST_FLUSHES)
            self.settle()

    def _enqueue(self, call: Call, events: Events, flushes: int) -> int:
        """How many calls the device came to before they were queued; 0 in a capture."""
        late = 0
        for start, stop in events:
            for _ in range(flushes):
                self._flush()
            self._mark(0, events)
            start.record()
            call()
            stop.record()
            self._mark(1, events)
            late += not self._cuda.is_current_stream_capturing() and start.query()
        return late

    def _events(self, count: int, **external: bool) -> Events:
        def event():
            return self._cuda.Event(enable_timing=True, **external)

        return [(event(), event()) for _ in range(count)]

    def _graph(self, call: Call, inner: int) -> tuple[Any, Events]:
        key = id(call), inner
        if key not in self._graphs:
            events = self._events(inner, external=True)  # nodes of the graph, not dependencies
            self._graphs[key] = self._capture(lambda: self._enqueue(call, events, 1)), events
        return self._graphs[key]

    def _capture(self, work: Call) -> Any:
        self.settle()
        graph = self._cuda.CUDAGraph()
        with self._cuda.graph(graph):
            work()
        graph.replay()
        self.settle()
        return graph

    def _captured(self, call: Call) -> bool:
        try:
            self._graph(call, 1)
        except Exception as error:  # whatever a kernel does that a capture forbids, or a torch without such events
            self._refused[" ".join(f"{type(error).__name__}: {error}".split())[:120]] += 1
            self.settle()
            return False
        return True

    def _warm(self, call: Call) -> float:
        def row():
            for _ in range(WARM_CALLS):
                call()

        run = self._capture(row).replay if id(call) in self._in_graphs else row
        ((start, stop),) = self._events(1)
        run()
        start.record()
        run()
        stop.record()
        self.settle()
        return start.elapsed_time(stop) * 1e-3 / WARM_CALLS

    def _counts(self, events: Events) -> bool:
        """Of one call alone: between several the cache is made cold, at another clock."""
        return len(events) == 1 and not isinstance(self._cycles, str)

    def _mark(self, row: int, events: Events) -> None:
        if self._counts(events) and not self._cuda.is_current_stream_capturing():
            try:
                self._cycles.mark(row, self._cuda.current_stream().cuda_stream)
            except Absent as why:
                self._cycles = str(why)

    def _read(self) -> None:
        if isinstance(self._nvml, str):
            return
        try:
            self._reading = self._nvml.read()
        except Absent as why:
            self._nvml, self._reading = str(why), None
            return
        self._seen.append(self._reading)


class CudaGraphClock(CudaClock):
    """Captures every call that can be."""

    graph_below_s = float("inf")


def _cycles(properties: Any) -> Cycles | str:
    try:
        return Cycles(properties.multi_processor_count)
    except Absent as why:
        return str(why)


def _nvml(properties: Any) -> Nvml | str:
    uuid = getattr(properties, "uuid", None)
    if uuid is None:
        return "torch does not tell the device's UUID"
    try:
        return Nvml(str(uuid))
    except Absent as why:
        return str(why)
