"""Floors by machine class, and the ratchet: known answers, and error rates on simulated runs."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_attention.breakeven import Case, TwoStage, Verdict, results
from sparse_attention.breakeven.cli import main
from sparse_attention.breakeven.ratchet import propose, supported, written
from sparse_attention.breakeven.terms import Terms, latest, terms
from sparse_attention.breakeven.thresholds import Thresholds, key, lowered
from sparse_attention.breakeven.verdict import ExitCode
from tests import breakeven_toys as toys
from tests.breakeven_runs import history

HERE = "cpu/zen4/2c/1t"


def floors(of):
    return Thresholds({name: {p: {"floor": f} for p, f in entries.items()} for name, entries in of.items()}, "floors.json")


def case(name, floor=1.0):
    return Case(name, "m:f", floor=floor)


def test_the_last_match_holds():
    file = floors(of={"cpu/*": {"*": 1.1, "window*": 2.0}, "cpu/zen4/2c": {"window256/1k": 3.0}, "cuda/h100": {"*": 9.0}})
    chosen = {c.id: c.floor for c in file.applied([case("window256/1k"), case("window64"), case("other", 5.0)], HERE)}
    assert chosen == {"window256/1k": 3.0, "window64": 2.0, "other": 1.1}
    assert file.entry("cpu/zen3/4c/4t", "window256/1k")["floor"] == 2.0


def test_a_case_without_an_entry_keeps_its_own_floor():
    file = floors(of={"cpu/zen4/2c": {}})
    assert file.knows(HERE) and file.unjudged(HERE) == ""
    assert file.applied([case("a", 1.7)], HERE)[0].floor == 1.7


def test_an_unknown_class_is_not_judged():
    file = floors(of={"cpu/zen4/2c/2t": {"*": 1.0}})
    assert "reported, not judged" in file.unjudged(HERE) and HERE in file.unjudged(HERE)


def test_threads_and_clock_are_part_of_the_class():
    assert key("cpu/zen4/2c", 1) == HERE != key("cpu/zen4/2c", 2)
    assert key("cuda/h100", 8, "cuda") == key("cuda/h100", 1, "cuda") != key("cuda/h100", 1, "cuda-graph")


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "not JSON"),
        ("[]", "object of machine classes"),
        ('{"cpu": []}', "object of machine classes"),
        ('{"cpu": {"a": 1.0}}', "cpu: a: floor must be a positive speedup, got None"),
        ('{"cpu": {"a": {"floor": -1}}}', "got -1"),
        ('{"cpu": {"a": {"floor": Infinity}}}', "got inf"),
        ('{"cpu": {"a": {"floor": true}}}', "got True"),
    ],
)
def test_a_broken_file_is_refused(text, said):
    with pytest.raises(ValueError, match="floors.json.*" + said):
        Thresholds.parse(text, "floors.json")


def test_the_file_has_a_line_a_floor_and_survives_the_disk(tmp_path):
    file = floors(of={"cpu/a": {"x": 1.5, "y": 2.0}, "cpu/b": {}})
    path = tmp_path / "floors.json"
    file.save(path)
    assert Thresholds.load(path).classes == file.classes
    assert [line for line in path.read_text().splitlines() if "floor" in line] == [
        '    "x": {"floor": 1.5},',
        '    "y": {"floor": 2.0}',
    ]
    assert Thresholds.parse(Thresholds({}).text(), "empty").classes == {}


def test_ratchet_tightens_with_history():
    rng = random.Random(0)
    found = propose(history([3.0, 3.02, 2.98, 3.01], rng, sd=0.005), Thresholds({}), [case("a", 1.0)])
    assert len(found) == 1 and not found[0].lowers
    assert (found[0].key, found[0].case, found[0].runs, found[0].current) == (HERE, "a", 4, 1.0)
    assert 2.5 < found[0].floor < 2.9
    after = written(floors(of={HERE: {"a": 1.0, "*": 1.2}}), found, "2026-02-02", "b" * 40)
    assert after.floor(HERE, case("a")) == found[0].floor, "it goes below the pattern that would hold otherwise"
    assert after.classes[HERE]["a"]["reason"].startswith("ratchet: 4 runs at 3x")


@pytest.mark.parametrize("runs, reason", [(history([3.0] * 2, random.Random(0)), "too few"), ([], "none")])
def test_ratchet_needs_history(runs, reason):
    assert propose(runs, Thresholds({}), [case("a")]) == [], reason


def test_ratchet_leaves_out_what_is_no_history():
    rng = random.Random(0)
    other = history([9.0] * 3, rng, base="c" * 40) + history([9.0] * 3, rng, blocks=4)
    assert propose(other, Thresholds({}), [case("a")]) == []
    assert {p.key for p in propose(history([3.0] * 3, rng, threads=2), Thresholds({}), [case("a")])} == {"cpu/zen4/2c/2t"}


def test_ratchet_starts_anew_after_a_step():
    rng = random.Random(0)
    speedups = [2.0 * math.exp(rng.gauss(0, 0.005)) for _ in range(8)] + [3.0 * math.exp(rng.gauss(0, 0.005)) for _ in range(8)]
    found = propose(history(speedups, rng, sd=0.005), Thresholds({}), [case("a")])
    assert found[0].runs == 8 and found[0].floor > 2.6


def test_ratchet_lowers_only_with_a_reason():
    found = propose(history([1.5] * 4, random.Random(0)), floors(of={HERE: {"a": 2.0}}), [case("a")])
    assert found[0].lowers
    with pytest.raises(ValueError, match="reason must say why a is lowered"):
        written(Thresholds({}), found, "2026-02-02", None, " ")
    after = written(floors(of={HERE: {"a": 2.0}}), found, "2026-02-02", None, "torch 3 made dense faster")
    assert after.classes[HERE]["a"]["was"] == 2.0
    assert after.classes[HERE]["a"]["reason"] == "torch 3 made dense faster"
    assert lowered(floors(of={HERE: {"a": 2.0}}), after, [case("a")], [case("a")]) == []


@pytest.mark.parametrize(
    "entry", [{"floor": 1.0}, {"floor": 1.0, "reason": "x"}, {"floor": 1.0, "was": 2.0}, {"floor": 1.0, "was": 1.5, "reason": "x"}]
)
def test_a_floor_lowered_by_hand_is_found(entry):
    before, cases = floors(of={HERE: {"a": 2.0}}), [case("a"), case("b")]
    assert len(lowered(before, Thresholds({HERE: {"a": entry}}), cases, cases)) == 1
    assert lowered(before, floors(of={HERE: {"a": 2.5, "b": 1.0}}), cases, cases) == []


@pytest.mark.parametrize(
    "before, after, own, says",
    [
        ({HERE: {"a": 2.0}}, {HERE: {"a": 2.0, "a*": 1.5}}, 1.0, "a: 2 became 1.5"),
        ({HERE: {"a": 2.0}}, {HERE: {"a": 2.0}, "cpu/zen4/*": {"*": 1.5}}, 1.0, "a: 2 became 1.5"),
        ({"cpu/zen4/2c": {"a": 2.0}}, {"cpu/zen4/2c": {"a": 2.0}, HERE: {"a": 1.5}}, 1.0, HERE + ": a: 2 became 1.5"),
        ({"cpu/*": {"a": 2.0}}, {"cpu/*": {"a": 2.0}, "cpu/zen*": {"a": 1.5}}, 1.0, "cpu/zen*: a: 2 became 1.5"),
        ({HERE: {}}, {HERE: {"*": 1.5}}, 3.0, "a: 3 became 1.5"),
        ({HERE: {"a": 2.0}}, {HERE: {}}, 1.0, "a: 2 became 1 "),
        ({HERE: {"a": 2.0}}, {}, 1.0, HERE + ": nothing is judged"),
        ({HERE: {"a": 2.0}}, {"cuda/h100": {}}, 1.0, HERE + ": nothing is judged"),
    ],
)
def test_every_way_to_a_lower_floor_is_found(before, after, own, says):
    found = lowered(floors(of=before), floors(of=after), [case("a", own)], [case("a", own)])
    assert len(found) == 1 and says in found[0]


def test_a_case_that_lowers_its_own_floor_is_found():
    file = floors(of={HERE: {}})
    assert len(lowered(file, file, [case("a", 3.0)], [case("a", 2.0)])) == 1
    assert lowered(file, file, [case("a", 3.0)], [case("a", 3.5), case("new", 0.5)]) == []


def test_a_class_that_becomes_known_lowers_nothing():
    assert lowered(floors(of={HERE: {}}), floors(of={HERE: {}, "cuda/h100": {"a": 0.5}}), [case("a")], [case("a")]) == []


@pytest.mark.parametrize("runs", [3, 6, 15])
def test_an_unchanged_kernel_stays_above_its_ratcheted_floor(runs):
    """Runs differ by 2 % beside their blocks' 2 %: without any margin, gates of the next run fail at most 1 % of the time."""
    rng = random.Random(runs)
    policy, trials, fails = TwoStage(), 400, 0
    for _ in range(trials):
        past = [[rng.gauss(shift, 0.02) for _ in range(5)] for shift in (rng.gauss(1.0, 0.02) for _ in range(runs))]
        floor, shift = supported(past, margin=0.0), rng.gauss(1.0, 0.02)
        fails += policy.judge([rng.gauss(shift, 0.02) for _ in range(15)], floor).verdict is Verdict.FAIL
    assert fails <= 0.02 * trials


