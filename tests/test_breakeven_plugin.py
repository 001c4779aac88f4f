"""The pytest plugin seen from outside: exit codes, refusals, pytest-benchmark's numbers."""

import json
import os
import re
from pathlib import Path

import pytest

from sparse_attention.breakeven import Run, forwarding
from sparse_attention.breakeven.cli import main
from tests import breakeven_toys as toys

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parents[1]

TABLE = """
import pytest
from tests.breakeven_toys import case

@pytest.mark.parametrize("impl", ["dense", "sparse"])
@pytest.mark.parametrize("case", [{cases}], ids=lambda c: c.id)
def test_race(case, impl, breakeven_race):
    breakeven_race(case, impl)
"""

PAIR = """
import pytest
import numpy as np
from tests.breakeven_toys import doubling, take

def test_pair(breakeven):
    w = doubling(fast=1e-3, slow={slow}, fault={fault!r})
    found = breakeven(w.candidate, w.baselines["plain"], at_least={floor}, inputs=w.inputs)
    assert found.id
"""


@pytest.fixture
def session(pytester, monkeypatch):
    """Run pytest in a process of its own over one test file; returns its result."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # where these tests run side by side pytest-benchmark would time nothing

    def run(source, *options, benchmark=True):
        pytester.makepyfile(test_it=source)
        plugins = ["-p", "sparse_attention.breakeven.plugin", *(["-p", "pytest_benchmark.plugin"] if benchmark else [])]
        settings = ["--breakeven-device", toys.DEVICE, "--breakeven-policy", "sequential"]
        return pytester.runpytest_subprocess(*plugins, *settings, *options)

    return run


def table(*cases):
    return TABLE.format(cases=", ".join(cases))


def test_above_break_even_is_0(session):
    found = session(table("case('quick')"))
    assert found.ret == 0
    found.stdout.re_match_lines([r".*break-even.*", r"machine: cpu/", r"case +dense +sparse", r"quick .*x \[.* PASS"])
    found.stdout.fnmatch_lines(["1 pass   exit 0"])


def test_candidate_equal_to_the_baseline_is_10(session):
    found = session(table("case('quick')", "case('par', slow=1e-3, floor=1.05)"))
    assert found.ret == 10
    found.stdout.fnmatch_lines(["par: * of the baseline's speed, below 1.05x", "1 pass, 1 fail   exit 10"])
    found.assert_outcomes(passed=3, failed=1)


def test_a_wrong_kernel_is_1(session):
    found = session(table("case('nil', fault='zeros')", "case('par', slow=1e-3, floor=1.05)"))
    assert found.ret == 1
    found.stdout.fnmatch_lines(["nil: wrong, so it has no time: AssertionError*"])


def test_an_ordinary_failure_is_1_even_beside_a_slow_kernel(session):
    found = session(table("case('par', slow=1e-3, floor=1.05)") + "\ndef test_other():\n    assert False\n")
    assert found.ret == 1


AWAY = "case('quick'), __import__('sparse_attention').breakeven.Case('away', 'tests.breakeven_toys:nowhere')"


def test_not_evaluated_is_12_unless_allowed(session):
    found = session(table(AWAY))
    assert found.ret == 12
    found.assert_outcomes(passed=3, skipped=1)
    assert session(table(AWAY), "--breakeven-allow-not-evaluated").ret == 0


def test_nothing_judged_is_never_0(session):
    skipped = "import pytest\npytestmark = pytest.mark.skip\n" + table("case('quick')")
    assert session(skipped).ret == 12
    assert session(skipped, "--breakeven-allow-not-evaluated").ret == 13


MISSING = """
def test_missing(breakeven):
    kernel = __import__("pytest").importorskip("no_such_kernel")
    breakeven(kernel.fast, kernel.slow)
"""
FORGOTTEN = """
def test_forgotten(breakeven):
    pass
