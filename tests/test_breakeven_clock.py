"""Clocks whose device is made up: what is enqueued, captured, read and kept. On a real one: test_cuda_clock.py."""

import contextlib
import ctypes
import random
import types

import pytest

from sparse_attention.breakeven import Workload, sampling, suspicion
from sparse_attention.breakeven.clock import Clock, CpuClock, kind, make
from sparse_attention.breakeven.cuda_clock import CudaClock, CudaGraphClock
from sparse_attention.breakeven.nvml import Absent, Nvml, Reading
from tests import breakeven_toys as toys

LAUNCH_S = 8e-6


class FakeCuda:
    """A device whose time passes as work is launched; in a graph launches take none. `cold` adds to a call after a flush."""

    def __init__(self, capturable=True):
        self.now, self.aside, self.capturing, self.capturable = 0.0, 0.0, None, capturable
        self.log, self.captures, self.flushed = [], 0, False
        self.late = 0  # of the next calls

    def work(self, name, seconds, cold=0.0):
        def run():
            extra = cold if self.flushed else 0.0
            self.flushed = False
            self.now += seconds + extra + (0.0 if self.replaying else LAUNCH_S)
            self.log.append(name)

        if self.capturing is not None:
            if not self.capturable:
                raise RuntimeError("operation not permitted when stream is capturing")
            self.capturing.append(run)
        else:
            run()

    replaying = False

    def get_device_properties(self, device):
        return types.SimpleNamespace(L2_cache_size=100, major=9, minor=0, multi_processor_count=132)

    def current_device(self):
        return 0

    def is_current_stream_capturing(self):
        return self.capturing is not None

    def synchronize(self):
        pass

    def Event(self, enable_timing=False, external=False):
        cuda = self

        class Event:
            def record(self):
                if cuda.capturing is None:
                    self.at = cuda.now
                else:
                    assert external, "an event without external=True is no node of a graph"
                    cuda.capturing.append(self.mark)

            def mark(self):
                self.at = cuda.now

            def synchronize(self):
                pass

            def query(self):
                cuda.late -= 1
                return cuda.late >= 0

            def elapsed_time(self, stop):
                return 1e3 * (stop.at - self.at)

        return Event()

    def CUDAGraph(self):
        cuda = self

        class Graph:
            nodes: list

            def replay(self):
                cuda.replaying = True
                for node in self.nodes:
                    node()
                cuda.replaying = False

        return Graph()

    @contextlib.contextmanager
    def graph(self, graph):
        graph.nodes = self.capturing = []
        self.captures += 1
        try:
            yield
        finally:
            self.capturing = None


class Flush:
    def __init__(self, cuda):
        self.cuda = cuda

    def __call__(self):
        def run():
            self.cuda.now += 40e-6
            self.cuda.flushed = True
            self.cuda.log.append("flush")

        run() if self.cuda.capturing is None else self.cuda.capturing.append(run)


def clock(cuda, cls=CudaClock, nvml="not here", cycles="not here"):
    return cls(cuda, Flush(cuda), nvml, cycles)


def test_a_long_call_is_timed_as_it_is_called_and_cold():
    cuda = FakeCuda()
    found = clock(cuda).time(lambda: cuda.work("long", 1e-3, cold=1e-4), 4)
    assert found == pytest.approx(1e-3 + 1e-4 + LAUNCH_S), "each of the four is cold, and no flush is timed"
    assert cuda.captures == 0


def test_a_short_call_is_timed_in_a_graph_and_both_figures_are_kept():
    cuda = FakeCuda()
    timer = clock(cuda)

    def call():
        cuda.work("short", 10e-6, cold=5e-6)

    assert timer.time(call, 3) == pytest.approx(15e-6), "launches are not timed, the cold cache is, the flush is not"
    kept = timer.figures(call)
    assert kept["eager_s"] == pytest.approx(15e-6 + LAUNCH_S)
    assert kept["warm_s"] == pytest.approx(10e-6, rel=0.1)
    before = cuda.captures
    timer.time(call, 3)
    assert cuda.captures == before, "the graph is replayed, not made again"
    assert cuda.log[-6:] == ["flush", "short"] * 3


def test_the_device_is_kept_busy_until_a_slow_host_has_queued_the_call(monkeypatch):
    cuda, host = FakeCuda(), types.SimpleNamespace(now=0.0)
    monkeypatch.setattr("sparse_attention.breakeven.cuda_clock.time", types.SimpleNamespace(perf_counter=lambda: host.now))

    def call():
        host.now += 100e-6
        cuda.work("long", 1e-3)

    timer = clock(cuda)
    timer.together([call])
    del cuda.log[:]
    timer.time(call, 2)
    assert cuda.log == (4 * ["flush"] + ["long"]) * 2, "160 us of flushes for 100 us of launching, and half as much again"


