"""The CUDA clock on a real device: events against the wall, graphs, the L2 cache, NVML, side streams, memory."""

import statistics
import time

import pytest
import torch

from sparse_attention.breakeven import Workload, checking, sampling, suspicion
from sparse_attention.breakeven.clock import make
from sparse_attention.breakeven.cold import ColdCache
from sparse_attention.breakeven.memory import peak_bytes

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
MB = 1 << 20


@pytest.fixture(scope="module")
def clock():
    return make("cuda")


@pytest.fixture(scope="module")
def product():
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    return lambda: x @ x


def median(clock, call, inner=1, times=9):
    return statistics.median(clock.time(call, inner) for _ in range(times))


def test_events_agree_with_the_wall_for_a_long_call(clock, product):
    timed = median(clock, product)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        product()
    torch.cuda.synchronize()
    wall = (time.perf_counter() - start) / 20
    print(f"events {1e3 * timed:.3f} ms, wall {1e3 * wall:.3f} ms")
    assert timed == pytest.approx(wall, rel=0.2)


def test_time_scales_with_the_work(clock):
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
    assert median(clock, lambda: x @ x @ x, 4) == pytest.approx(2 * median(clock, lambda: x @ x, 4), rel=0.3)


def test_a_small_kernel_is_timed_in_a_graph_and_both_figures_are_kept(clock):
    x = torch.randn(1024, device="cuda")

    def small():
        return x * 2 + 1

    in_graph = median(clock, small, 10)
    kept = clock.figures(small)
    print(f"graph {1e6 * in_graph:.2f} us, {kept}, {clock.as_dict()}")
    assert not clock.as_dict().get("not captured")
    assert in_graph < kept["eager_s"]
    assert kept["warm_s"] < kept["eager_s"]
    assert 1e-6 < in_graph < 50e-6


