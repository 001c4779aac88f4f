"""Machine tables: which file is read, what dispatch makes of it, and how one is measured and written."""

import copy
import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from sparse_attention import calibration, calibration_store, dispatch, rates
from sparse_attention.breakeven import Settings
from sparse_attention.breakeven import race as race_module
from sparse_attention.breakeven.cli import main
from sparse_attention.breakeven.machine import machine_class
from sparse_attention.breakeven.progress import Progress, Silent
from sparse_attention.fitting import Sample, fit, non_negative_least_squares
from sparse_attention.lanes import of_layout, of_rows
from sparse_attention.layout import layout
from sparse_attention.patterns import BigBird, Causal, Dilated, LogSparse, Longformer, MultiScale, SlidingWindow, parse
from sparse_attention.rates import Rate, Table, Work
from sparse_attention.rows import rows
from tests.study_toys import FakeProcesses

HERE = machine_class()
WINDOW = "SlidingWindow(window=256, causal=True)"
RATES = {
    "tile": Rate(3_000, 40, 0.1, 0.04),
    "gather": Rate(2_300, 40, 0.4, 0.08),
    "dense": Rate(7_000, 60, 0.0, 0.05, 0.6),
}


def entry(threads=1, dtype="float32", **engines):
    return {"threads": threads, "dtype": dtype, **{name: rate._asdict() for name, rate in {**RATES, **engines}.items()}}


def crossing(low=None, high=None, dense_from=None, estimate=None, **fields):
    sizes = {"family": WINDOW, "dtype": "float32", "head_dim": 64, "heads": 4, "threads": 1, **fields}
    return {**sizes, "dense_from": dense_from, "low": low, "high": high, "estimate": estimate}


def content(*crossings, **fields):
    return {"schema": 1, "class": HERE, "rates": [entry()], "crossings": list(crossings), **fields}


def table(*crossings, **fields):
    return rates.parse(content(*crossings, **fields), HERE, "a file")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's folder, empty; with no shipped file either."""
    monkeypatch.setenv("SPARSE_ATTENTION_CACHE", str(tmp_path))
    monkeypatch.setattr(rates, "__file__", str(tmp_path / "package" / "rates.py"))
    rates.table.cache_clear()
    for made in (tmp_path / "machines", tmp_path / "package" / "machines"):
        made.mkdir(parents=True)
    yield tmp_path
    rates.table.cache_clear()


def put(folder, data, name=None):
    path = folder / "machines" / (name or rates.file_name(HERE))
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_without_a_file_the_built_in_rates_serve(folder):
    assert rates.table() is rates.GENERIC


def test_the_users_file_comes_first_then_the_shipped_one(folder):
    put(folder / "package", content())
    assert rates.table().source == str(folder / "package" / "machines" / rates.file_name(HERE))
    rates.table.cache_clear()
    path = put(folder, content())
    assert rates.table().source == str(path)


def test_a_process_on_fewer_cores_reads_the_file_of_its_machine(folder, monkeypatch):
    monkeypatch.setattr("sparse_attention.breakeven.machine.cores", lambda: 2)
    two = machine_class()
    path = put(folder, content(**{"class": two}), rates.file_name(two))
    put(folder, content(**{"class": two.replace("2c", "64c")}), rates.file_name(two.replace("2c", "64c")))
    monkeypatch.setattr("sparse_attention.breakeven.machine.cores", lambda: 1)
    assert machine_class() != two
    assert rates.table().source == str(path)


def damaged(change):
    data = content(crossing(low=128, high=192, dense_from=16, estimate=150.0))
    change(data)
    return data