def test_a_call_that_the_device_waited_for_is_timed_again_behind_more_flushes():
    cuda = FakeCuda()
    timer = clock(cuda)

    def call():
        cuda.work("long", 1e-3)

    timer.together([call])
    del cuda.log[:]
    cuda.late = 2  # of the first two tries
    timer.time(call, 1)
    assert cuda.log == ["flush", "long"] + 2 * ["flush"] + ["long"] + 4 * ["flush"] + ["long"]
    cuda.late = 1000
    assert timer.time(call, 1) == pytest.approx(1e-3 + LAUNCH_S), "it ends with as many flushes as there may be"
    assert cuda.log[-17:] == 16 * ["flush"] + ["long"]


def test_a_device_under_a_power_cap_rests(monkeypatch):
    slept, numbers, cuda = [], dict(H100), FakeCuda()
    monkeypatch.setattr("sparse_attention.breakeven.cuda_clock.time.sleep", slept.append)
    timer = clock(cuda, nvml=Nvml("1", FakeNvml(numbers)))
    for bits, milliseconds, rest in ((0, 1, None), (4, 1, 4e-3), (4, 10, 20e-3), (4, 100, 100e-3)):
        numbers["nvmlDeviceGetCurrentClocksEventReasons"] = bits
        timer.time(lambda: cuda.work("heavy", 1e-3 * milliseconds), 1)
        del slept[:]
        timer.rest()
        timer.rest()
        assert slept == ([] if rest is None else [pytest.approx(rest, rel=0.1)]), "once"


def test_a_short_call_that_cannot_be_captured_is_timed_as_it_is_called():
    cuda = FakeCuda(capturable=False)
    timer = clock(cuda)
    assert timer.time(lambda: cuda.work("short", 10e-6), 2) == pytest.approx(10e-6 + LAUNCH_S)
    assert any("not permitted" in said for said in timer.as_dict()["not captured"])


def test_rivals_are_timed_in_one_way():
    cuda = FakeCuda()
    timer = clock(cuda)

    def short():
        cuda.work("short", 10e-6)

    def long():
        cuda.work("long", 1e-3)

    timer.together([short, long])
    assert timer.time(long, 1) == pytest.approx(1e-3), "the long one too, without its launch"
    timer.together([long])
    assert timer.time(long, 1) == pytest.approx(1e-3 + LAUNCH_S), "alone it is long enough"


def test_the_graph_clock_captures_long_calls_too():
    cuda = FakeCuda()
    assert clock(cuda, CudaGraphClock).time(lambda: cuda.work("long", 1e-3), 1) == pytest.approx(1e-3)


def test_a_block_on_the_device_keeps_both_figures():
    cuda = FakeCuda()
    workload = Workload(lambda: cuda.work("fast", 10e-6), {"plain": lambda: cuda.work("slow", 30e-6)})
    plans = {"g": sampling.GroupPlan(4, 1, {"a": 2, "": 2})}
    found = sampling.measure([sampling.Entry("a", workload, "g", "plain")], plans, clock(cuda), seed=0)["a"]
    assert found.candidate_s == pytest.approx([10e-6] * 4) and found.baseline_s == pytest.approx([30e-6] * 4)
    assert found.figures["candidate_eager_s"] == pytest.approx(10e-6 + LAUNCH_S)
    assert found.figures["baseline_eager_s"] == pytest.approx(30e-6 + LAUNCH_S)


def test_work_on_a_side_stream_is_seen(monkeypatch):
    class Device(FakeCuda):
        def synchronize(self):
            self.now += self.aside
            self.aside = 0.0

    cuda = Device()
    monkeypatch.setattr("sparse_attention.breakeven.cuda_clock.time", types.SimpleNamespace(perf_counter=lambda: cuda.now))

    def aside():
        cuda.now += LAUNCH_S
        cuda.aside += 1e-3

    def aside_but_slow_at_first():
        cuda.now += LAUNCH_S if ready else 1.0
        cuda.aside += 1e-3 if ready else 0.9e-3
        ready.append(True)

    ready = []
    assert "another stream" in suspicion.left_running(aside, clock(cuda))
    assert "another stream" in suspicion.left_running(aside_but_slow_at_first, clock(cuda))
    assert suspicion.left_running(lambda: cuda.work("honest", 1e-3), clock(cuda)) == ""


class FakeNvml:
    """The library: functions that fill a ctypes number."""

    def __init__(self, numbers, missing=()):
        self._numbers, self._missing = numbers, missing

    def __getattr__(self, name):
        if name.startswith("__") or name in self._missing:
            raise AttributeError(name)

        def function(*arguments):
            if name in ("nvmlInit_v2", "nvmlDeviceGetHandleByUUID"):
                self.uuid = arguments[0] if arguments else None
                return 0
            value = self._numbers.get(name)
            if value is None:
                return 3  # not supported
            arguments[-1]._obj.value = value
            return 0

        return function


