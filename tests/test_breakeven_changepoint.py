"""Change points: steps up and down, outliers, and how often noise alone is taken for a step."""

import math

import numpy as np
import pytest
from scipy import stats

from sparse_attention.breakeven.changepoint import find
from sparse_attention.breakeven.statistics import clopper_pearson, t_tail


def noise(length, seed, sd=0.02):
    return np.random.default_rng(seed).normal(0, sd, length)


@pytest.mark.parametrize("step", [-0.1, 0.1])
@pytest.mark.parametrize("at", [8, 15, 25])
def test_a_step_is_found_where_it_is(step, at):
    x = noise(30, seed=at)
    x[at:] += step
    (found,) = find(x)
    assert abs(found.index - at) <= 1
    assert math.copysign(1, found.step) == math.copysign(1, step)
    assert found.p < 1e-6


def test_the_interval_holds_the_step_nineteen_times_of_twenty():
    held = 0
    for seed in range(100):
        x = noise(30, seed)
        x[15:] += 0.1
        (found,) = find(x)
        held += found.low <= 0.1 <= found.high
    assert held >= 88


def test_a_bump_is_two_steps():
    x = noise(30, seed=3, sd=0.01)
    x[10:18] += 0.08
    assert [round(change.step, 2) for change in find(x)] == [pytest.approx(0.08, abs=0.02), pytest.approx(-0.08, abs=0.02)]


def test_steps_of_a_quiet_series_are_exact():
    (found,) = find([0.0] * 6 + [0.2] * 6)
    assert (found.index, found.before, found.after) == (6, 0.0, pytest.approx(0.2))
    assert find([1.5] * 20) == []


def test_outliers_are_no_level():
    x = noise(40, seed=5, sd=0.01)
    x[[7, 20, 21, 33]] += 0.5
    assert find(x) == []


def test_a_level_lasts_at_least_so_long():
    x = np.r_[noise(20, seed=1, sd=0.01), noise(2, seed=2, sd=0.01) + 0.3]
    assert find(x, least=3) == []
    assert [change.index for change in find(x, least=2)] == [20]
    assert find([0.0, 0.0, 0.0, 1.0, 1.0], least=3) == []


@pytest.mark.parametrize("length", [10, 30])
@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_false_alarms_on_noise_are_as_rare_as_promised(length, alpha):
    rng = np.random.default_rng(length)
    runs = 400
    alarms = sum(bool(find(rng.normal(0, 0.02, length), alpha)) for _ in range(runs))
    assert clopper_pearson(alarms, runs, confidence=0.999)[0] <= alpha


def test_heavy_tails_raise_few_false_alarms():
    rng = np.random.default_rng(7)
    alarms = sum(bool(find(0.01 * rng.standard_t(3, 30))) for _ in range(300))
    assert alarms <= 6


def test_a_step_of_five_deviations_is_found_three_runs_later():
    rng = np.random.default_rng(11)
    found = 0
    for _ in range(100):
        x = rng.normal(0, 0.02, 30)
        x[-3:] -= 0.1
        found += [change.index for change in find(x)] == [27]
    assert found >= 85


@pytest.mark.parametrize("arguments", [{"least": 1}, {"alpha": 0.0}, {"alpha": 1.0}])
def test_senseless_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="least must be 2 or more and alpha lie in"):
        find([0.0] * 10, **arguments)


def test_values_must_be_finite():
    with pytest.raises(ValueError, match="values must be finite"):
        find([0.0, math.inf, 0.0, 0.0, 0.0, 0.0])


@pytest.mark.parametrize("t, df", [(0.0, 3), (0.7, 1), (2.5, 7), (5.0, 40), (30.0, 18)])
def test_tail_of_the_t_distribution(t, df):
    assert t_tail(t, df) == pytest.approx(stats.t.sf(t, df), rel=1e-9)