BROKEN = {
    "not JSON": '{"schema": 1,',
    "holds no object": [],
    "schema is 99": damaged(lambda d: d.update(schema=99)),
    "it is of cpu/other/2c, this is": damaged(lambda d: d.update({"class": "cpu/other/2c"})),
    "rates is no list": damaged(lambda d: d.update(rates={})),
    "rates have no float32": damaged(lambda d: d["rates"][0].update(dtype="bfloat16")),
    "dtype is 'int8'": damaged(lambda d: d["rates"][0].update(dtype="int8")),
    "rates[0].tile is None": damaged(lambda d: d["rates"][0].pop("tile")),
    "rates[0].tile.call is -1": damaged(lambda d: d["rates"][0]["tile"].update(call=-1)),
    "rates[0].dense.mask is nan": damaged(lambda d: d["rates"][0]["dense"].update(mask=math.nan)),
    "rates[0].gather.pair is True": damaged(lambda d: d["rates"][0]["gather"].update(pair=True)),
    "takes no time": damaged(lambda d: d["rates"][0]["tile"].update(call=0, row=0, pair=0, element=0)),
    "rates[0].threads is 0": damaged(lambda d: d["rates"][0].update(threads=0)),
    "crossings[0].family is 'Window(1)'": damaged(lambda d: d["crossings"][0].update(family="Window(1)")),
    "expected them to ascend": damaged(lambda d: d["crossings"][0].update(low=256)),
    "but dense_from None": damaged(lambda d: d["crossings"][0].update(dense_from=None)),
    "estimate is 7": damaged(lambda d: d["crossings"][0].update(estimate=7)),
    "high is 12.5": damaged(lambda d: d["crossings"][0].update(high=12.5)),
}


@pytest.mark.parametrize("why", BROKEN)
def test_a_file_that_cannot_be_used_is_ignored_with_a_warning(folder, why):
    path = put(folder, BROKEN[why])
    with pytest.warns(UserWarning) as caught:
        assert rates.table() is rates.GENERIC
    assert [str(w.message).startswith(f"{path} is ignored: ") and why in str(w.message) for w in caught] == [True]
    assert rates.table() is rates.GENERIC  # and is not read again


def test_a_file_that_cannot_be_read_is_ignored_with_a_warning(folder):
    (folder / "machines" / rates.file_name(HERE)).mkdir()
    with pytest.warns(UserWarning, match="is ignored"):
        assert rates.table() is rates.GENERIC


