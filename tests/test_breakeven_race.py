"""Whole races in fresh processes, the stored run, and the command line with its exit codes."""

import json
import subprocess
import sys

import pytest

from sparse_attention.breakeven import Case, Race, Run, Sequential, Settings, TwoStage, Verdict, results, select
from sparse_attention.breakeven import machine
from sparse_attention.breakeven import race as race_module
from sparse_attention.breakeven.cli import main
from sparse_attention.breakeven.progress import Silent
from sparse_attention.breakeven.report import content
from sparse_attention.breakeven.result import result
from sparse_attention.breakeven.store import Block, Record
from sparse_attention.breakeven.table import markdown, seconds, text
from tests import breakeven_toys as toys
from tests.breakeven_toys import case
from tests.study_toys import FakeProcesses

TABLE = ["--table", "tests.breakeven_toys:CASES"]
MEASURE = [*TABLE, "--device", toys.DEVICE, "--budget", "20s", "--quiet", "--policy", "sequential"]


def raced(cases, policy=Sequential((2,)), **settings):
    chosen = Settings(budget_s=30.0, policy=policy, device=toys.DEVICE, **settings)
    run = Race(cases, chosen, Silent()).execute()
    return run, {r.id: r for r in results(run, policy)}


@pytest.fixture(scope="module")
def found():
    faults = [case(fault, fault=fault) for fault in ("zeros", "yesterday", "cached", "later", "raises", "dies")]
    away = [Case("away", "tests.breakeven_toys:nowhere"), Case("gone", "tests.breakeven_toys:no_such_builder")]
    return raced([case("quick", columns=("rival", "wrong")), case("limited", limit_s=4e-3), *faults, *away])


def test_speedup_is_over_the_fastest_baseline(found):
    quick = found[1]["quick"]
    assert quick.verdict is Verdict.PASS
    assert quick.baseline == "plain"
    assert quick.speedup == pytest.approx(3.0, rel=0.03)
    assert (quick.baseline_s, quick.candidate_s) == (pytest.approx(3e-3, rel=0.03), pytest.approx(1e-3, rel=0.03))


def test_baselines_that_are_close_are_timed_again():
    run, found = raced([Case("cold", "tests.breakeven_toys:cold")])
    assert run.records["cold"].scout["baselines"] == {
        "warming": pytest.approx(20e-3), "steady": pytest.approx(22e-3), "slow": pytest.approx(44e-3, rel=0.1)
    }  # fmt: skip
    assert found["cold"].baseline == "warming"


def test_a_limit_stands_in_for_a_baseline(found):
    limited = found[1]["limited"]
    assert limited.verdict is Verdict.PASS
    assert limited.speedup == pytest.approx(4.0, rel=0.03)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("zeros", "AssertionError"),
        ("later", "after it was timed"),
        ("raises", "no such kernel image"),
        ("dies", "exit status 3"),
        ("gone", "no_such_builder"),
    ],
)
def test_a_wrong_kernel_has_no_time(found, name, reason):
    wrong = found[1][name]
    assert wrong.verdict is Verdict.WRONG
    assert reason in wrong.reason
    assert wrong.candidate_s is None


@pytest.mark.parametrize("name, reason", [("yesterday", "stayed the same"), ("cached", "memory of an earlier call")])
def test_a_kernel_that_does_not_compute_is_suspicious(found, name, reason):
    cheat = found[1][name]
    assert cheat.verdict is Verdict.SUSPICIOUS
    assert reason in cheat.reason
    assert cheat.candidate_s is None


def test_a_kernel_that_hangs_is_wrong_and_ends(monkeypatch):
    monkeypatch.setattr(race_module, "BUILD_S", 6.0)
    monkeypatch.setattr(race_module, "GRACE_S", 0.0)
    policy = Sequential((2,))
    chosen = Settings(budget_s=5.0, policy=policy, device=toys.DEVICE)
    found = {r.id: r for r in results(Race([case("quick"), case("hangs", fault="hangs")], chosen, Silent()).execute(), policy)}
    assert found["hangs"].verdict is Verdict.WRONG
    assert "took longer than 0:0" in found["hangs"].reason
    assert found["quick"].verdict is not Verdict.WRONG


