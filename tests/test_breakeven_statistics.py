"""Estimates and verdicts against known answers, and how often the gate errs on simulated noise."""

import math
import random

import pytest

from sparse_attention.breakeven import ExitCode, Sequential, TwoStage, Verdict, selftest
from sparse_attention.breakeven.statistics import (
    block_log_speedup,
    blocks_to_detect,
    clopper_pearson,
    detectable_slowdown,
    interval,
    t_quantile,
)
from sparse_attention.breakeven.verdict import conclude, exit_code, judge

# From published tables of Student's t.
T_TABLE = [(0.95, 1, 6.314), (0.95, 4, 2.132), (0.99, 9, 2.821), (0.975, 30, 2.042), (0.995, 120, 2.617), (0.5, 7, 0.0)]


@pytest.mark.parametrize("p, df, expected", T_TABLE)
def test_t_quantile(p, df, expected):
    assert t_quantile(p, df) == pytest.approx(expected, abs=1e-3)
    assert t_quantile(1 - p, df) == pytest.approx(-expected, abs=1e-3)


def test_t_quantile_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    for df in (1, 2, 3, 4, 9, 19, 60, 1000):
        for p in (0.51, 0.6, 0.9, 0.99, 0.9999, 1e-5):
            assert t_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-8)


def test_clopper_pearson():
    assert clopper_pearson(0, 300) == (0.0, pytest.approx(1 - 0.025 ** (1 / 300)))  # exact for no events
    low, high = clopper_pearson(3, 10)
    assert (low, high) == (pytest.approx(0.0667, abs=1e-4), pytest.approx(0.6525, abs=1e-4))
    assert clopper_pearson(10, 10)[1] == 1.0
    with pytest.raises(ValueError, match="11 of 10"):
        clopper_pearson(11, 10)


def test_block_is_the_median_pair():
    assert block_log_speedup([2.0, 2.0, 200.0], [1.0, 1.0, 1.0]) == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match="2 and 1"):
        block_log_speedup([1.0, 2.0], [1.0])


def test_interval_over_blocks():
    logs = [math.log(s) for s in (2.0, 2.1, 1.9, 2.05, 1.95)]
    found = interval(logs, alpha=0.05)
    mean = sum(logs) / 5
    sd = math.sqrt(sum((x - mean) ** 2 for x in logs) / 4)
    assert found.speedup == pytest.approx(math.exp(mean))
    assert found.low == pytest.approx(math.exp(mean - 2.1318 * sd / math.sqrt(5)), rel=1e-4)
    assert found.high == pytest.approx(math.exp(mean + 2.1318 * sd / math.sqrt(5)), rel=1e-4)
    assert (found.blocks, found.sd) == (5, pytest.approx(sd))


def test_one_block_says_nothing():
    found = interval([0.7], alpha=0.05)
    assert (found.low, found.high) == (0.0, math.inf)


def test_detectable_slowdown_falls_with_blocks():
    found = [detectable_slowdown(0.035, k, 0.01) for k in (5, 8, 10, 20)]
    assert found == [pytest.approx(x, abs=0.004) for x in (0.096, 0.063, 0.053, 0.034)]
    assert detectable_slowdown(0.035, 1, 0.01) == math.inf
    needed = blocks_to_detect(0.035, 0.05, 0.01)
    assert detectable_slowdown(0.035, needed, 0.01) <= 0.05 < detectable_slowdown(0.035, needed - 1, 0.01)
    assert blocks_to_detect(0.5, 0.001, 0.01, most=50) is None


def blocks(speedup, count, sd=0.01, seed=0):
    rng = random.Random(seed)
    return [math.log(speedup) + rng.gauss(0, sd) for _ in range(count)]


def test_two_stage_passes_at_the_first_look():
    judged = judge(blocks(2.0, 5), 1.0, TwoStage())
    assert (judged.verdict, judged.more) == (Verdict.PASS, 0)


def test_two_stage_asks_for_fresh_blocks_before_it_fails():
    slow = blocks(0.9, 15)
    first = judge(slow[:5], 1.0, TwoStage())
    assert (first.verdict, first.more, first.suspect) == (Verdict.INCONCLUSIVE, 10, True)
    assert judge(slow[:9], 1.0, TwoStage()).more == 6
    assert judge(slow, 1.0, TwoStage()).verdict is Verdict.FAIL


def test_two_stage_second_look_is_of_fresh_blocks_only():
    judged = judge(blocks(0.5, 5) + blocks(1.5, 10), 1.0, TwoStage())
    assert judged.verdict is Verdict.PASS
    assert judged.interval.speedup == pytest.approx(1.5, rel=0.05)


def test_two_stage_does_not_fail_on_the_second_look_alone():
    undecided = blocks(1.0, 5, sd=0.1)
    assert not judge(undecided, 1.0, TwoStage()).suspect
    judged = judge(undecided + blocks(0.9, 10), 1.0, TwoStage())
    assert judged.verdict is Verdict.INCONCLUSIVE
    assert judged.reason


def test_sequential_looks_at_5_10_and_20():
    policy = Sequential()
    near = blocks(1.0, 20, sd=0.05)
    assert [judge(near[:k], 1.0, policy).more for k in (3, 5, 7, 10, 20)] == [2, 5, 3, 10, 0]
    assert judge(near, 1.0, policy).verdict is Verdict.INCONCLUSIVE
    assert judge(blocks(0.8, 5), 1.0, policy).verdict is Verdict.FAIL
    assert judge(blocks(1.2, 5), 1.0, policy).verdict is Verdict.PASS