"""


@pytest.mark.parametrize(
    "source, said",
    [(MISSING, "test_it.py::test_missing: NOT EVALUATED: could not import 'no_such_kernel'*"), (FORGOTTEN, "test_it.py::test_forgotten: NOT EVALUATED: it ended without a race")],
)
def test_a_missing_kernel_is_12_beside_one_that_passes(session, source, said):
    found = session(PAIR.format(slow=3e-3, fault="", floor=1.0) + source, benchmark=False)
    assert found.ret == 12
    found.stdout.fnmatch_lines([said, "1 pass, 1 not evaluated   exit 12"])
    assert session(PAIR.format(slow=3e-3, fault="", floor=1.0) + source, "--breakeven-allow-not-evaluated").ret == 0


def test_a_missing_kernel_in_a_test_of_one_case_is_12(session):
    source = "from tests.breakeven_toys import case\ndef test_one(breakeven_race):\n    %s\n    breakeven_race(case('quick'))\n"
    assert session(source % "pass").ret == 0
    assert session(source % "__import__('pytest').skip('no kernel')").ret == 12


def test_a_file_skipped_as_a_whole_is_12_if_its_tests_race(session, pytester):
    away = "import pytest\npytest.importorskip('no_such_kernel')\n"
    pytester.makepyfile(test_away=away + "def test_race(breakeven):\n    pass\n")
    ordinary = "def test_one():\n    pass\n"
    found = session(ordinary)
    assert found.ret == 12
    found.stdout.fnmatch_lines(["test_away.py: NOT EVALUATED: the whole file was skipped: could not import 'no_such_kernel'*"])
    found = session(ordinary, "-k", "one")
    assert found.ret == 0
    found.stdout.fnmatch_lines(["test_away.py: the whole file was skipped: *; its tests were not evaluated, if -k or -m selects any"])
    assert session(ordinary, "--rootdir=..").ret == 12
    pytester.makepyfile(test_away=away + "def test_race():\n    'breakeven'\n")
    assert session(ordinary).ret == 0


def test_a_renamed_case_is_not_0(session):
    assert session(table("case('quick')"), "test_it.py::test_race[renamed-sparse]").ret == 4
    assert session(table("case('quick')"), "-k", "renamed").ret == 5


@pytest.mark.parametrize("option", ["--benchmark-disable", "--benchmark-skip"])
def test_what_would_judge_nothing_is_refused(session, option):
    found = session(table("case('quick')"), option)
    assert found.ret == 4
    found.stderr.fnmatch_lines([f"ERROR: {option} would judge nothing*"])


@pytest.mark.parametrize("source", [table("case('quick')"), PAIR.format(slow=3e-3, fault="", floor=1.0)])
def test_xdist_is_refused(session, pytester, source):
    pytester.makeconftest("def pytest_configure(config):\n    config.workerinput = {}\n")  # as in a worker of xdist
    found = session(source)
    assert found.ret == 1
    found.stdout.fnmatch_lines(["*run them without xdist*"])


WORKER_AND_CONTROLLER = """
def pytest_configure(config):
    config.workerinput = {}
def pytest_collection_finish(session):
    session.config.pluginmanager.getplugin("breakeven-gate")._racing.clear()