def test_a_kernel_that_hangs_later_is_wrong_too(monkeypatch, tmp_path):
    monkeypatch.setattr(race_module, "GRACE_S", 0.0)
    hanging = Case("hanging", "tests.breakeven_toys:hanging_later", {"scouted": str(tmp_path / "scouted")})
    policy = Sequential((2,))
    race = Race([hanging, case("quick")], Settings(budget_s=5.0, policy=policy, device=toys.DEVICE), Silent())
    race.scout()
    (tmp_path / "scouted").write_text("")
    race.first_look()
    found = {r.id: r for r in results(race.run, policy)}
    assert found["hanging"].verdict is Verdict.WRONG and "took longer than" in found["hanging"].reason
    assert found["quick"].verdict is Verdict.NOT_EVALUATED


def test_a_case_that_cannot_run_here_is_not_evaluated(found):
    assert found[1]["away"].verdict is Verdict.NOT_EVALUATED
    assert "not here" in found[1]["away"].reason


def test_columns_are_timed_beside_the_candidate_and_checked(found):
    columns = found[1]["quick"].columns
    assert columns["rival"]["speedup"] == pytest.approx(2.0, rel=0.05)
    assert "AssertionError" in columns["wrong"]["error"]
    assert "n/a" in text([found[1]["quick"]])


def test_a_gate_on_one_thread_tells_about_all_cores_too(found, monkeypatch):
    monkeypatch.setattr(race_module, "cores", lambda: 2)
    monkeypatch.setattr(race_module, "pinned", lambda threads: [])
    shown = raced([case("quick"), case("limited", limit_s=4e-3)])[1]
    assert shown["quick"].columns["dense, 2 threads"]["speedup"] == pytest.approx(3.0, rel=0.05)
    assert shown["limited"].columns == {}
    assert not raced([case("quick")], threads=2)[1]["quick"].columns


def test_the_table_has_a_row_a_case(found):
    shown = text(list(found[1].values()))
    row = next(line for line in shown.splitlines() if line.startswith("quick"))
    assert f"{found[1]['quick'].speedup:.3g}x [" in row and "PASS" in row and "ms" in row
    assert "limit 4.00 ms" in shown
    assert "zeros: WRONG: AssertionError" in shown
    assert markdown(list(found[1].values())).count("\n") == len(found[1]) + 1


def test_a_run_survives_the_disk(found, tmp_path):
    path = tmp_path / "run.json"
    found[0].save(path)
    again = {r.id: r for r in results(Run.load(path), Sequential((2,)))}
    assert again == found[1]


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 99}', '{"schema": 1, "cases": [{}]}'])
def test_a_foreign_file_is_refused(content, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="run.json is not a stored run"):
        Run.load(path)


def test_candidate_equal_to_the_baseline_fails_a_floor_of_five_percent():
    _, found = raced([case("par", slow=1e-3, floor=1.05)], policy=Sequential((5,)))
    assert found["par"].verdict is Verdict.FAIL
    assert found["par"].detects < 0.05


@pytest.mark.parametrize("budget_s, blocks", [(30.0, 3), (300.0, 5)])
def test_dear_cases_that_surely_pass_are_left_at_three_blocks_when_time_is_short(budget_s, blocks):
    """The toys' seconds are planned with, and take none."""
    cases = [case("dear", fast=1.0, slow=9.0), case("near", slow=1.02e-3), case("dear and near", fast=1.0, slow=1.001)]
    chosen = Settings(budget_s=budget_s, policy=TwoStage(), device=toys.DEVICE, threads=2)
    race = Race(cases, chosen, Silent())
    race.scout()
    race.first_look(leave_sure=True)
    taken = {name: len(record.blocks) for name, record in race.run.records.items()}
    assert taken == {"dear": blocks, "near": 5, "dear and near": 5}
    found = {r.id: r for r in results(race.run, TwoStage())}
    assert found["dear"].verdict is Verdict.PASS and found["dear"].interval.blocks == blocks


def test_suspects_come_before_what_is_for_information_and_that_before_the_undecided(monkeypatch):
    seen, fake = [], FakeProcesses(lambda case: (1e-3, case.args["slow"]))

    def watched(kind, cases, **fields):
        seen.append(((f"{kind} on {fields['threads']}" if kind == "block" else kind), [c.id for c in cases]))
        return {} if kind == "columns" else fake(kind, cases, **fields)

    monkeypatch.setattr(race_module, "run_worker", watched)
    monkeypatch.setattr(race_module, "cores", lambda: 2)
    cases = [case("below", slow=0.5e-3, columns=("rival",)), case("at it", slow=1e-3)]
    raced(cases, TwoStage())
    short = [kind for n, kind in enumerate(seen) if n == 0 or kind != seen[n - 1]]
    assert short == [
        ("scout", ["below", "at it"]),
        ("block on 1", ["below", "at it"]),
        ("block on 1", ["below"]),
        ("block on 2", ["below", "at it"]),
        ("columns", ["below"]),
        ("block on 1", ["at it"]),
    ]