@pytest.mark.parametrize(
    "logs, policy, verdict, reason",
    [
        (blocks(0.5, 4), TwoStage(), Verdict.NOT_EVALUATED, "out of time after 4 of 5 blocks"),
        (blocks(0.5, 4), Sequential(), Verdict.NOT_EVALUATED, "out of time after 4 of 5 blocks"),
        (blocks(0.99, 4, sd=0.2), TwoStage(), Verdict.NOT_EVALUATED, "after 4 of 5"),
        ([], TwoStage(), Verdict.NOT_EVALUATED, "out of time before its first block"),
        (blocks(2.0, 2), TwoStage(), Verdict.NOT_EVALUATED, "after 2 of 5"),
        (blocks(2.0, 3), TwoStage(), Verdict.PASS, "on 3 of 5 blocks"),
        (blocks(0.5, 5), TwoStage(), Verdict.NOT_EVALUATED, "below the floor at its first look, and out of time, 10 blocks short"),
        (blocks(0.5, 7), TwoStage(), Verdict.NOT_EVALUATED, "8 blocks short of the second"),
        (blocks(0.5, 8), TwoStage(), Verdict.FAIL, "on 3 of 10 fresh blocks"),
        (blocks(0.9, 5) + blocks(1.0, 5, sd=0.1), TwoStage(), Verdict.NOT_EVALUATED, "5 blocks short of the second"),
        (blocks(0.9, 5) + blocks(2.0, 5), TwoStage(), Verdict.PASS, "on 5 of 10 fresh blocks"),
        (blocks(1.0, 5, sd=0.1), TwoStage(), Verdict.INCONCLUSIVE, "out of time, 10 blocks short of a second look"),
        (blocks(1.0, 5, sd=0.1), Sequential(), Verdict.INCONCLUSIVE, "5 blocks short of a second look"),
    ],
)
def test_what_runs_out_of_time_is_no_excuse(logs, policy, verdict, reason):
    found = conclude(logs, 1.0, policy)
    assert found.verdict is verdict
    assert reason in found.reason


@pytest.mark.parametrize("count", [8, 10, 14])
def test_a_second_look_cut_short_alarms_no_more_often(count):
    """At the floor itself a suspect is confirmed at most 1 % of the time, however many fresh blocks there were."""
    rng = random.Random(count)
    first, fails = blocks(0.9, 5), 0
    for _ in range(2000):
        logs = first + [rng.gauss(0, 0.03) for _ in range(count - 5)]
        fails += conclude(logs, 1.0, TwoStage()).verdict is Verdict.FAIL
    assert 8 <= fails <= 36  # 20 +- 3.6 standard deviations


@pytest.mark.parametrize("floor", [0.0, -1.0, math.nan, math.inf])
def test_a_floor_is_a_positive_speedup(floor):
    with pytest.raises(ValueError, match="floor"):
        judge([0.1] * 5, floor, TwoStage())


PASS, FAIL, OPEN, NOT, WRONG = (
    Verdict.PASS,
    Verdict.FAIL,
    Verdict.INCONCLUSIVE,
    Verdict.NOT_EVALUATED,
    Verdict.WRONG,
)


@pytest.mark.parametrize(
    "verdicts, strict, allow, expected",
    [
        ([PASS], False, False, ExitCode.OK),
        ([PASS, OPEN], False, False, ExitCode.OK),
        ([PASS, OPEN], True, False, ExitCode.INCONCLUSIVE),
        ([PASS, FAIL, OPEN, NOT], True, False, ExitCode.BELOW_BREAK_EVEN),
        ([FAIL, WRONG], False, False, ExitCode.WRONG),
        ([PASS, Verdict.SUSPICIOUS], False, True, ExitCode.WRONG),
        ([PASS, NOT], False, False, ExitCode.NOT_EVALUATED),
        ([PASS, NOT], False, True, ExitCode.OK),
        ([NOT, NOT], False, True, ExitCode.NOTHING_CHECKED),
        ([], False, True, ExitCode.NOTHING_CHECKED),
    ],
)
def test_exit_code(verdicts, strict, allow, expected):
    assert exit_code(verdicts, strict, allow) is expected


def test_exit_codes_are_the_documented_numbers():
    assert [int(code) for code in ExitCode] == [0, 1, 2, 10, 11, 12, 13]


@pytest.fixture(scope="module")
def rates():
    return selftest.operating_characteristics(slowdowns=(0.0, 0.2), runs=100)


def test_gate_seldom_alarms_where_it_is_likeliest_to(rates):
    at_floor = [r for r in rates if r.slowdown == 0]
    assert len(at_floor) == len(selftest.NOISES)
    assert sum(r.fails for r in at_floor) <= 6  # 600 gates, 0.0005 each by construction
    assert selftest.verdicts(rates) == []


def test_gate_finds_a_slowdown_of_a_fifth(rates):
    assert all(r.fails >= 80 for r in rates if r.slowdown == 0.2)


def test_a_case_is_not_sure_to_pass_on_three_blocks_when_it_is_slower(rates):
    assert all(r.stops == r.passes == 0 for r in rates if r.slowdown == 0.2)
    assert 0 < sum(r.stops for r in rates if r.slowdown == 0) <= 30  # 600 gates, at the floor itself


def test_selftest_tells_a_stop_that_is_too_early(monkeypatch):
    monkeypatch.setattr(selftest, "surely_passes", lambda logs, floor: sum(logs) / len(logs) > math.log(floor) - 0.05)
    said = selftest.verdicts(selftest.operating_characteristics(slowdowns=(0.05,), runs=30))
    assert any("is sure to pass" in line for line in said)


def test_selftest_tells_an_unsound_gate():
    class Trigger(TwoStage):
        def judge(self, logs, floor):
            found = super().judge(logs, floor)
            return type(found)(Verdict.FAIL, found.interval)

    assert selftest.verdicts(selftest.operating_characteristics(Trigger(), (0.0,), runs=30))