@pytest.mark.parametrize("device", ["cuda", "cuda-graph"])
def test_the_cache_is_cold(device):
    source = torch.randn(10 * MB // 4, device="cuda")
    target = torch.empty_like(source)  # 20 MB moved: they fit the L2 cache of a data-centre GPU
    if torch.cuda.get_device_properties(0).L2_cache_size < 24 * MB:
        pytest.skip("the L2 cache is too small to hold them")

    def copy():
        target.copy_(source)

    timer = make(device)
    cold = median(timer, copy, 5)
    kept = timer.figures(copy)
    print(f"{device}: cold {1e6 * cold:.2f} us, {kept}")
    assert cold > 1.1 * kept["warm_s"]


def test_cold_in_a_graph_is_as_cold_as_without(clock):
    source = torch.randn(64 * MB, device="cuda", dtype=torch.float16)
    target = torch.empty_like(source)

    def copy():
        target.copy_(source)

    graphs = make("cuda-graph")
    turns = [(median(clock, copy, 2), median(graphs, copy, 2)) for _ in range(7)]  # in turn: the board's clock drifts meanwhile
    alone, in_graph = (statistics.median(times) for times in zip(*turns))
    print(f"eager {1e6 * alone:.1f} us, graph {1e6 * in_graph:.1f} us")
    assert in_graph == pytest.approx(alone, rel=0.1)


def test_the_clock_is_counted(clock):
    """Against a kernel that waits for so many cycles."""
    cycles = 20_000_000
    clock.time(lambda: torch.cuda._sleep(cycles), 1)
    counted = [(clock.time(lambda: torch.cuda._sleep(cycles), 1), clock.average_speed()) for _ in range(5)]
    print(counted, clock.as_dict())
    assert "cycles" not in clock.as_dict()
    for seconds, megahertz in counted:
        assert 200 < megahertz < 4000
        assert seconds * 1e6 * megahertz == pytest.approx(cycles, rel=0.01)


def test_a_long_call_takes_as_many_cycles_at_any_clock(clock, product):
    """Within the first milliseconds of heavy work the device also holds instructions back; what is counted lasts longer."""

    def products():
        for _ in range(32):
            product()

    clock.time(products, 1)
    counted = [(clock.time(products, 1), clock.average_speed()) for _ in range(9)]
    cycles = [seconds * megahertz for seconds, megahertz in counted]
    print(counted)
    assert statistics.stdev(cycles) < 0.02 * statistics.fmean(cycles)


def test_nvml_is_plausible(clock, product):
    for _ in range(20):
        clock.time(product, 1)
    about = clock.as_dict()
    print(about)
    if about["nvml"] != "read":
        pytest.skip(f"NVML is {about['nvml']}")
    assert 200 < clock.speed() < 4000
    assert 10 < about["celsius"] < 110 and 20 < about["watts"] < 1500
    assert "hardware" not in clock.throttled()


def test_no_product_exceeds_the_peak(clock, product):
    peak = clock.peak()
    work = {"flops": 2 * 8192**3, "bytes": 3 * 2 * 8192**2}
    seconds = median(clock, product)
    rate = work["flops"] / seconds
    print(f"{rate / 1e12:.0f} of {peak.flops_of(2) / 1e12:.0f} TFLOP/s, {peak.bytes_per_s} bytes/s, {peak.source}")
    assert suspicion.too_fast(seconds, work, [torch.empty(1, dtype=torch.float16)], peak) == ""
    assert rate > 0.2 * peak.flops_of(2), "the bound is of another device"
    assert suspicion.too_fast(seconds / 10, work, [torch.empty(1, dtype=torch.float16)], peak)


def test_no_copy_exceeds_the_bandwidth(clock):
    source = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    peak = clock.peak()
    if peak.bytes_per_s is None:
        pytest.skip("the driver does not tell the memory's clock")
    seconds = median(clock, lambda: target.copy_(source))
    print(f"{2 * source.numel() / seconds / 1e9:.0f} of {peak.bytes_per_s / 1e9:.0f} GB/s")
    assert suspicion.too_fast(seconds, {"bytes": 2 * source.numel()}, [], peak) == ""
    assert 2 * source.numel() / seconds > 0.5 * peak.bytes_per_s


def test_a_candidate_on_a_side_stream_is_suspicious(clock, product):
    side = torch.cuda.Stream()

    def aside():
        with torch.cuda.stream(side):
            return [product() for _ in range(5)][-1]

    def waited_for():
        side.wait_stream(torch.cuda.current_stream())
        found = aside()
        torch.cuda.current_stream().wait_stream(side)
        return found

    for call in (product, waited_for, aside):
        call()
    torch.cuda.synchronize()
    assert "another stream" in suspicion.left_running(aside, clock)
    assert suspicion.left_running(waited_for, clock) == ""
    assert suspicion.left_running(product, clock) == ""


def test_a_block_is_measured_and_a_cached_tensor_is_suspicious(clock):
    x = torch.randn(1 << 16, device="cuda")
    honest = Workload(lambda: x * 2, {"slow": lambda: x + x * 1.0}, lambda y: torch.testing.assert_close(y, 2 * x), inputs=[x])
    checking.check_fresh(honest, seed=0)
    plans = {"g": sampling.GroupPlan(10, 2, {"a": 5, "": 5})}
    found = sampling.measure([sampling.Entry("a", honest, "g", "slow")], plans, clock, seed=0)["a"]
    print(found)
    assert 0 < statistics.median(found.candidate_s) < statistics.median(found.baseline_s) < 1e-3
    assert found.figures["candidate_eager_s"] > 0
    assert checking.recheck({"a": honest}, seed=1) == {}
    kept = []

    def cached():
        kept.append(2 * x)
        return kept[0]

    with pytest.raises(checking.Suspicious):
        checking.check_fresh(Workload(cached, check=honest.check, inputs=[x]), seed=0)


def test_peak_memory_is_of_the_call():
    def call():
        return torch.ones(32 * MB, device="cuda").sum()  # float32

    call()
    assert 128 * MB <= peak_bytes(call) < 132 * MB


def test_the_cache_is_made_cold_by_reading():
    cold = ColdCache(torch.cuda.get_device_properties(torch.cuda.current_device()))
    assert not cold.refused and not cold._memory.any()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cold()
    x, one = torch.ones(4 * MB, device="cuda"), torch.ones(1, device="cuda")
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def taken(before, x=x):
        found = []
        for _ in range(9):
            x.sum()
            before()
            torch.cuda._sleep(2_000_000)  # the device is at it while the rest is queued
            start.record()
            x.sum()
            stop.record()
            torch.cuda.synchronize()
            found.append(start.elapsed_time(stop))
        return statistics.median(found)

    warm, called, replayed = taken(lambda: None), taken(cold), taken(graph.replay)
    print(f"16 MB are read in {1e3 * warm:.1f} us, cold in {1e3 * called:.1f} and {1e3 * replayed:.1f}")
    launch = taken(lambda: None, one)
    assert min(called, replayed) - launch > 1.3 * (warm - launch) and not cold._memory.any()
