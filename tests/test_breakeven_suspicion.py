"""Candidates that are not timed at their work: too fast, kept from before, or busy elsewhere."""

import numpy as np
import pytest
import torch

from sparse_attention.breakeven import Case, Race, Sequential, Settings, Verdict, Workload, checking, peaks, results, suspicion
from sparse_attention.breakeven.clock import Clock, CpuClock, make
from sparse_attention.breakeven.progress import Silent
from tests import breakeven_toys as toys

PEAK = peaks.Peak({4: 1e12, 2: 2e12}, bytes_per_s=1e11, cached_bytes=1e6, source="made up")
FLOAT = [torch.zeros(4)]


@pytest.mark.parametrize(
    "seconds, work, inputs, suspicious",
    [
        (1.00e-3, {"flops": 1e9}, FLOAT, False),
        (0.96e-3, {"flops": 1e9}, FLOAT, False),
        (0.94e-3, {"flops": 1e9}, FLOAT, True),
        (0.94e-3, {"flops": 1e9}, [torch.zeros(4, dtype=torch.bfloat16)], False),
        (0.94e-3, {"flops": 1e9}, [torch.zeros(4, dtype=torch.int64)], False),
        (0.94e-3, {"flops": 1e9}, [], False),
        (0.47e-3, {"flops": 1e9}, [], True),
        (0.94e-3, {"bytes": 101e6}, FLOAT, True),
        (0.96e-3, {"bytes": 101e6}, FLOAT, False),
        (1e-9, {"bytes": 1e6}, FLOAT, False),
        (1e-9, {}, FLOAT, False),
    ],
)
def test_less_time_than_the_work_takes_at_the_peak(seconds, work, inputs, suspicious):
    said = suspicion.too_fast(seconds, work, inputs, PEAK)
    assert bool(said) is suspicious
    if suspicious:
        assert "made up" in said and "at no more than" in said


def test_without_a_peak_nothing_is_too_fast():
    assert suspicion.too_fast(1e-12, {"flops": 1e15}, FLOAT, None) == ""


def test_a_peak_is_raised_to_what_was_reached():
    assert PEAK.reached({4: 3e12}).flops_of(4) == 3e12
    assert PEAK.reached({4: 3e11}).flops_of(4) == 1e12


@pytest.mark.parametrize(
    "flags, family, per_cycle",
    [("fma avx2 sse2", "zen3", 32), ("avx512f avx2 sse2", "zen4", 32), ("avx512f avx2 sse2", "zen5", 64), ("sse2", "x", 8)],
)
def test_the_peak_of_a_processor(monkeypatch, flags, family, per_cycle):
    monkeypatch.setattr(peaks, "cpu_flags", lambda: frozenset(flags.split()))
    monkeypatch.setattr(peaks, "architecture", lambda: family)
    monkeypatch.setattr(peaks, "cores", lambda: 3)
    monkeypatch.setattr(peaks, "_fastest_hertz", lambda: 4e9)
    found = peaks.cpu_peak()
    assert found.flops_of(4) == 3 * per_cycle * 4e9
    assert found.flops_of(8) == found.flops_of(4) / 2
    assert found.flops_of(2) == found.flops_of(4), "no faster 16-bit type"


def test_no_multiplication_here_exceeds_the_peak():
    peak = make("cpu").peak()
    if peak is None:
        pytest.skip("nothing is known of this processor")
    a = np.ones((256, 256), np.float32)
    seconds = min(CpuClock().time(lambda: a @ a, 3) for _ in range(5))
    assert suspicion.too_fast(seconds, {"flops": 2 * 256**3, "bytes": 3 * a.nbytes}, [a], peak) == ""
    assert 2 * 256**3 / seconds > peak.flops_of(4) / 200, "the bound is of another machine"


class H100:
    major, minor, multi_processor_count, L2_cache_size = 9, 0, 132, 50 << 20


def test_the_peak_of_a_gpu():
    class Driver:
        fastest_hertz, bytes_per_s = 1.98e9, 3.35e12

    found = peaks.gpu_peak(H100, Driver)
    assert 989e12 < found.flops_of(2) < 1.1 * 989e12
    assert found.flops_of(4) == found.flops_of(2) / 2
    assert found.bytes_per_s == 3.35e12
    assert peaks.gpu_peak(H100).flops_of(2) > found.flops_of(2), "without a driver the clock is bounded from above"
    assert peaks.gpu_peak(H100).bytes_per_s is None


class Waiting(Clock):
    def __init__(self, here, whole):
        self._found = here, whole

    def unfinished(self, call):
        return self._found