def test_the_newest_earlier_run_of_this_machine_is_taken(tmp_path):
    rng = random.Random(0)
    for number, facts in enumerate(
        [dict(time="2026-01-01"), dict(time="2026-01-03"), dict(time="2026-01-04", threads=2), dict(time="2026-01-05", base="c" * 40)]
    ):
        history([1.0], rng, **facts)[0].save(tmp_path / f"{number}.json")
    (tmp_path / "power.json").write_text("[]")
    now = history([1.0], rng, time="2026-01-06")[0]
    assert latest(tmp_path, now).machine["time"] == "2026-01-03"
    assert latest(tmp_path, history([1.0], rng, time="2026-01-01")[0]) is None


def test_runs_beside_the_table_are_the_default_to_compare_with(tmp_path, monkeypatch):
    class Options:
        base = since = thresholds = None
        allow_unknown_class = False

    (tmp_path / "own_table.py").write_text("CASES = []\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    now = history([1.0], random.Random(0), time="2026-01-06")[0]
    assert terms(Options, [], 1, "cpu", "own_table:CASES").since is None
    (tmp_path / "results").mkdir()
    found = terms(Options, [], 1, "cpu", "own_table:CASES")
    assert found.since == tmp_path / "results" and found.remarks(now, []) == []
    Options.since = str(tmp_path / "results")
    assert "no earlier run" in terms(Options, [], 1, "cpu", "own_table:CASES").remarks(now, [])[0]


TABLE = ["--table", "tests.breakeven_toys:CASES", "--cases", "quick"]
MEASURE = [*TABLE, "--device", toys.DEVICE, "--budget", "5m", "--quiet", "--policy", "sequential"]


def here(threads):
    from sparse_attention.breakeven.machine import machine_class

    return key(machine_class(), threads)


def test_gate_takes_this_machines_floor(tmp_path, capsys):
    path = tmp_path / "floors.json"
    floors(of={here(1): {"quick": 5.0}}).save(path)
    assert main(["gate", *MEASURE, "--threads", "1", "--thresholds", str(path)]) == 10
    assert "5x" in capsys.readouterr().out


def test_a_floor_of_a_case_that_was_renamed_is_missed(tmp_path, capsys):
    path = tmp_path / "floors.json"
    command = ["gate", *MEASURE, "--threads", "1", "--thresholds", str(path), "--dry-run"]
    floors(of={here(1): {"old_name": 5.0, "old*": 2.0, "largest": 1.0}, "cpu/abacus/1c": {"older": 1.0}}).save(path)
    assert main(command) == 13
    said = capsys.readouterr().err
    assert "floors for old_name, of which tests.breakeven_toys:CASES has no case" in said
    floors(of={here(1): {"quick": 5.0, "largest": 1.0}}).save(path)
    assert main(command) == 0


def test_gate_reports_and_does_not_judge_an_unknown_class(tmp_path, capsys):
    path, stored = tmp_path / "floors.json", tmp_path / "run.json"
    floors(of={"cpu/abacus/1c": {"quick": 5.0}}).save(path)
    command = ["gate", *MEASURE, "--thresholds", str(path), "--json", str(stored)]
    assert main(command) == 12
    said = capsys.readouterr().out
    assert "NOT EVALUATED" in said and "reported, not judged" in said and "3.0" in said
    assert main(["regate", str(stored)]) == 12, "what may not be judged is not judged later either"
    assert main(["regate", str(stored), "--allow-not-evaluated"]) == 13
    assert main([*command, "--allow-unknown-class"]) == 0


def test_gate_refuses_a_file_that_is_not_there(capsys):
    assert main(["gate", *MEASURE, "--thresholds", "nowhere.json"]) == 2
    assert "nowhere.json" in capsys.readouterr().err


def test_a_wrong_kernel_is_wrong_on_an_unknown_class_too():
    unknown = Terms([], unjudged="x", allow_unjudged=True)
    wrong = [type("R", (), {"verdict": Verdict.WRONG, "reason": "zeros"})()]
    assert unknown.exit_code(wrong, False, False) is ExitCode.WRONG
    assert unknown.exit_code([], False, False) is ExitCode.NOTHING_CHECKED


def test_gate_says_what_moved(tmp_path, capsys):
    stored = tmp_path / "run.json"
    assert main(["gate", *MEASURE, "--json", str(stored)]) == 0
    data = json.loads(stored.read_text())
    data["machine"]["time"] = "2020-01-01T00:00:00Z"
    for entry in data["cases"]:
        for block in entry["blocks"]:
            block["candidate_s"] = [s / 2 for s in block["candidate_s"]]
    data["machine"]["commit"] = "a" * 40
    stored.write_text(json.dumps(data))
    capsys.readouterr()
    assert main(["gate", *MEASURE, "--since", str(stored)]) == 0
    assert "quick: kernel moved: speedup " in capsys.readouterr().out


def test_thresholds_beside_the_table_are_the_default():
    class Options:
        base = since = thresholds = None
        allow_unknown_class = False

    found = terms(Options, [case("a")], 1, "cpu", "perf.cases:CASES")
    assert found.unjudged == "" or "perf/thresholds.json" in found.unjudged
    assert not found.asked
    Options.thresholds = "none"
    assert terms(Options, [case("a", 1.3)], 1, "cpu", "perf.cases:CASES").cases[0].floor == 1.3


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_command_ratchet(tmp_path, capsys, monkeypatch):
    rng = random.Random(0)
    for number, run in enumerate(history([3.0, 3.05, 2.98], rng, sd=0.01)):
        run.records = {"quick": run.records["a"]}
        run.records["quick"].case = toys.case("quick")
        run.save(tmp_path / f"run{number}.json")
    path = tmp_path / "floors.json"
    command = ["ratchet", str(tmp_path), *TABLE, "--thresholds", str(path)]
    assert main(command) == 0 and not path.exists()
    assert '+    "quick": {"floor": ' in capsys.readouterr().out
    assert main([*command, "--write"]) == 0
    floor = Thresholds.load(path).floor(HERE, case("quick"))
    assert 1.5 < floor < 3.0
    git(tmp_path, "init")
    git(tmp_path, "add", "floors.json")
    git(tmp_path, "commit", "-m", "floors")
    floors(of={HERE: {"quick": 4.0}}).save(path)
    assert main([*command, "--write"]) == 0
    assert "not lowered: " in capsys.readouterr().out
    assert Thresholds.load(path).floor(HERE, case("quick")) == 4.0
    assert main([*command, "--write", "--allow-lower"]) == 2
    assert main([*command, "--write", "--allow-lower", "--reason", "the old one was wrong"]) == 0
    assert Thresholds.load(path).classes[HERE]["quick"]["reason"] == "the old one was wrong"
    floors(of={HERE: {"quick": 1.0}}).save(path)
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--check", "HEAD"]) == 1
    assert "lowered silently" in capsys.readouterr().out
    assert main(["ratchet", str(tmp_path / "empty"), *TABLE]) == 2
    (tmp_path / "empty").mkdir()
    assert main(["ratchet", str(tmp_path / "empty"), *TABLE]) == 13


@pytest.fixture
def table_of_theirs(tmp_path, monkeypatch):
    """A repository with a table and its floors, one commit old."""
    (tmp_path / "rows.py").write_text("FLOOR = 3.0\n")
    lines = ["from sparse_attention.breakeven import Case", "from rows import FLOOR", 'CASES = [Case("a", "m:f", floor=FLOOR)]']
    (tmp_path / "their_table.py").write_text("\n".join(lines) + "\n")
    floors(of={HERE: {}}).save(tmp_path / "thresholds.json")
    for arguments in (["init"], ["add", "."], ["commit", "-m", "table"]):
        git(tmp_path, *arguments)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BREAKEVEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
    yield tmp_path
    for name in ("their_table", "rows"):
        sys.modules.pop(name, None)
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path)]