"""


def test_under_xdist_a_missing_kernel_is_not_0_either(session, pytester):
    pytester.makeconftest(WORKER_AND_CONTROLLER)
    assert session(MISSING).ret == 1
    assert session("import pytest\n@pytest.mark.skipif(True, reason='no kernel')" + MISSING).ret == 12


def test_listing_tests_measures_nothing(session):
    assert session(table("case('quick')"), "--collect-only").ret == 0


def test_other_tests_are_left_alone(session):
    assert session("def test_one():\n    pass\n", "--benchmark-disable").ret == 0
    assert session("def test_one():\n    assert 0\n").ret == 1


def test_benchmark_json_holds_the_measured_times_and_the_verdict(session, pytester):
    run = session(table("case('quick')"), "--benchmark-json=out.json", "--breakeven-json=run.json", "--benchmark-only")
    assert run.ret == 0
    run.stdout.re_match_lines([r"-+ benchmark 'quick': 2 tests -+"])
    data = json.loads((pytester.path / "out.json").read_text())
    stored = json.loads((pytester.path / "run.json").read_text())["cases"][0]["blocks"]
    by_name = {b["name"]: b for b in data["benchmarks"]}
    for impl, key in (("dense", "baseline_s"), ("sparse", "candidate_s")):
        benchmark = by_name[f"test_race[quick-{impl}]"]
        measured = [seconds for block in stored for seconds in block[key]]
        assert benchmark["stats"]["data"] == pytest.approx(measured)
        assert benchmark["extra_info"]["breakeven"]["verdict"] == "PASS"
    assert data["breakeven"]["quick"]["speedup"] == pytest.approx(3.0, rel=0.05)
    assert data["machine_info"]["breakeven"]["class"].startswith("cpu/")


def test_benchmark_compare_works_and_warns_of_another_machine(session, pytester):
    assert session(table("case('quick')"), "--benchmark-autosave").ret == 0
    saved = next(pytester.path.glob(".benchmarks/*/*.json"))
    data = json.loads(saved.read_text())
    data["machine_info"]["breakeven"]["class"] = "cpu/abacus/1c"
    saved.write_text(json.dumps(data))
    found = session(table("case('quick')"), "--benchmark-compare")
    assert found.ret == 0
    found.stdout.fnmatch_lines(["*(NOW)*"])
    assert "cpu/abacus/1c" in found.stdout.str() + found.stderr.str()


def test_without_pytest_benchmark(session):
    found = session(table("case('quick')", "case('par', slow=1e-3, floor=1.05)"), benchmark=False)
    assert found.ret == 10


def test_junit_carries_the_verdict(session, pytester):
    session(table("case('quick')"), "--junitxml=out.xml")
    assert re.search(r'name="breakeven" value="[^"]*PASS', (pytester.path / "out.xml").read_text())


def test_fixture_passes(session):
    found = session(PAIR.format(slow=3e-3, fault="", floor=2.0), benchmark=False)
    assert found.ret == 0
    found.stdout.re_match_lines([r"case +baseline +candidate", r"test_it.py::test_pair .*PASS"])


def test_fixture_fails_with_10(session):
    found = session(PAIR.format(slow=1e-3, fault="", floor=1.05))
    assert found.ret == 10
    found.assert_outcomes(failed=1)


@pytest.mark.parametrize("fault, said", [("zeros", "wrong"), ("yesterday", "suspicious")])
def test_fixture_checks_against_the_baseline_by_default(session, fault, said):
    found = session(PAIR.format(slow=3e-3, fault=fault, floor=1.0), benchmark=False)
    assert found.ret == 1
    found.stdout.fnmatch_lines([f"*{said}, so it has no time*"])


def test_fixture_serves_several_calls_and_tests(session):
    source = PAIR.format(slow=3e-3, fault="", floor=1.0) + (
        "\n@pytest.mark.parametrize('n', [2, 4])\n"
        "def test_many(breakeven, n):\n"
        "    for k in (1, 2):\n"
        "        found = breakeven(lambda: take(1e-3), lambda: take(k * n * 1e-3))\n"
        "        assert found.speedup is None or abs(found.speedup / (k * n) - 1) < 0.05\n"
    )
    found = session(source, benchmark=False)
    assert found.ret == 0
    found.stdout.fnmatch_lines(["5 pass   exit 0"])


def test_fixture_takes_a_check_of_ones_own(session):
    source = "\n".join(
        [
            "from tests.breakeven_toys import take",
            "def check(out):",
            "    assert out == 'right'",
            "def test_pair(breakeven):",
            "    breakeven(lambda: take(1e-3) or 'right', lambda: take(2e-3), check=check)",
        ]
    )
    assert session(source, benchmark=False).ret == 0
    assert session(source.replace("or 'right'", "or 'left'"), benchmark=False).ret == 1


OPTION = """
import os
def pytest_addoption(parser):
    parser.addoption("--kernel", default="slow")
    parser.addoption("--drawn", default={drawn})