def test_an_allowance_is_taken_off_the_candidate():
    slow = Case("slow", "tests.breakeven_toys:doubling", {"fast": 1e-3, "slow": 0.9e-3}, allowance_s=0.2e-3)
    _, found = raced([slow])
    assert found["slow"].speedup == pytest.approx(0.9 / 0.8, rel=0.03)


def test_shared_cases_have_equal_baseline_times():
    pair = [Case(n, "tests.breakeven_toys:shared", {"fast": f}, share="x") for n, f in (("a", 1e-3), ("b", 2e-3))]
    run, found = raced(pair)
    assert [b.baseline_s for b in run.records["a"].blocks] == [b.baseline_s for b in run.records["b"].blocks]
    assert found["a"].speedup / found["b"].speedup == pytest.approx(2.0, rel=0.03)


def test_shared_inputs_change_for_every_case():
    run, _ = raced([Case(n, "tests.breakeven_toys:drawn", share="x") for n in ("a", "b")])
    assert [record.scout["status"] for record in run.records.values()] == ["ok", "ok"]


def disturb(run, name, share):
    for block in run.records[name].blocks:
        block.clean = [i >= share * len(block.clean) for i in range(len(block.clean))]


def test_disturbed_blocks_do_not_judge(found, tmp_path):
    path = tmp_path / "run.json"
    found[0].save(path)
    run = Run.load(path)
    disturb(run, "quick", 0.9)
    disturb(run, "limited", 0.2)
    judged = {r.id: r for r in results(run, Sequential((2,)))}
    assert judged["quick"].verdict is Verdict.NOT_EVALUATED
    assert "contended: 2 of 2 blocks disturbed, 10 % of pairs clean" in judged["quick"].reason
    assert judged["limited"].verdict is Verdict.PASS


@pytest.mark.parametrize(
    "speedup, valid, expected", [(3.0, 4, Verdict.PASS), (3.0, 2, Verdict.NOT_EVALUATED), (0.5, 4, Verdict.NOT_EVALUATED)]
)
def test_few_blocks_may_let_pass_but_not_fail(speedup, valid, expected):
    record = Record(case("x"), {"status": "ok", "baselines": {"plain": 1.0}})
    for number in range(6):
        pair = [speedup * (1 + 0.001 * number)], [1.0], [number < valid]
        record.blocks.append(Block(number, "plain", *pair))
    assert result(record, TwoStage()).verdict is expected


def test_a_run_that_was_cut_short_goes_on(tmp_path):
    chosen = [case("quick"), case("other", slow=2e-3)]
    short, longer = (Settings(budget_s=30, policy=Sequential((n,)), device=toys.DEVICE) for n in (2, 4))
    path = tmp_path / "run.json"
    Race(chosen, short, Silent(), save=lambda run: run.save(path)).execute()
    before = Run.load(path)
    run = Race(chosen, longer, Silent(), resume=Run.load(path)).execute()
    assert [len(r.blocks) for r in run.records.values()] == [4, 4]
    assert run.records["quick"].blocks[:2] == before.records["quick"].blocks
    with pytest.raises(ValueError, match="other cases"):
        Race([case("quick")], longer, Silent(), resume=Run.load(path))


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Somebody's repository with a kernel, as the working folder."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for arguments in (["init"], ["add", "."], ["commit", "-m", "kernel"]):
        (folder / "kernel.py").write_text("speed = 1\n")
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)
    return folder


def test_the_commit_is_of_the_repository_that_is_worked_in(repository, monkeypatch):
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    clean = machine.describe()
    assert (clean["commit"], clean["dirty"], clean["changes"]) == (head, False, None)
    assert clean["harness"]["commit"] != head
    digests = set()
    for speed in (2, 3):
        (repository / "kernel.py").write_text(f"speed = {speed}\n")
        assert machine.describe()["dirty"]
        digests.add(machine.describe()["changes"])
    assert len(digests) == 2 and None not in digests
    subprocess.run(["git", "checkout", "-q", "kernel.py"], check=True)
    (repository / "run.json").write_text("{}")
    assert machine.describe()["changes"] is None, "what a run leaves behind changes no kernel"
    for speed in (1, 2):
        (repository / "untracked.cpp").write_text(f"int speed = {speed};\n")
        digests.add(machine.describe()["changes"])
    assert len(digests) == 4 and machine.describe()["dirty"]
    monkeypatch.chdir(repository.parent)
    assert machine.describe()["commit"] is None


