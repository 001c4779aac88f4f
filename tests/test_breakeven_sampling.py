"""Timing and checking in one process, with a clock that is told the time."""

import gc
import importlib.util
import os
import random
import sys

import numpy as np
import pytest
import torch

from sparse_attention.breakeven import Workload, checking, clock, machine, sampling
from sparse_attention.breakeven.memory import peak_bytes
from tests.breakeven_toys import ToldClock, doubling, take

LEAST_S = ToldClock.least_s


def entry(name, workload, group="one"):
    return sampling.Entry(name, workload, group, next(iter(workload.baselines)))


def test_plan_fills_the_budget_with_pairs():
    groups = {"cheap": {"": 1e-3, "a": 1e-4}, "dear": {"": 1.0, "b": 0.5, "c": 0.1}}
    plans = sampling.plan(groups, LEAST_S, budget_s=8.0)
    assert plans["cheap"].pairs == sampling.MOST_PAIRS
    assert sampling.LEAST_PAIRS < plans["dear"].pairs < sampling.MOST_PAIRS
    assert 5.0 < sampling.planned_seconds(groups, plans) <= 8.0
    assert plans["cheap"].inner == {"": 1, "a": 10}, "a half lasts at least the clock's least time"
    starved = sampling.plan(groups, LEAST_S, budget_s=-1.0)
    assert starved["cheap"].pairs == sampling.LEAST_PAIRS
    assert starved["dear"].pairs == 1, "calls of seconds even themselves out"


def measure(entries, pairs=20, warmup=3, inner=1, seed=0):
    members = {"": inner, **{e.id: inner for e in entries}}
    plans = {group: sampling.GroupPlan(pairs, warmup, members) for group in {e.group for e in entries}}
    return sampling.measure(entries, plans, ToldClock(), seed)


def test_measure_returns_what_the_clock_said():
    found = measure([entry("a", doubling(fast=1e-3, slow=3e-3))])["a"]
    assert len(found.baseline_s) == len(found.candidate_s) == len(found.clean) == 20
    assert np.median(found.candidate_s) == pytest.approx(1e-3, rel=0.02)
    assert np.median(found.baseline_s) == pytest.approx(3e-3, rel=0.02)


def test_inner_loop_gives_seconds_a_call():
    found = measure([entry("a", doubling(fast=1e-5, slow=3e-5))], inner=7)["a"]
    assert np.median(found.candidate_s) == pytest.approx(1e-5, rel=0.02)


def called(log, name):
    def call():
        log.append(name)
        take(1e-3)

    return call


def test_a_shared_baseline_is_timed_once_a_round_and_the_order_varies():
    log = []
    base = called(log, "base")
    entries = [entry(name, Workload(called(log, name), {"base": base})) for name in "ab"]
    found = measure(entries, pairs=30, warmup=0)
    assert found["a"].baseline_s == found["b"].baseline_s
    rounds = [tuple(log[i : i + 3]) for i in range(0, len(log), 3)]
    assert len(rounds) == 30 and all(sorted(r) == ["a", "b", "base"] for r in rounds)
    assert len(set(rounds)) > 3


def test_groups_of_few_pairs_are_spread_over_the_block():
    log = []
    many = entry("many", Workload(called(log, "many"), {"base": called(log, "base")}), group="many")
    few = entry("few", Workload(called(log, "few"), {"base": called(log, "base")}), group="few")
    plans = {
        "many": sampling.GroupPlan(20, 0, {"": 1, "many": 1}),
        "few": sampling.GroupPlan(2, 0, {"": 1, "few": 1}),
    }
    found = sampling.measure([many, few], plans, ToldClock(), seed=1)
    assert [len(found[name].clean) for name in ("many", "few")] == [20, 2]
    first, second = (i for i, name in enumerate(log) if name == "few")
    assert log[first:second].count("many") >= 8


def test_warm_up_is_dropped():
    slow_at_first = [1.0] * 3

    def candidate():
        take(slow_at_first.pop() if slow_at_first else 1e-3)

    found = measure([entry("a", Workload(candidate, {"base": lambda: take(1e-3)}))], warmup=3)["a"]
    assert max(found.candidate_s) < 0.01


def test_the_collector_rests_while_timing_and_works_again_after():
    states = []
    measure([entry("a", Workload(lambda: states.append(gc.isenabled()), {"base": lambda: take(1e-3)}))], pairs=2)
    assert states and not any(states)
    assert gc.isenabled()


def test_cases_that_share_must_share_their_inputs():
    with pytest.raises(ValueError, match="same input"):
        measure([entry("a", doubling()), entry("b", doubling())])