"""
CHOSEN = """
from tests.breakeven_toys import take
def test_pair(breakeven, request):
    seconds = {"fast": 1e-3, "slow": 3e-3}[request.config.getoption("--kernel")]
    breakeven(lambda: take(seconds) or 1, lambda: take(2e-3) or 1)
"""


@pytest.mark.parametrize("form", [["--kernel=fast"], ["--kernel", "fast"]])
def test_fresh_processes_have_the_session_s_options(session, pytester, form):
    pytester.makeconftest(OPTION.format(drawn=0))
    found = session(CHOSEN, *form, "-x", "-k", "pair", "test_it.py", "--maxfail=3", "-rA", benchmark=False)
    assert found.ret == 0
    found.stdout.re_match_lines([r"test_it.py::test_pair .* (2|1\.99|2\.01)x .*PASS"])
    assert session(CHOSEN, benchmark=False).ret == 10


def test_a_fresh_process_with_another_option_is_wrong(session, pytester):
    pytester.makeconftest(OPTION.format(drawn="os.getpid()"))
    found = session(CHOSEN, "--kernel=fast", benchmark=False)
    assert found.ret == 1
    found.stdout.fnmatch_lines(["*wrong*: a fresh process has other options: drawn is * in this session and * there"])


def test_addopts_start_no_xdist_in_fresh_processes(session, pytester):
    pytester.makeini("[pytest]\naddopts = -n4 -p xdist -m never\nmarkers = never: in addopts")
    assert session(PAIR.format(slow=3e-3, fault="", floor=1.0), "-n0", "-m", "", benchmark=False).ret == 0


@pytest.mark.parametrize(
    "words, paths, kept",
    [
        (["-q", "a.py", "--kernel", "b"], ["a.py"], ["--kernel", "b"]),
        (["--folder", "tests", "tests", "-k", "x or y", "-n4"], ["tests"], ["--folder", "tests"]),
        (["-xvs", "-p", "no:randomly", "--cov=a", "-W", "error", "--benchmark-min-rounds", "5"], [], ["-p", "no:randomly", "-W", "error"]),
    ],
)
def test_what_is_forwarded(words, paths, kept):
    assert forwarding._kept(words, paths) == kept


@pytest.mark.parametrize(
    "crash, said", [("os.kill(os.getpid(), 9)", "signal 9"), ("os._exit(0)", "exit status 0"), ("return", "did not reach breakeven()")]
)
def test_a_kernel_that_crashes_now_and_then_is_wrong(session, crash, said):
    third = "str(request.config.option.breakeven_worker).startswith('2:')"
    source = f"""
import os
from tests.breakeven_toys import take
def test_pair(breakeven, request):
    if {third}:
        {crash}
    breakeven(lambda: take(1e-3) or 1, lambda: take(3e-3) or 1)
def test_other(breakeven):
    breakeven(lambda: take(1e-3) or 1, lambda: take(3e-3) or 1)