def test_command_ratchet_check_reads_the_revisions_table(table_of_theirs, capsys):
    command = ["ratchet", "--check", "HEAD", "--table", "their_table"]
    (table_of_theirs / "rows.py").write_text("FLOOR = 2.0\n")
    assert main(command) == 1
    assert f"lowered silently: {HERE}: a: 3 became 2" in capsys.readouterr().out
    reason = {"floor": 2.0, "was": 3.0, "reason": "the case became harder"}
    Thresholds({HERE: {"a": reason}}).save(table_of_theirs / "thresholds.json")
    assert main(command) == 0
    git(table_of_theirs, "rm", "--cached", "thresholds.json")
    git(table_of_theirs, "commit", "-m", "no file")
    floors(of={HERE: {"a": 1.0}}).save(table_of_theirs / "thresholds.json")
    assert main(command) == 1, "before there was a file, the case's own floor held"


def test_command_ratchet_check_without_the_revisions_table(table_of_theirs, capsys):
    git(table_of_theirs, "rm", "--cached", "their_table.py")
    git(table_of_theirs, "commit", "-m", "no table")
    floors(of={HERE: {"*": 2.5}}).save(table_of_theirs / "thresholds.json")
    assert main(["ratchet", "--check", "HEAD", "--table", "their_table:CASES"]) == 1
    said = capsys.readouterr().out
    assert "cannot be loaded (ModuleNotFoundError: No module named 'their_table')" in said
    assert f"lowered silently: {HERE}: a: 3 became 2.5" in said