H100 = {
    "nvmlDeviceGetClockInfo": 1755,
    "nvmlDeviceGetMaxClockInfo": 1980,
    "nvmlDeviceGetCurrentClocksThrottleReasons": 0,
    "nvmlDeviceGetMemoryBusWidth": 5120,
    "nvmlDeviceGetPowerUsage": 312_000,
}


def test_nvml_is_read():
    library = FakeNvml(H100, missing=("nvmlDeviceGetCurrentClocksEventReasons",))
    driver = Nvml("1234", library)
    assert library.uuid == b"GPU-1234"
    assert driver.read() == Reading(1755, 0)
    assert driver.fastest_hertz == 1.98e9
    assert driver.bytes_per_s == 2 * 1.98e9 * 5120 / 8
    assert driver.state() == {"watts": 312.0}


def test_an_old_driver_tells_less():
    driver = Nvml("1234", FakeNvml({}))
    assert driver.fastest_hertz is None and driver.bytes_per_s is None
    with pytest.raises(Absent, match="returned 3"):
        driver.read()


@pytest.mark.parametrize("bits, hard, capped", [(0, "", False), (1, "", False), (4, "", True), (8, "hardware slowdown", False)])
def test_reasons(bits, hard, capped):
    assert (Reading(1000, bits).hard, Reading(1000, bits).power_capped) == (hard, capped)


def test_without_nvml_it_is_called_absent(monkeypatch):
    def no_library(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    with pytest.raises(Absent, match="libnvidia-ml.so.1"):
        Nvml("1234")
    found = clock(FakeCuda(), nvml="libnvidia-ml.so.1 is not here")
    assert found.as_dict()["nvml"].startswith("absent")
    assert found.speed() is None and found.throttled() == ""


def test_throttling_is_told():
    numbers = dict(H100)
    cuda = FakeCuda()
    timer = clock(cuda, nvml=Nvml("1", FakeNvml(numbers)))
    for mhz, bits, said in [(1980, 0, ""), (1900, 4, ""), (1500, 4, "power cap"), (1980, 0x40, "hardware thermal slowdown")]:
        numbers["nvmlDeviceGetClockInfo"] = mhz
        numbers["nvmlDeviceGetCurrentClocksEventReasons"] = bits
        timer.time(lambda: cuda.work("x", 1e-3), 1)
        assert (timer.speed(), timer.throttled()) == (mhz, said)
    assert timer.as_dict()["sm_mhz"] == [1500, 1980] and timer.as_dict()["reasons"] == 0x44


class Uneven(toys.ToldClock):
    """Slow, or throttled, in some halves."""

    def __init__(self, speeds, throttled=("",)):
        self._speeds, self._throttled, self._turn = speeds, throttled, -1

    def time(self, call, inner):
        self._turn += 1
        return super().time(call, inner)

    def speed(self):
        return self._speeds[self._turn % len(self._speeds)]

    def throttled(self):
        return self._throttled[self._turn % len(self._throttled)]


@pytest.fixture
def undisturbed(monkeypatch):
    """Whatever else runs on this machine."""
    monkeypatch.setattr(sampling.Usage, "contended", False)


def block(timer, pairs=20):
    entry = sampling.Entry("a", toys.doubling(), "g", "plain")
    return sampling.measure([entry], {"g": sampling.GroupPlan(pairs, 0, {"a": 1, "": 1})}, timer, seed=0)["a"]


@pytest.mark.parametrize(
    "speeds, slow", [([1000.0], 0), ([1000.0, 760.0], 0), ([1000.0, 1000.0, 740.0, 1000.0], 10), ([1000.0, 740.0], 20)]
)
def test_pairs_with_a_slow_clock_are_invalid(speeds, slow, undisturbed):
    found = block(Uneven(speeds))
    assert found.clean.count(False) == slow
    assert found.disturbed.get("slow clock", 0) == slow


def test_pairs_that_were_throttled_are_invalid(undisturbed):
    found = block(Uneven([1000.0], ["", "", "power cap", ""]))
    assert found.disturbed["throttled (power cap)"] == 10 == found.clean.count(False)


def test_a_processor_says_how_fast_it_is():
    timer = CpuClock()
    seen = [timer.speed() for _ in range(5)]
    assert min(seen) > 1e6
    assert timer.as_dict() == {"spins_per_s": max(seen), "slowest_share": min(seen) / max(seen)}


class Bare:
    """All that a clock of one's own must have."""

    least_s = 1e-3

    def time(self, call, inner):
        call()
        return random.uniform(0.9, 1.1)

    def settle(self):
        pass


def test_a_bare_clock_is_enough():
    device = f"{__name__}:Bare"
    assert kind(device) is Bare
    timer = make(device)
    assert isinstance(timer, Clock) and timer.least_s == 1e-3
    assert timer.peak() is None and timer.speed() is None and timer.as_dict() == {}
    assert block(timer, pairs=3).figures == {}