def test_another_kernels_run_is_not_gone_on_with(repository):
    def race(policy=Sequential((2,)), resume=None, **fields):
        chosen = Settings(budget_s=30, policy=policy, device=fields.pop("device", toys.DEVICE), **fields)
        return Race([case("quick")], chosen, Silent(), resume=resume)

    stored = race().run
    assert race(Sequential((4,)), resume=stored).run.settings["policy"]["looks"] == (4,)
    other = {"policy": dict(policy=TwoStage()), "threads": dict(threads=2), "device": dict(device="cpu"), "base": dict(base="a" * 40)}
    for name, fields in other.items():
        with pytest.raises(ValueError, match=f"resume: the stored run has {name} "):
            race(resume=stored, **fields)
    (repository / "kernel.py").write_text("speed = 2\n")
    with pytest.raises(ValueError, match="resume: the stored run has changes None, this is '"):
        race(resume=stored)
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-am", "x"], check=True, capture_output=True)
    with pytest.raises(ValueError, match="resume: the stored run has commit "):
        race(resume=stored)


def test_time_that_runs_out_is_said():
    policy = Sequential((5,))
    chosen = Settings(budget_s=1e-3, policy=policy, device=toys.DEVICE)
    found = results(Race([case("quick")], chosen, Silent()).execute(), policy)
    assert found[0].verdict is Verdict.NOT_EVALUATED
    assert "out of time" in found[0].reason


def test_select():
    names = [c.id for c in select(toys.CASES)]
    assert names == ["quick", "par", "limited"]
    assert [c.id for c in select(toys.CASES, ["small", "q*"])] == ["quick", "limited"]
    assert len(select(toys.CASES, sizes="full")) == 4
    with pytest.raises(LookupError, match="renamed"):
        select(toys.CASES, ["quick", "renamed"])


def test_ids_differ():
    with pytest.raises(ValueError, match="ids must differ, got 'quick' more than once"):
        select([*toys.CASES, case("quick")])


@pytest.fixture
def own_table(tmp_path, monkeypatch):
    """Puts a module `own_cases` with this text into the working folder."""

    def write(text):
        (tmp_path / "own_cases.py").write_text(text)
        monkeypatch.delitem(sys.modules, "own_cases", raising=False)

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield write
    sys.modules.pop("own_cases", None)


@pytest.mark.parametrize(
    "text, code, said",
    [
        ("CASES = []", 13, "no case is in the table 'own_cases'"),
        ("ROWS = []", 2, "own_cases:CASES' cannot be loaded: AttributeError"),
        ("CASES = [{}['renamed']]", 2, "cannot be loaded: KeyError: 'renamed'"),
        ("CASES = 5", 2, "cannot be loaded: TypeError"),
        ("CASES = ['quick']", 2, "must be a list of Case, got 'own_cases' with 'quick'"),
    ],
)
@pytest.mark.parametrize("command", ["list", "gate --dry-run", "plan --dry-run"])
def test_a_table_that_cannot_be_used_is_said_in_a_line(own_table, capsys, command, text, code, said):
    own_table(text)
    assert main([*command.split(), "--table", "own_cases"]) == code
    found = capsys.readouterr()
    assert said in found.err and found.err.count("\n") == 1 and not found.out


@pytest.mark.parametrize("command", ["study", "study --dry-run", "proof", "proof --dry-run"])
def test_a_module_of_a_study_that_cannot_be_used_is_said_in_a_line(own_table, capsys, command):
    own_table("ROWS = []")
    assert main([*command.split(), "--table", "own_cases"]) == 2
    assert "cannot be loaded: AttributeError" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["gate", "gate --dry-run", "run", "plan", "study", "calibrate"])
def test_a_device_that_is_not_here_is_not_evaluated(command, capsys):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("it is here")
    assert main([*command.split(), "--device", "cuda"]) == 12
    assert "device 'cuda' is not here" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["gate", *MEASURE], ["run", *MEASURE], ["study"]])