def test_command_ratchet_writes_floors_for_each_number_of_threads(tmp_path):
    rng = random.Random(0)
    for threads, speedup in ((1, 3.0), (2, 2.0)):
        for number, run in enumerate(history([speedup] * 3, rng, sd=0.005, threads=threads)):
            run.records = {"quick": run.records["a"]}
            run.records["quick"].case = toys.case("quick")
            run.save(tmp_path / f"{threads}t-{number}.json")
    path = tmp_path / "floors.json"
    floors(of={"cpu/zen4/2c": {}}).save(path)
    told = tmp_path / "told" / "proposals.json"
    told.parent.mkdir()
    assert main(["ratchet", str(tmp_path), *TABLE, "--thresholds", str(path), "--json", str(told), "--write"]) == 0
    assert {(p["key"], p["lowers"]) for p in json.loads(told.read_text())} == {("cpu/zen4/2c/1t", False), ("cpu/zen4/2c/2t", False)}
    found = Thresholds.load(path)
    assert list(found.classes) == ["cpu/zen4/2c", "cpu/zen4/2c/1t", "cpu/zen4/2c/2t"]
    assert 2.5 < found.floor("cpu/zen4/2c/1t", case("quick")) < 3.0
    assert 1.6 < found.floor("cpu/zen4/2c/2t", case("quick")) < 2.0


def test_the_file_that_is_shipped_is_valid():
    assert Thresholds.load("perf/thresholds.json").classes


def test_pytest_does_not_judge_an_unknown_class(tmp_path):
    root = Path(__file__).resolve().parents[1]
    floors(of={"cpu/abacus/1c": {}}).save(tmp_path / "floors.json")
    lines = ["import pytest", "from tests.breakeven_toys import case", '@pytest.mark.parametrize("case", [case("quick")])']
    (tmp_path / "test_it.py").write_text("\n".join([*lines, "def test_race(case, breakeven_race):", "    breakeven_race(case)\n"]))
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "sparse_attention.breakeven.plugin", "--breakeven-device", toys.DEVICE]

    def session(*arguments):
        return subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, env=environment)

    found = session("--breakeven-thresholds", "floors.json")
    assert found.returncode == 12 and "reported, not judged" in found.stdout
    assert session("--breakeven-thresholds", "floors.json", "--breakeven-allow-unknown-class").returncode == 0
    assert session("--breakeven-thresholds", "nowhere.json").returncode == 4
