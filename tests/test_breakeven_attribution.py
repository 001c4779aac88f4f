"""Which side moved between two runs: known answers, and error rates on simulated ones."""

import math
import random
import re

import pytest

from sparse_attention.breakeven import Case, TwoStage, Verdict, attribution, results
from sparse_attention.breakeven.anchor import Anchor
from sparse_attention.breakeven.clock import CpuClock
from sparse_attention.breakeven.store import Block
from tests import breakeven_toys as toys
from tests.breakeven_runs import run_of


CHANGES = {  # what is slower by a tenth, what is on record -> the side that moved
    "kernel": (dict(kernel=1.1, commit="b" * 40), "kernel"),
    "uncommitted kernel": (dict(kernel=1.1, dirty=True), "kernel"),
    "baseline": (dict(baseline=0.9, versions={"torch": "3.0", "numpy": "2.0"}), "baseline"),
    "another backend": (dict(baseline=0.9, backend="flash"), "baseline"),
    "both": (dict(kernel=1.2, baseline=1.1, commit="b" * 40, versions={"torch": "3.0", "numpy": "2.0"}), "kernel and baseline"),
    "machine, unevenly": (dict(kernel=1.3, baseline=1.1, machine=1.2), "machine"),
    "machine, which the baseline feels more": (dict(kernel=1.2, baseline=1.4, machine=1.2), "machine"),
    "another processor": (dict(kernel=1.1, cpu="Xeon", commit="b" * 40), "machine"),
    "slower machine, and a slower kernel": (dict(kernel=1.32, baseline=1.2, machine=1.2, commit="b" * 40), "kernel"),
    "machine only": (dict(kernel=1.2, baseline=1.2, machine=1.2), ""),
    "nothing": (dict(), ""),
}


def pair_of_runs(rng, kernel=1.0, baseline=1.0, machine=1.0, backend="sdpa", blocks=10, sd=0.02, **facts):
    """A run and a later one in which times are multiplied by these; every block has a noise of its own, its anchor too."""

    def one(k, b, m, backend, **facts):
        made, anchors = [], []
        for number in range(blocks):
            both = math.exp(rng.gauss(0, sd))
            candidate_s, baseline_s = (1e-3 * x * both * math.exp(rng.gauss(0, sd)) for x in (k, 3 * b))
            made.append(Block(number, backend, [baseline_s] * 3, [candidate_s] * 3, [True] * 3))
            anchors.append({"source": "numpy 2.0", "compute": 1e-3 * m * both, "memory": 1e-2 * m * both})
        return run_of({"a": made}, anchors=anchors, **facts)

    then = one(1.0, 1.0, 1.0, "sdpa")
    return then, one(kernel, baseline, machine, backend, time="2026-01-02T00:00:00Z", **facts)


@pytest.mark.parametrize("change", CHANGES)
def test_the_side_that_moved(change):
    arguments, side = CHANGES[change]
    rng = random.Random(change)
    right = sum(attribution.attribute(*pair_of_runs(rng, **arguments), "a").side == side for _ in range(60))
    assert right >= 56


def test_small_moves_are_seldom_called_moves():
    """Blocks of 2 %, ten a run, and a commit between: at most 1 % and then some of unchanged cases are said to have moved."""
    rng = random.Random(1)
    moved = sum(bool(attribution.attribute(*pair_of_runs(rng, commit="b" * 40), "a").side) for _ in range(500))
    assert moved <= 10


def test_without_an_anchor_two_moves_stay_unclear():
    then, now = pair_of_runs(random.Random(0), kernel=1.3, baseline=1.1, commit="b" * 40, sd=0.001)
    for run in (then, now):
        run.evidence = [{} for _ in run.evidence]
    found = attribution.attribute(then, now, "a")
    assert found.side == "unclear" and "not anchored" in str(found)


def test_the_anchor_is_timed_on_its_device_only():
    anchor = Anchor("cpu", CpuClock())
    anchor.visit()
    found = anchor.as_dict()
    assert found["source"].startswith("numpy") and 0 < found["compute"] < 1 and 0 < found["memory"] < 1
    own = Anchor(toys.DEVICE, toys.ToldClock())
    own.visit()
    assert own.as_dict() == {"source": "none"}


def test_anchors_of_two_sources_are_not_compared():
    then, now = pair_of_runs(random.Random(0), kernel=1.3, commit="b" * 40, sd=0.001)
    now.evidence[3]["anchor"] = {**now.evidence[3]["anchor"], "source": "numpy 3.0"}
    assert attribution.attribute(then, now, "a").machine == {}


def test_what_moved_is_said_in_a_line():
    then, now = pair_of_runs(random.Random(0), kernel=1.25, commit="b" * 40, sd=0.001)
    line = attribution.remarks(then, now, results(now, TwoStage()))[0]
    assert re.match(r"a: kernel moved: speedup (19\.9|20\.\d) % lower; kernel 2[45]\.\d % slower", line)
    assert "baseline unchanged" in line and "machine (compute) unchanged" in line
    assert "commit aaaaaaaaaa -> bbbbbbbbbb" in line
    now.machine["class"] = "cpu/zen5/2c"
    assert "not compared" in attribution.remarks(then, now, results(now, TwoStage()))[0]


def test_a_case_that_fails_without_having_moved_is_said():
    then, now = pair_of_runs(random.Random(0), sd=0.001, blocks=15)
    now.records["a"].case = Case("a", "m:f", floor=4.0)
    failed = results(now, TwoStage())
    assert failed[0].verdict is Verdict.FAIL
    assert attribution.remarks(then, now, failed) == ["a: below its floor, but its speedup did not move since 2026-01-01T00:00:00Z"]
    assert "nothing to compare" in attribution.remarks(run_of({}), now, failed)[0]


def test_other_races_are_not_compared():
    then, now = pair_of_runs(random.Random(0), kernel=2.0)
    now.records["a"].case = Case("a", "m:other")
    assert attribution.attribute(then, now, "a") is None
    assert attribution.attribute(then, now, "b") is None