def test_importing_reads_no_table_and_no_harness():
    code = """
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
import sparse_attention
sparse_attention.attention
assert not [name for name in sys.modules if "breakeven" in name]
assert not [path for path in opened if "machines" in path]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_shipped_files_can_be_read():
    folder = rates.Path(rates.__file__).parent / "machines"
    for path in folder.glob("*.json"):
        found = rates.load(path, json.loads(path.read_text())["class"])
        assert path.name == rates.file_name(found.machine_class)


def sizes(length, heads=4, kv_heads=None, kv_len=None, head_dim=64, batch=1, dtype=torch.float32):
    return dispatch.Sizes(batch, heads, kv_heads or heads, length, kv_len or length, head_dim, dtype, "cpu")


def test_what_was_measured_goes_before_what_is_counted():
    pattern = parse(WINDOW)
    # counted work says sparse from 16 positions on
    known = table(crossing(dense_from=16, low=4000, high=5000, estimate=4400.0))
    chosen = {n: dispatch.choose(pattern, sizes(n), 1, known) for n in (15, 16, 4000, 4001, 4999, 5000, 9000)}
    assert [plan.impl for plan in chosen.values()] == ["gather", "dense", "dense", "tile", "tile", "tile", "tile"]
    assert "dense was faster when measured (dense up to 4,000, sparse from 5,000 positions; a file)" in chosen[4000].why
    assert "too close to call when measured" in chosen[4001].why and "cheapest by counted work" in chosen[4001].why
    assert "sparse was faster when measured" in chosen[5000].why and "the cheapest such engine" in chosen[5000].why
    # counted work says dense at 32 positions, as a mask and a call of SDPA cost nothing here
    cheap = entry(dense=Rate(1, 0, 0, 0.001))
    known = table(crossing(high=32), rates=[cheap])
    assert [dispatch.choose(pattern, sizes(n), 1, known).impl for n in (31, 32)] == ["dense", "tile"]
    never = table(crossing(dense_from=16, low=512))
    assert [dispatch.choose(pattern, sizes(n), 1, never).impl for n in (512, 513)] == ["dense", "tile"]


@pytest.mark.parametrize(
    "other",
    [
        {"heads": 16},
        {"heads": 1},
        {"kv_heads": 2},
        {"kv_len": 400},
        {"head_dim": 128},
        {"dtype": torch.bfloat16},
        {"batch": 3},
    ],
)
def test_a_crossing_speaks_of_nothing_else_than_was_measured(other):
    known = table(crossing(dense_from=16, low=4000, high=5000))
    assert dispatch.choose(parse(WINDOW), sizes(300, **other), 1, known).impl == "tile"
    assert dispatch.choose(SlidingWindow(255), sizes(300), 1, known).impl == "tile"
    assert dispatch.choose(parse(WINDOW), sizes(300), 2, known).impl == "tile"
    assert dispatch.choose(parse(WINDOW), sizes(300, heads=2, batch=4), 1, known).impl == "dense"


def test_the_nearest_number_of_heads_counts():
    known = table(crossing(dense_from=16, low=500, heads=4), crossing(high=16, heads=8))
    assert dispatch.choose(parse(WINDOW), sizes(500, heads=4), 1, known).impl == "dense"
    assert dispatch.choose(parse(WINDOW), sizes(500, heads=8), 1, known).impl == "tile"


def test_rates_are_of_the_nearest_threads_and_of_float32_where_a_dtype_was_not_measured():
    known = table(rates=[entry(1), entry(8, tile=Rate(1, 1, 1, 1)), entry(1, "bfloat16", tile=Rate(2, 2, 2, 2))])
    assert known.rates_for(6, "float32")[0] == 8
    assert known.rates_for(2, "float32")[0] == 1
    assert known.rates_for(8, "bfloat16")[1]["tile"].call == 2
    assert known.rates_for(8, "float16")[1]["tile"].call == 1


def test_plan_reads_the_table_of_this_machine(folder):
    put(folder, content(crossing(dense_from=16, low=4000, threads=torch.get_num_threads())))
    dispatch._plan.cache_clear()
    q = torch.empty(1, 4, 300, 64)
    try:
        found = dispatch.plan(parse(WINDOW), dispatch.Sizes.of(q, q))
        assert found.impl == "dense" and rates.file_name(HERE) in found.why
    finally:
        dispatch._plan.cache_clear()


PATTERNS = (SlidingWindow(64), SlidingWindow(7), Causal(), LogSparse(), BigBird(block=16), Longformer(32, 1))


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("q_len, kv_len", [(16, 16), (100, 100), (1, 200), (70, 300)])
def test_computed_lanes_by_both_tables_and_by_the_mask(pattern, q_len, kv_len):
    expected = 0
    for mask in pattern.mask(q_len, kv_len, 2).numpy():
        for first in range(0, q_len, 16):
            for tile in range(0, kv_len, 64):
                keys = np.nonzero(mask[first : first + 16, tile : tile + 64].any(axis=0))[0]
                expected += 16 * (keys[-1] - keys[0] + 1) if keys.size else 0
    assert of_rows(rows(pattern, q_len, kv_len, 2)) == expected
    assert of_layout(layout(pattern, q_len, kv_len, 2)) == expected


def test_computed_lanes_of_strided_parts():
    assert of_layout(layout(Dilated(64, 4), 1024, 1024, 3)) == 3 * 4 * of_layout(layout(SlidingWindow(64), 256, 256))
    assert of_layout(layout(MultiScale(64), 1024, 1024)) > of_layout(layout(SlidingWindow(64), 1024, 1024))


def test_causal_pairs_that_dense_computes():
    assert dispatch._causal_pairs(512) == 512 * 512
    assert dispatch._causal_pairs(1024) == 3 * 1024 * 1024 // 4
    assert dispatch._causal_pairs(16384) / 16384**2 == pytest.approx(0.5, abs=0.02)


def samples(rate, engine, sd=0.0, seed=0):
    noise = random.Random(seed)
    for call in calibration.calls():
        exact = rate.time(call.work(engine), call.head_dim)
        yield Sample(call.work(engine), call.head_dim, exact * noise.lognormvariate(0, sd))


@pytest.mark.parametrize("engine", RATES)
def test_a_fit_finds_the_rate_behind_the_times(engine):
    found = fit(list(samples(RATES[engine], engine)))
    assert found.rate == pytest.approx(RATES[engine], rel=1e-3, abs=1e-3)
    assert found.spread == pytest.approx([1] * 5)
    noisy = fit(list(samples(RATES[engine], engine, sd=0.05)))
    assert 0.8 < noisy.spread[0] < noisy.spread[2] < noisy.spread[-1] < 1.25
    assert min(noisy.rate) >= 0
    with pytest.raises(ValueError, match="samples"):
        fit(list(samples(RATES[engine], engine))[:5])


def test_least_squares_as_scipy_does_it():
    optimize = pytest.importorskip("scipy.optimize")
    generator = np.random.default_rng(0)
    for _ in range(20):
        columns, target = generator.normal(size=(12, 5)), generator.normal(size=12)
        assert non_negative_least_squares(columns, target) == pytest.approx(optimize.nnls(columns, target)[0], abs=1e-9)


def true_time(rate_of, pattern, size, engine):
    return rate_of[engine].time(dispatch.work(pattern, size)[engine], size.head_dim)


def test_fitted_rates_lose_at_most_five_percent_and_ten_microseconds():
    fitted = {engine: fit(list(samples(rate, engine, sd=0.03))).rate for engine, rate in RATES.items()}
    known = Table("any", "fitted", {(1, "float32"): fitted}, {})
    for pattern in (SlidingWindow(64), SlidingWindow(256), Causal(), LogSparse(), BigBird()):
        for length in (16, 32, 64, 128, 256, 512, 1024, 2048):
            size = sizes(length)
            times = {engine: true_time(RATES, pattern, size, engine) for engine in RATES}
            chosen = dispatch.choose(pattern, size, 1, known).impl
            assert times[chosen] <= 1.05 * min(times.values()) + 10_000, (pattern, length, times)


class FakeMachine(FakeProcesses):
    """Engines that take exactly what `truth` says, but for noise."""

    def __init__(self, truth, **fields):
        super().__init__(self._seconds, sd=0.01, **fields)
        self.truth = truth

    def _seconds(self, case):
        args = case.args
        length = args.get("length")
        call = calibration.Call(
            args["pattern"], args["heads"], args.get("q_len", length), args.get("kv_len", length), args["head_dim"]
        )
        if "impl" in args:
            return call.seconds(args["impl"], self.truth[args["impl"]]), 1.0
        sparse = {engine: Rate(*rate).time(call.work(engine), call.head_dim) for engine, rate in args["rates"].items()}
        return call.seconds(min(sparse, key=sparse.get), self.truth[min(sparse, key=sparse.get)]), call.seconds("dense", self.truth["dense"])


@pytest.fixture
def one_core(monkeypatch):
    monkeypatch.setattr("sparse_attention.breakeven.machine.cores", lambda: 1)
    monkeypatch.setattr(calibration, "DTYPES", ("float32",))
    monkeypatch.setattr(calibration, "FAMILIES", ((WINDOW, "float32", 64), ("Causal()", "float32", 64)))


BIG = Work(1000, 100_000, 100_000)
# dense is quick to call and slow at work: it wins below about 110 positions
SLOW_CALLS = {"tile": Rate(30_000, 40, 0.1, 0.04), "gather": Rate(60_000, 40, 0.4, 0.08), "dense": Rate(1_000, 60, 0.0, 0.05, 0.6)}


def test_calibration_finds_rates_and_crossings(one_core, monkeypatch):
    monkeypatch.setattr(race_module, "run_worker", FakeMachine(SLOW_CALLS))
    data = calibration.calibrate(1000.0, Silent())
    known = rates.parse(json.loads(json.dumps(data)), machine_class(), "made")
    for engine, rate in known.rates[1, "float32"].items():
        assert rate.time(BIG, 64) == pytest.approx(SLOW_CALLS[engine].time(BIG, 64), rel=0.1)
    window = known.crossing(WINDOW, "float32", 64, 1, 4)
    for length in calibration.LENGTHS:
        times = {engine: true_time(SLOW_CALLS, parse(WINDOW), sizes(length), engine) for engine in SLOW_CALLS}
        dense_wins = times["dense"] < min(times["tile"], times["gather"])
        assert window.winner(length) in ("dense" if dense_wins else "sparse", None)
        chosen = dispatch.choose(parse(WINDOW), sizes(length), 1, known).impl
        assert times[chosen] <= 1.05 * min(times.values()) + 10_000
    assert window.low and window.high
    changed = calibration.changes(rates.GENERIC, known)
    assert any(WINDOW in line and "-> dense" in line for line in changed)
    assert not calibration.changes(known, known)


def test_rates_that_predict_badly_are_left_out(one_core, monkeypatch):
    class Erratic(FakeMachine):
        def _seconds(self, case):
            candidate_s, baseline_s = super()._seconds(case)
            erratic = case.args.get("impl") == "tile" and case.args["dtype"] in self.erratic
            return candidate_s * (10 ** self.random.uniform(-1, 1) if erratic else 1), baseline_s

    monkeypatch.setattr(calibration, "DTYPES", ("float32", "bfloat16"))
    machine = Erratic(SLOW_CALLS)
    machine.erratic = {"bfloat16"}
    monkeypatch.setattr(race_module, "run_worker", machine)
    data = calibration.calibrate(1000.0, Silent())
    assert [entry["dtype"] for entry in data["rates"]] == ["float32"]
    assert "left out: they predict too badly" in calibration.report(data)
    machine.erratic = {"float32", "bfloat16"}
    with pytest.raises(calibration.TooDisturbed, match="no rates of float32"):
        calibration.calibrate(1000.0, Silent())


def test_a_wrong_engine_or_a_busy_machine_writes_nothing(one_core, folder, monkeypatch, capsys):
    class Wrong(FakeMachine):
        def __call__(self, kind, cases, **fields):
            found = super().__call__(kind, cases, **fields)
            return {**found, "errors": {cases[0].id: "AssertionError: off by 1"}}

    monkeypatch.setattr("sparse_attention._build.library", lambda: None)
    monkeypatch.setattr(race_module, "run_worker", Wrong(SLOW_CALLS))
    assert main(["calibrate", "--quiet"]) == 1
    assert "off by 1" in capsys.readouterr().err
    names = {calibration._timed("float32", engine, call).id for engine in RATES for call in calibration.calls()}
    monkeypatch.setattr(race_module, "run_worker", FakeMachine(SLOW_CALLS, disturbed=names))
    assert main(["calibrate", "--quiet"]) == 12
    assert "nothing written: no rates of float32" in capsys.readouterr().err
    assert not list((folder / "machines").iterdir())


def test_what_was_timed_in_peace_is_kept(one_core, monkeypatch, capfd):
    monkeypatch.setattr(calibration, "DTYPES", ("float32", "bfloat16"))
    names = {calibration._timed("bfloat16", "tile", call).id for call in calibration.calls()}
    monkeypatch.setattr(race_module, "run_worker", FakeMachine(SLOW_CALLS, disturbed=names))
    data = calibration.calibrate(1000.0, Progress())
    assert [entry["dtype"] for entry in data["rates"]] == ["float32"] and len(data["crossings"]) == 2
    assert "no rates of bfloat16: 7" in capfd.readouterr().err


def test_command_calibrate(one_core, folder, monkeypatch, capsys):
    monkeypatch.setattr("sparse_attention._build.library", lambda: None)
    monkeypatch.setattr(race_module, "run_worker", FakeMachine(SLOW_CALLS))
    assert main(["calibrate", "--dry-run"]) == 0
    assert "cpu-" in capsys.readouterr().out and not list((folder / "machines").iterdir())
    assert main(["calibrate", "--quiet"]) == 0
    shown = capsys.readouterr().out
    path = folder / "machines" / rates.file_name(machine_class())
    assert f"written to {path}; before, dispatch read: built in" in shown
    assert f"{WINDOW}, float32, head_dim 64, 1 thread: wins from" in shown and "-> dense" in shown
    rates.table.cache_clear()
    assert rates.table().source == str(path)
    elsewhere, told = folder / "shipped.json", folder / "told.json"
    assert main(["calibrate", "--quiet", "--out", str(elsewhere), "--json", str(told)]) == 0
    assert rates.load(elsewhere, machine_class()).crossings
    assert sorted(p.name for p in folder.iterdir()) == ["machines", "package", "shipped.json", "told.json"]
    found = json.loads(told.read_text())
    assert (found["path"], found["before"]) == (str(elsewhere), str(path)) and found["table"] == json.loads(elsewhere.read_text())


class Interrupted(FakeMachine):
    """Killed at its `last` block."""

    last = 0

    def __call__(self, kind, cases, **fields):
        if len(self.started) == self.last:
            raise KeyboardInterrupt
        return super().__call__(kind, cases, **fields)


@pytest.mark.parametrize("last", [2, 6])
def test_a_calibration_goes_on_where_it_was_cut_short(one_core, folder, monkeypatch, capsys, last):
    monkeypatch.setattr("sparse_attention._build.library", lambda: None)
    cut, partial = Interrupted(SLOW_CALLS), folder / "partial.json"
    cut.last = last
    monkeypatch.setattr(race_module, "run_worker", cut)
    with pytest.raises(KeyboardInterrupt):
        main(["calibrate", "--quiet", "--json", str(partial)])
    stored = calibration_store.load_runs(str(partial))
    blocks = {name: len(run.evidence) for name, run in stored.items()}
    assert sum(blocks.values()) == last and ("crossings/1" in blocks) == (last > calibration.RATE_BLOCKS)
    rest = FakeMachine(SLOW_CALLS)
    monkeypatch.setattr(race_module, "run_worker", rest)
    assert main(["calibrate", "--quiet", "--resume", str(partial)]) == 0
    timed = [names for _, names in rest.started if all(name.startswith("float32/") for name in names)]
    assert len(timed) == max(calibration.RATE_BLOCKS - last, 0), "blocks of rates that were there are not measured again"
    assert f"{WINDOW}, float32, head_dim 64, 1 thread: wins from" in capsys.readouterr().out
    assert json.loads(partial.read_text())["table"]["crossings"]
    assert main(["calibrate", "--quiet", "--resume", str(folder / "machines" / rates.file_name(machine_class()))]) == 2
    assert "is no calibration that was cut short" in capsys.readouterr().err


def test_chosen_break_even_lengths_are_measured_and_the_others_kept(one_core, folder, monkeypatch, capsys):
    monkeypatch.setattr("sparse_attention._build.library", lambda: None)
    monkeypatch.setattr(race_module, "run_worker", FakeMachine(SLOW_CALLS))
    assert main(["calibrate", "--quiet"]) == 0
    path = folder / "machines" / rates.file_name(machine_class())
    before = {entry["family"]: entry for entry in json.loads(path.read_text())["crossings"]}
    capsys.readouterr()
    assert main(["calibrate", "--cases", "Causal*", "--dry-run"]) == 0
    assert "Causal()" in (shown := capsys.readouterr().out) and "SlidingWindow" not in shown
    chosen = FakeMachine(SLOW_CALLS)
    monkeypatch.setattr(race_module, "run_worker", chosen)
    assert main(["calibrate", "--quiet", "--cases", "Causal*"]) == 0
    raced = {name for _, names in chosen.started for name in names if not name.startswith("float32/")}
    assert raced and all(name.startswith("Causal()") for name in raced)
    assert "1 of these break-even lengths were not measured now" in capsys.readouterr().out
    after = {entry["family"]: entry for entry in json.loads(path.read_text())["crossings"]}
    assert after.keys() == before.keys() and after[WINDOW] == before[WINDOW]
    assert main(["calibrate", "--cases", "renamed*"]) == 13


def test_a_table_that_dispatch_would_refuse_is_not_written(tmp_path):
    path = tmp_path / "table.json"
    calibration_store.write(content(), path)
    before = path.read_text()
    bad = copy.deepcopy(content())
    bad["rates"][0]["tile"]["call"] = math.inf
    with pytest.raises(ValueError, match="call is inf"):
        calibration_store.write(bad, path)
    assert path.read_text() == before and [p.name for p in tmp_path.iterdir()] == ["table.json"]


@pytest.mark.parametrize("pattern, dtype, head_dim", calibration.FAMILIES[:4])
def test_what_is_timed_is_right(pattern, dtype, head_dim):
    from sparse_attention import calibration_workloads as workloads
    from sparse_attention.breakeven.checking import WrongOutput, check
    from sparse_attention.reference import reference

    for engine in RATES:
        check(workloads.timed(pattern, engine, 2, 80, 80, 64, "float32"))
    favour = {engine: list(rate) for engine, rate in RATES.items() if engine != "dense"}
    raced = workloads.against_dense(pattern, favour, 96, 2, 64, "float32")
    check(raced)
    q, k, v = raced.inputs
    torch.testing.assert_close(raced.baselines["dense"](), reference(q, k, v, parse(pattern))[0], atol=1e-4, rtol=1e-4)
    raced.candidate = lambda: torch.zeros_like(q)
    with pytest.raises(WrongOutput):
        check(raced)