@pytest.mark.parametrize(
    "fault, reason",
    [("zeros", "Not equal"), ("yesterday", "stayed the same after its inputs changed"), ("cached", "memory of an earlier call"), ("raises", "no such kernel")],
)
def test_a_wrong_candidate_is_found_out(fault, reason):
    with pytest.raises(checking.WrongOutput, match=reason):
        checking.check_fresh(doubling(fault=fault), seed=0)


def test_a_right_candidate_passes():
    checking.check_fresh(doubling(), seed=0)


def test_wrong_errors_are_one_line():
    with pytest.raises(checking.WrongOutput) as raised:
        checking.check(doubling(fault="zeros"))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 350


def test_redraw_keeps_type_and_spread_and_changes_values():
    x, n = torch.randn(1000, requires_grad=True), np.full(500, 3.0, dtype=np.float32)
    integers = torch.arange(5)
    before = x.detach().clone()
    checking.redraw([x, n, integers], seed=3)
    assert not torch.equal(before, x) and float(x.detach().std()) == pytest.approx(float(before.std()), rel=0.15)
    assert n.dtype == np.float32 and n.std() == pytest.approx(1.0, rel=0.15)
    assert torch.equal(integers, torch.arange(5))


def test_poison_fills_outputs_but_never_inputs():
    x, y = torch.ones(4), np.ones(4)
    out, view = torch.ones(4), x[1:]
    checking.poison((out, view, y.T, 3), inputs=[x, y])
    assert out.isnan().all()
    assert torch.equal(x, torch.ones(4)) and (y == 1).all()


def usage(wall_s, cpu_s, involuntary, others_s=0.0, steal_s=0.0):
    return machine.Usage(wall_s, cpu_s, involuntary, others_s, steal_s)


@pytest.mark.parametrize(
    "seen, contended",
    [  # two threads idle and beside one busy process, then one thread idle and beside one; seen on two cores
        (usage(0.0034, 0.0068, 2), False),
        (usage(0.942, 1.82, 31), False),
        (usage(0.072, 0.048, 12), True),
        (usage(1.386, 1.81, 245), True),
        (usage(1.716, 1.72, 15), False),
        (usage(0.0097, 0.0058, 1), True),
        (usage(0.93, 1.81, 70, others_s=0.05), False),
        (usage(0.93, 1.30, 40, others_s=0.56), True),
        (usage(0.93, 1.81, 30, others_s=0.02, steal_s=0.2), True),
    ],
)
def test_contention_is_told_from_switches_and_the_time_of_others(seen, contended):
    assert seen.contended is contended


def test_usage_counts_what_this_process_did():
    start = machine.Usage.now()
    sum(random.random() for _ in range(200_000))
    spent = machine.Usage.now().since(start)
    assert 0 < spent.cpu_s <= spent.wall_s * machine.cores() * 1.1


def test_without_counters_of_this_process_switches_are_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    spec = importlib.util.spec_from_file_location("sparse_attention.breakeven.machine_elsewhere", machine.__file__)
    elsewhere = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sparse_attention.breakeven.machine_elsewhere", elsewhere)
    spec.loader.exec_module(elsewhere)
    for name in ("getloadavg", "sysconf", "sched_getaffinity"):
        monkeypatch.delattr(os, name)
    assert elsewhere.Usage.now().since(elsewhere.Usage.now()).involuntary == 0
    assert (elsewhere.describe()["load"], elsewhere.describe()["memory_bytes"]) == (None, None)


def test_machine_class_names_processor_and_cores():
    assert machine.machine_class() == machine.describe()["class"]
    kind, architecture, cores = machine.machine_class().split("/")
    assert kind == "cpu" and architecture and cores == f"{machine.cores()}c"


@pytest.mark.parametrize(
    "vendor, family, model, expected",
    [
        ("AuthenticAMD", 25, 17, "zen4"),
        ("AuthenticAMD", 25, 1, "zen3"),
        ("GenuineIntel", 6, 143, "sapphirerapids"),
        ("GenuineIntel", 6, 1, "genuineintel-6-1"),
    ],
)
def test_microarchitecture(vendor, family, model, expected):
    info = {"vendor_id": vendor, "cpu family": str(family), "model": str(model)}
    assert machine._microarchitecture(info) == expected


def test_cpu_clock_times_the_inner_calls():
    calls = []
    found = clock.CpuClock().time(lambda: calls.append(0), 1000)
    assert len(calls) == 1000 and 0 < found < 1e-4


def test_clocks_are_found_by_name():
    assert clock.kind("cpu") is clock.CpuClock
    assert clock.kind("tests.breakeven_toys:ToldClock") is ToldClock
    with pytest.raises(ValueError, match="'tpu'"):
        clock.kind("tpu")


def test_peak_bytes_of_a_call():
    size = 64 << 20
    peak = peak_bytes(lambda: np.ones(size, dtype=np.uint8).sum())
    if peak is None:
        pytest.skip("resident memory cannot be read here")
    assert 0.9 * size < peak < 1.3 * size