@pytest.mark.parametrize(
    "here, whole, suspicious",
    [(1e-4, 1e-3, True), (1e-3, 1.2e-3, False), (1e-5, 4e-5, False), (1e-3, 1.6e-3, True)],
)
def test_work_that_goes_on_after_the_call(here, whole, suspicious):
    assert bool(suspicion.left_running(None, Waiting(here, whole))) is suspicious


def test_a_clock_that_cannot_tell_suspects_nothing():
    assert suspicion.left_running(lambda: None, CpuClock()) == ""


def kept(fault):
    x, out = np.random.default_rng(0).standard_normal(100), np.zeros(100)
    first = []

    def candidate():
        if fault == "view of a cached tensor":
            first.append(2 * x)
            return first[0][:50]
        if fault == "its own buffer, written":
            return np.multiply(2, x, out=out)
        if fault == "a copy":
            first.append(2 * x)
            return first[0].copy()
        return 2 * x

    part = slice(0, 50 if fault.startswith("view") else 100)
    lax = fault == "a copy"
    return Workload(candidate, check=lambda y: None if lax else np.testing.assert_allclose(y, 2 * x[part]), inputs=[x])


@pytest.mark.parametrize(
    "fault, reason",
    [
        ("view of a cached tensor", "memory of an earlier call"),
        ("a copy", "its check did not notice"),
        ("its own buffer, written", None),
        ("", None),
    ],
)
def test_outputs_kept_from_before(fault, reason):
    if reason is None:
        checking.check_fresh(kept(fault), seed=0)
        return
    with pytest.raises(checking.Suspicious, match=reason):
        checking.check_fresh(kept(fault), seed=0)


def test_without_inputs_the_same_memory_is_suspicious():
    out = np.arange(4.0)
    with pytest.raises(checking.Suspicious, match="give `inputs`"):
        checking.check_fresh(Workload(lambda: out, {"plain": lambda: np.arange(4.0)}), seed=0)
    checking.check_fresh(Workload(lambda: np.arange(4.0), {"plain": lambda: np.arange(4.0)}), seed=0)


@pytest.mark.parametrize(
    "output", [lambda: torch.empty(0), lambda: np.float64(3.0), lambda: torch.eye(3).to_sparse(), lambda: "text"]
)
def test_outputs_without_memory_of_their_own_are_no_sign(output):
    checking.check_fresh(Workload(output, check=lambda found: None), seed=0)


def test_a_sparse_tensor_is_an_output_like_others():
    x = torch.randn(4, 4)
    doubled = Workload(lambda: (2 * x).to_sparse(), check=lambda y: torch.testing.assert_close(y.to_dense(), 2 * x), inputs=[x])
    checking.check_fresh(doubled, seed=0)


def test_a_kernel_that_stops_computing_while_it_is_timed_is_found_after():
    x = np.random.default_rng(0).standard_normal(100)
    seen = []

    def candidate():
        seen.append(2 * x)
        return seen[-1].copy() if len(seen) < 20 else seen[19].copy()

    workload = Workload(candidate, check=lambda y: np.testing.assert_allclose(y, 2 * x), inputs=[x])
    checking.check_fresh(workload, seed=0)
    assert checking.recheck({"early": workload}, seed=1) == {}
    for _ in range(20):
        candidate()
    seen[19] = 2 * x
    errors = checking.recheck({"late": workload}, seed=2)
    assert isinstance(errors["late"], checking.Suspicious)


def test_inputs_shared_by_cases_change_once():
    x = np.random.default_rng(0).standard_normal(100)
    both = [Workload(lambda: x, inputs=[x]) for _ in range(2)]
    once = x.copy()
    checking.redraw([once], seed=5)
    checking.change(both, seed=5)
    np.testing.assert_array_equal(x, once)


class Watched(toys.ToldClock):
    """Says that toys may do 1e12 FLOP/s and no more."""

    def peak(self):
        return PEAK


def test_a_race_never_passes_what_is_too_fast(tmp_path):
    cases = [Case(n, "tests.breakeven_toys:working", {"flops": f}) for n, f in (("honest", 1e8), ("beyond", 1e11))]
    policy = Sequential((2,))
    settings = Settings(budget_s=30.0, policy=policy, device="tests.test_breakeven_suspicion:Watched")
    found = {r.id: r for r in results(Race(cases, settings, Silent()).execute(), policy)}
    assert found["honest"].verdict is Verdict.PASS
    assert found["beyond"].verdict is Verdict.SUSPICIOUS
    assert "faster than this machine allows" in found["beyond"].reason and found["beyond"].speedup is None