def test_launches_that_block_are_refused(command, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    assert main(command) == 2
    assert "CUDA_LAUNCH_BLOCKING=1 times every launch" in capsys.readouterr().err


@pytest.mark.parametrize("build", ["tests.breakeven_toys", "a:b:c"])
def test_a_builder_is_a_module_and_a_function(build):
    with pytest.raises(ValueError, match="package.module:function"):
        Case("x", build)


@pytest.mark.parametrize("value, shown", [(9.81e-3, "9.81 ms"), (1.849, "1.85 s"), (999.6e-6, "1.00 ms"), (12e-9, "12.0 ns")])
def test_times_have_three_digits(value, shown):
    assert seconds(value) == shown


def test_command_run_does_not_judge(capsys, tmp_path):
    stored = tmp_path / "run.json"
    assert main(["run", *MEASURE, "--json", str(stored), "--markdown", str(tmp_path / "table.md")]) == 0
    assert "FAIL" in capsys.readouterr().out
    assert "| quick |" in (tmp_path / "table.md").read_text()
    assert main(["regate", str(stored), "--policy", "sequential"]) == 10
    assert main(["regate", str(stored), "--cases", "quick", "--json", str(tmp_path / "judged.json")]) == 0
    assert json.loads((tmp_path / "judged.json").read_text())["quick"]["verdict"] == "PASS"
    assert main(["regate", str(stored), "--cases", "renamed"]) == 13
    capsys.readouterr()
    assert main(["plan", "--run", str(stored), "--detect", "5%", "--device", toys.DEVICE]) == 0
    said = capsys.readouterr().out
    assert "5.0% in any of these, with 95 % power" in said and said.endswith(" in all (minutes:seconds)\n")


def test_command_run_that_evaluated_nothing_does_not_end_well(own_table, capsys):
    lines = ["from sparse_attention.breakeven import Case", 'CASES = [Case("away", "tests.breakeven_toys:nowhere")]']
    own_table("\n".join(lines))
    measure = ["--table", "own_cases", *MEASURE[2:], "--thresholds", "none"]
    assert main(["run", *measure]) == 12
    assert main(["run", *measure, "--allow-not-evaluated"]) == 13
    assert main(["plan", *measure[:-2]]) == 13
    lines[1] = lines[1].replace("]", ", *toys.CASES[:1]]")
    own_table("\n".join(["import tests.breakeven_toys as toys", *lines]))
    assert main(["run", *measure]) == 0
    capsys.readouterr()
    assert main(["plan", *measure[:-2]]) == 12
    assert "in any of the 1 of 2 cases that were measured" in capsys.readouterr().out


def test_a_case_that_the_base_does_not_have_counts_only_alone(own_table, tmp_path, capsys):
    lines = ["from sparse_attention.breakeven import Case", "import tests.breakeven_toys as toys"]
    own_table("\n".join([*lines, 'CASES = [Case("newer", "tests.breakeven_toys:newer"), *toys.CASES[:1]]']))
    measure = ["--table", "own_cases", *MEASURE[2:], "--thresholds", "none", "--json", "run.json"]
    assert main(["gate", *measure]) == 0
    assert "newer: NOT EVALUATED: not in the base: base abc" in capsys.readouterr().out
    assert main(["regate", "run.json", "--policy", "sequential"]) == 0
    assert content.build(Run.load("run.json")).verdict == "PASS"
    assert main(["gate", *measure, "--cases", "newer"]) == 12


def test_command_plan_tells_before_it_measures(monkeypatch, capsys):
    monkeypatch.setattr(race_module, "run_worker", lambda *arguments, **fields: pytest.fail("measured"))
    assert main(["plan", *MEASURE, "--dry-run"]) == 0
    assert "3 cases, at least 5 blocks" in capsys.readouterr().out


def test_command_gate_says_below_break_even(capsys):
    assert main(["gate", *MEASURE]) == 10
    assert "exit 10" in capsys.readouterr().out


def test_command_gate_passes():
    assert main(["gate", *MEASURE, "--cases", "quick"]) == 0


@pytest.mark.parametrize(
    "arguments, code",
    [
        (["gate", *MEASURE, "--cases", "renamed"], 13),
        (["list", *TABLE, "--cases", "renamed"], 13),
        (["list", "--table", "no.such.module"], 2),
        (["regate", "no-such-file.json"], 2),
        (["gate", *TABLE, "--dry-run"], 0),
        (["selftest", "--runs", "10"], 0),
    ],
)
def test_command_exit_codes(arguments, code, capsys):
    assert main(arguments) == code
    assert capsys.readouterr()


@pytest.mark.parametrize("arguments", [["gate", "--budget", "-1"], ["plan", "--detect", "5"], ["selftest", "--runs", "0"], []])
def test_command_usage(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_workers_load_neither_torch_nor_the_package_unless_a_case_does():
    _, found = raced([Case("light", "tests.breakeven_toys:light")])
    assert found["light"].verdict is Verdict.PASS, found["light"].reason
