"""A rival whose clock was slower counts at ours: what is counted on the device, judged and said. The device is made up."""

import ctypes
import types

import pytest
import torch

from sparse_attention.breakeven import Run, Sequential, TwoStage, Verdict, Workload, sampling
from sparse_attention.breakeven.cycles import Cycles
from sparse_attention.breakeven.nvml import Absent, Nvml
from sparse_attention.breakeven.report.content import Row
from sparse_attention.breakeven.report.rows import cells
from sparse_attention.breakeven.result import ONLY_COUNTED, block_logs, judge_record, result
from sparse_attention.breakeven.sampling import Half, Pair
from sparse_attention.breakeven.store import Block, Record
from sparse_attention.breakeven.table import markdown, text
from tests import breakeven_stored as stored
from tests.breakeven_toys import case
from tests.test_breakeven_clock import H100, FakeCuda, FakeNvml, clock

CAP, THERMAL, SLOWDOWN = 0x04, 0x20, 0x08
POLICY = Sequential((2,))
STREAM = 77


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch):
    """Nobody rests, and whatever else runs on this machine."""
    monkeypatch.setattr("sparse_attention.breakeven.cuda_clock.time.sleep", lambda seconds: None)
    monkeypatch.setattr(sampling.Usage, "contended", False)


class Driver:
    """Runs `mark` on three multiprocessors, one of which is there only every other time."""

    def __init__(self, device=None, broken=None):
        self.device, self.broken, self.marks = device, broken, 0
        self.cycles, self.ns = 1_000_000, 5_000

    def cuModuleLoadData(self, module, text):
        assert b".entry mark(.param .u64 row)" in text.value
        return 3 if self.broken == "load" else 0

    def cuModuleGetFunction(self, function, module, name):
        assert name.value == b"mark"
        function._obj.value = 9
        return 0

    def cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, arguments, extra):
        if self.broken == "launch":
            return 719
        assert (function.value, gx.value, bx.value, stream.value, extra) == (9, 132, 1, STREAM, None)
        self.marks += 1
        row = ctypes.cast(arguments[0], ctypes.POINTER(ctypes.c_uint64))[0]
        if self.device:
            self.cycles, self.ns = self.device.cycles, int(1e9 * self.device.now) + 5_000
        for sm in (0, 5, 131) if self.marks % 2 else (0, 5):
            at = (ctypes.c_int64 * 2).from_address(row + 16 * sm)
            at[:] = [self.cycles + 1000 * sm, self.ns + sm]
        return 0


def counters(driver):
    return Cycles(132, driver, torch.zeros(2, 1024, 2, dtype=torch.int64))


def test_the_clock_is_the_cycles_over_the_time():
    driver = Driver()
    found = counters(driver)
    assert found.megahertz() is None, "without marks"
    found.mark(0, STREAM)
    driver.cycles, driver.ns = driver.cycles + 1_500_000, driver.ns + 1_000_000
    found.mark(1, STREAM)
    assert found.megahertz() == pytest.approx(1500.0)
    found.mark(1, STREAM)
    assert found.megahertz() is None, "nothing is left of the call before"


@pytest.mark.parametrize("broken", ["load", "launch"])
def test_a_driver_that_refuses_is_absent(broken):
    with pytest.raises(Absent, match="returned"):
        counters(Driver(broken=broken)).mark(0, STREAM)