"""
    found = session(source, benchmark=False)
    assert found.ret == 1
    found.assert_outcomes(passed=1, failed=1)
    found.stdout.fnmatch_lines([f"test_it.py::test_pair: wrong, so it has no time: *{said}*"])


def test_a_stored_comparison_can_be_judged_again(session, pytester, capsys):
    found = session(PAIR.format(slow=3e-3, fault="", floor=2.0) + MISSING, "--breakeven-json=run.json", benchmark=False)
    assert found.ret == 12
    path = str(pytester.path / "run.json")
    run = Run.load(path)
    record = run.records["test_it.py::test_pair"]
    assert record.case.floor == 2.0 and [b.number for b in record.blocks] == list(range(5)) and len(run.evidence) == 5
    assert all(e["measured_s"] > 0 and e["ready_s"] > 0 and e["anchor"] for e in run.evidence)
    assert main(["regate", path]) == 12
    assert "PASS" in capsys.readouterr().out
    assert main(["regate", path, "--cases", "*pair"]) == 0
    assert main(["plan", "--run", path]) == 12
    assert main(["report", path, "--html", str(pytester.path / "run.html")]) in (0, 12)


def test_comparisons_are_stored_beside_cases(session, pytester):
    source = table("case('quick')") + PAIR.format(slow=3e-3, fault="", floor=2.0)
    assert session(source, "--breakeven-json=run.json", benchmark=False).ret == 0
    run = Run.load(pytester.path / "run.json")
    assert set(run.records) == {"quick", "test_it.py::test_pair"} and len(run.evidence) == 10
    assert [b.number for b in run.records["test_it.py::test_pair"].blocks] == list(range(5, 10))


def test_the_fixture_keeps_to_the_budget(session):
    found = session(PAIR.format(slow=3e-3, fault="", floor=1.0), "--breakeven-budget=0.1s", benchmark=False)
    assert found.ret == 12
    found.stdout.fnmatch_lines(["*out of time after 1 of 5 blocks*"])


def test_the_fixture_s_floor_can_be_a_machine_s(session, pytester):
    source = PAIR.format(slow=3e-3, fault="", floor=1.0)
    (pytester.path / "floors.json").write_text('{"*": {"*test_pair": {"floor": 4.0}}}')
    assert session(source, "--breakeven-thresholds=floors.json", benchmark=False).ret == 10
    (pytester.path / "floors.json").write_text('{"abacus": {"*test_pair": {"floor": 4.0}}}')
    found = session(source, "--breakeven-thresholds=floors.json", benchmark=False)
    assert found.ret == 12
    found.stdout.fnmatch_lines(["*reported, not judged*"])
    assert session(source, "--breakeven-thresholds=floors.json", "--breakeven-allow-unknown-class", benchmark=False).ret == 0


RENAMED = """
import pytest
from their_cases import CASES

@pytest.mark.parametrize("case", CASES[:1], ids=lambda c: c.id)
def test_race(case, breakeven_race):
    breakeven_race(case)
"""


@pytest.mark.parametrize("options", [(), ("--breakeven-thresholds=thresholds.json",)], ids=["beside", "given"])
def test_a_floor_whose_case_is_gone_is_13(session, pytester, options):
    pytester.makepyfile(their_cases="from tests.breakeven_toys import case\nCASES = [case('quick'), case('other')]\n")
    floors = pytester.path / "thresholds.json"
    floors.write_text('{"*": {"other": {"floor": 1.5}, "gone*": {"floor": 1.5}, "test_it.py::test_x": {"floor": 1.5}}}')
    assert session(RENAMED, *options, benchmark=False).ret == 0, "a case that pytest does not collect is there all the same"
    floors.write_text('{"*": {"renamed": {"floor": 1.5}}}')
    found = session(RENAMED, *options, benchmark=False)
    assert found.ret == 13
    found.stdout.fnmatch_lines(["*has floors for renamed, of which*"])


def test_what_cannot_be_measured_here_is_12(session, pytester):
    pytester.makeconftest(
        "from sparse_attention.breakeven import Unavailable, fresh\n"
        "def away(workload, device):\n    raise Unavailable('nothing is on the GPU')\n"
        "fresh.require_on_device = away\n"
    )
    found = session(PAIR.format(slow=3e-3, fault="", floor=1.0), benchmark=False)
    assert found.ret == 12
    found.stdout.fnmatch_lines(["*NOT EVALUATED: nothing is on the GPU"])


@pytest.mark.parametrize("source", [table("case('quick')"), PAIR.format(slow=3e-3, fault="", floor=1.0)])
@pytest.mark.parametrize("device", ["abacus", "no_such_module:Clock", "cuda", "cuda-graph"])
def test_a_device_that_cannot_be_used_is_a_usage_error_in_a_line(session, source, device, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = session(source, f"--breakeven-device={device}")
    assert found.ret == 4
    (line,) = [line for line in found.stderr.lines if line]
    assert line.startswith("ERROR: --breakeven-device: ")


def test_blocking_launches_are_a_usage_error(session, monkeypatch):
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    found = session(PAIR.format(slow=3e-3, fault="", floor=1.0))
    assert found.ret == 4
    found.stderr.fnmatch_lines(["ERROR: CUDA_LAUNCH_BLOCKING=1 times every launch*"])