def test_without_a_driver_the_clock_goes_on(monkeypatch):
    def no_library(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    cuda = FakeCuda()
    timer = clock(cuda, cycles=None)
    timer.time(lambda: cuda.work("x", 1e-3), 1)
    assert timer.average_speed() is None and timer.as_dict()["cycles"] == "absent: libcuda.so.1"


class Device(FakeCuda):
    """Calls that run at a clock of their own; what NVML reads is one behind, as on an H100."""

    def __init__(self, nvml_mhz=1980, reasons=CAP, cycles=True, **how):
        super().__init__(**how)
        self.cycles = 1
        self.numbers = dict(H100, nvmlDeviceGetClockInfo=1980, nvmlDeviceGetCurrentClocksEventReasons=reasons)
        self.driver = Driver(self)
        self.timer = clock(self, nvml=Nvml("1", FakeNvml(self.numbers)), cycles=counters(self.driver) if cycles else "not here")
        self.timer.time(lambda: self.work("before", 1e-3), 1)  # the fastest that NVML saw
        self.numbers["nvmlDeviceGetClockInfo"] = nvml_mhz

    def current_stream(self):
        return types.SimpleNamespace(cuda_stream=STREAM)

    def call(self, seconds, mhz=1700):
        def run():
            before = self.now
            self.work("call", seconds)
            self.cycles += round(1e6 * mhz * (self.now - before))

        return run


def test_a_half_tells_the_average_of_its_own_call():
    device = Device()
    for mhz in (1490, 1700, 1980):
        device.timer.time(device.call(0.1, mhz), 1)
        assert device.timer.average_speed() == pytest.approx(mhz, rel=1e-3)


def test_a_cap_that_is_accounted_for_invalidates_nothing():
    device = Device(nvml_mhz=1200)
    device.timer.time(device.call(0.1), 1)
    assert device.timer.throttled() == ""


def test_calls_whose_clock_cannot_be_counted_are_held_to_nine_tenths():
    short, several, absent = Device(nvml_mhz=1700), Device(nvml_mhz=1700), Device(nvml_mhz=1700, cycles=False)
    for device, seconds, inner in ((short, 20e-6, 1), (several, 1e-3, 2), (absent, 0.1, 1)):
        call = device.call(seconds)
        device.timer.time(call, inner)
        assert (device.timer.average_speed(), device.timer.throttled()) == (None, "power cap")
        device.numbers["nvmlDeviceGetClockInfo"] = 1800
        device.timer.time(call, inner)
        assert (device.timer.average_speed(), device.timer.throttled()) == (None, "")


@pytest.mark.parametrize("reason, said", [(THERMAL, "software thermal slowdown"), (SLOWDOWN, "hardware slowdown")])
def test_other_reasons_invalidate_whatever_was_counted(reason, said):
    device = Device(reasons=CAP | reason)
    device.timer.time(device.call(0.1), 1)
    assert device.timer.average_speed() and device.timer.throttled() == said


def test_counters_that_fail_meanwhile_are_given_up():
    device = Device()
    device.driver.broken = "launch"
    device.timer.time(device.call(0.1), 1)
    assert device.timer.average_speed() is None and "cuLaunchKernel returned 719" in device.timer.as_dict()["cycles"]


def block_of(rival_mhz, our_mhz, device=None, baseline="dense", rival_s=0.1, our_s=0.006):
    device = device or Device(nvml_mhz=1400)
    workload = Workload(device.call(our_s, our_mhz), {"dense": device.call(rival_s, rival_mhz)})
    entry = sampling.Entry("a", workload, "g", baseline, limit_s=None if baseline else 0.1)
    plans = {"g": sampling.GroupPlan(4, 1, {"a": 1, "": 1})}
    return sampling.measure([entry], plans, device.timer, seed=0)["a"]


def test_a_rival_at_a_slower_clock_counts_at_ours():
    found = block_of(1275, 1700)
    assert found.clean == [True] * 4 and found.disturbed == {}
    assert found.baseline_s == pytest.approx([0.1] * 4, rel=1e-3)
    assert found.counted_s == pytest.approx([0.075] * 4, rel=2e-3)
    assert found.candidate_s == pytest.approx([0.006] * 4, rel=2e-3)
    assert found.clocks[0] == pytest.approx([1275, 1700], rel=1e-3)


@pytest.mark.parametrize("rival, ours", [(1700, 1275), (1700, 1700), (1680, 1700)])
def test_a_candidate_at_a_slower_clock_or_alike_counts_as_measured(rival, ours):
    found = block_of(rival, ours)
    assert found.clean == [True] * 4 and found.counted_s == [] and len(found.clocks) == 4
    assert found.candidate_s == pytest.approx([0.006] * 4, rel=2e-3)


def test_a_time_limit_is_never_counted():
    found = block_of(1275, 1700, baseline=None)
    assert found.counted_s == [] and found.clean == [True] * 4 and found.candidate_s == pytest.approx([0.006] * 4, rel=2e-3)


def test_calls_in_graphs_under_a_deep_cap_are_still_not_evaluated():
    found = block_of(1275, 1700, rival_s=20e-6, our_s=10e-6)
    assert found.disturbed == {"throttled (power cap)": 4} and found.counted_s == [] == found.clocks
    kept = Record(case("x"), {"status": "ok", "baselines": {"dense": 20e-6}})
    kept.blocks = [Block(n, "dense", **vars(found)) for n in range(3)]
    judged = result(kept, POLICY)
    assert judged.verdict is Verdict.NOT_EVALUATED and judged.reason.startswith("throttled (power cap)")


@pytest.mark.parametrize("rival, ours, factor", [
    (None, None, 1.0), (None, 1700, 1.0), (1500, None, 1.0), (1500, 2000, 0.75), (2000, 1500, 1.0), (1990, 2000, 1.0), (1950, 2000, 0.975),
])  # fmt: skip
def test_equal_clock(rival, ours, factor):
    pair = Pair(Half(2.0, average=rival), Half(1.0, average=ours))
    assert pair.counted_s == pytest.approx(2.0 * factor) and pair.counted_s <= pair.baseline.seconds


@pytest.mark.parametrize("rival, ours, kept", [(1500, 1500, True), (1500, None, False), (None, 1500, False), (None, None, True)])
def test_a_cap_counts_where_one_side_alone_was_counted(rival, ours, kept):
    """Its half says nothing of it: as long as the other's clock is known too, the pair is compared at equal clock."""
    samples = sampling.Samples()
    halves = [Half(2.0, speed=1500, average=x, capped="" if x is None else "power cap") for x in (rival, ours)]
    samples.add(Pair(*halves), 1980)
    assert samples.clean == [kept] and (kept or samples.disturbed == {"throttled (power cap)": 1})


def test_a_limit_is_no_side_that_could_be_counted():
    samples = sampling.Samples()
    samples.add(Pair(Half(2.0), Half(1.0, speed=1700, average=1700.0, capped="power cap")), 1980)
    assert samples.clean == [True]


def record(ratio, share, blocks=6, floor=1.0):
    found = Record(case("x", floor=floor), {"status": "ok", "baselines": {"sdpa": 1.0}})
    for number in range(blocks):
        baseline_s = [ratio * (1 + 0.001 * number)] * 4
        counted = {"counted_s": [s * share for s in baseline_s]} if share < 1 else {}
        found.blocks.append(Block(number, "sdpa", baseline_s, [1.0] * 4, [True] * 4, **counted))
    return found


@pytest.mark.parametrize("policy", [POLICY, TwoStage(2, 0.05, 4, 0.01)])
@pytest.mark.parametrize("ratio, verdict, reason", [
    (3.0, Verdict.PASS, ""), (1.2, Verdict.NOT_EVALUATED, ONLY_COUNTED), (0.9, Verdict.FAIL, ""),
])  # fmt: skip
def test_the_bound_lets_pass_and_what_was_measured_fails(ratio, verdict, reason, policy):
    found = result(record(ratio, 0.75), policy)
    assert (found.verdict, found.reason) == (verdict, reason)
    assert found.speedup == pytest.approx(0.75 * ratio, rel=0.01), "the speedup shown is the bound"
    judged = judge_record(record(ratio, 0.75), policy)
    assert not (judged.verdict is Verdict.NOT_EVALUATED and (judged.more or judged.suspect)), "no time goes into it"


@pytest.mark.parametrize("policy", [Sequential((2, 4)), TwoStage(2, 0.05, 4, 0.01)])
def test_while_what_was_measured_is_undecided_more_is_measured(policy):
    """Below at equal clock by its first look; as measured on both sides of the floor."""
    undecided = record(0.9995, 0.75, blocks=2)
    judged = judge_record(undecided, policy)
    assert judged.more and judged.verdict is Verdict.INCONCLUSIVE
    assert result(undecided, policy).verdict is Verdict.NOT_EVALUATED, "out of time"
    assert result(record(0.97, 0.75, blocks=6), policy).verdict is Verdict.FAIL


@pytest.mark.parametrize("ratio, share, verdict", [
    (1.03, 0.90, Verdict.NOT_EVALUATED), (1.03, 1.0, Verdict.PASS), (0.90, 1.0, Verdict.FAIL), (0.90, 0.90, Verdict.FAIL),
])  # fmt: skip
def test_against_a_base_revision_nobody_passes_for_the_clock_of_the_base(ratio, share, verdict):
    assert result(record(ratio, share, floor=0.99), POLICY).verdict is verdict


def test_blocks_at_one_clock_are_judged_as_ever():
    plain = record(3.0, 1.0)
    assert block_logs(plain) == block_logs(plain, counted=False)
    found = result(plain, POLICY)
    assert found.clock_note == "" and found.counted_s is None and "clock" not in text([found])


def test_both_times_are_kept_and_said():
    found = result(record(3.0, 0.78), POLICY)
    kept = found.as_dict()
    assert kept["baseline_s"] == pytest.approx(3.0, rel=0.01) and kept["baseline_counted_s"] == pytest.approx(2.34, rel=0.01)
    note = "rival at 78 % of our clock, counted at ours"
    assert kept["clock_note"] == note and kept["baseline_clock"] == pytest.approx(0.78)
    assert f"x: {note}" in text([found]) and "3.01 s (78 % clock)" in text([found])
    assert "3.01 s (78 % clock)" in markdown([found])
    (row,) = cells([Row(found)], (0.0, 1.0))
    assert note in row.remarks and "(78 % clock)" in row.times


def test_stored_runs_keep_both_and_older_ones_are_read(tmp_path):
    run = stored.run([stored.window(256, 4096)])
    block = next(iter(run.records.values())).blocks[0]
    block.counted_s, block.clocks = [s / 2 for s in block.baseline_s], [[850.0, 1700.0]] * len(block.baseline_s)
    run.save(tmp_path / "run.json")
    assert next(iter(Run.load(tmp_path / "run.json").records.values())).blocks[0] == block
    older = run.as_dict()
    for entry in older["cases"]:
        for kept in entry["blocks"]:
            del kept["counted_s"], kept["clocks"]
    again = next(iter(Run.from_dict(older).records.values())).blocks[0]
    assert again.clean_pairs()[0] == block.baseline_s and block.clean_pairs()[0] == block.counted_s
