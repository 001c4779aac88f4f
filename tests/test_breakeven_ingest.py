"""Stored runs as asv results: what asv reads from them, what is refused, and that nothing is half written."""

import importlib.util
import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("asv", reason="asv is not installed")

from asv.results import Results, iter_results
from asv.util import load_json

from perf import cuda_cases
from perf.cases import CASES
from perf.study import FAMILIES
from sparse_attention.breakeven import asv_project
from sparse_attention.breakeven import race as race_module
from sparse_attention.breakeven.asv_project import Project
from sparse_attention.breakeven.cli import main
from sparse_attention.breakeven.crossing import Probe, crossing
from sparse_attention.breakeven.ingest import machine_name
from sparse_attention.breakeven.tracked import THREADS, crossing_figure, figures, for_asv
from sparse_attention.breakeven.verdict import Verdict
from tests import breakeven_stored as stored
from tests.study_toys import FakeProcesses

ROOT = Path(__file__).parents[1]
CHOSEN = [case for case in CASES if case.id in ("window256/16k", "window1024/16k", "window256/4k")]
RATIO, PEAK = "bench_break_even.BreakEven.track_time_ratio", "bench_break_even.BreakEven.track_peak_memory"
CROSSING = "bench_break_even.Crossings.track_crossing"


def git(folder, *arguments):
    person = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(["git", "-C", folder, *person, *arguments], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def commits(tmp_path_factory):
    """A repository with two commits on main and one beside it: (folder, [hashes])."""
    folder = tmp_path_factory.mktemp("repository")
    git(folder, "init", "--quiet", "-b", "main")
    found = []
    for subject in ("first", "second", "beside"):
        if subject == "beside":
            git(folder, "checkout", "--quiet", "-b", "side")
        git(folder, "commit", "--quiet", "--allow-empty", "-m", subject)
        found.append(git(folder, "rev-parse", "HEAD"))
    return folder, found


@pytest.fixture(scope="module")
def described():
    """What asv finds in perf, whatever a person's shell narrows a run to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSE_ATTENTION_PERF_CASES", "window256/1k")
        return Project(ROOT / "asv.conf.json").benchmarks


@pytest.fixture
def config(tmp_path, commits, described, monkeypatch):
    """The shipped configuration, but for another repository and results in tmp_path."""
    monkeypatch.setattr(Project, "benchmarks", described)
    conf = load_json(str(ROOT / "asv.conf.json"), js_comments=True)
    path = tmp_path / "asv.conf.json"
    path.write_text(json.dumps({**conf, "repo": str(commits[0]), "benchmark_dir": str(ROOT / "perf"), "results_dir": "results"}))
    return path


@pytest.fixture
def ingest(config):
    def command(*arguments):
        return main(["ingest", "--config", str(config), *map(str, arguments)])

    return command


@pytest.fixture
def made(tmp_path, commits):
    """Makes a stored run of the first commit and returns its path; `changes` are of the machine."""

    def make(name="run.json", cases=CHOSEN, change=lambda run: None, factors=None, **changes):
        run = stored.run(cases, factors, **{"commit": commits[1][0], "python": "3.11.7", **changes})
        change(run)
        run.save(tmp_path / name)
        return tmp_path / name

    return make


def results(tmp_path):
    return sorted(iter_results(str(tmp_path / "results")), key=lambda found: found.env_name)


def files(tmp_path):
    return {p.relative_to(tmp_path / "results").as_posix(): p.read_bytes() for p in (tmp_path / "results").rglob("*") if p.is_file()}


def of_case(result, benchmark, case):
    return dict(zip((eval(text) for text in result.get_result_params(benchmark)[0]), result._results[benchmark]))[case]


def test_asv_reads_what_was_stored(ingest, made, tmp_path, commits, capsys):
    assert ingest(made(factors={"window256/4k": 0.5})) == 0
    assert "cpu-zen4-2c/" in capsys.readouterr().out
    (found,) = results(tmp_path)
    assert found.commit_hash == commits[1][0]
    assert found.date == 1000 * int(git(commits[0], "log", "-1", "--format=%at", found.commit_hash))
    assert found.params == {
        "machine": "cpu-zen4-2c", "python": "3.11", "torch": "2.13.0", "numpy": "", "ninja": "", "filelock": "", "setuptools": "",
    }  # fmt: skip
    assert found.env_vars == {THREADS: "1"}
    for case in CHOSEN:
        expected = 1 / stored.speedup(case) * (2 if case.id == "window256/4k" else 1)
        assert of_case(found, RATIO, case.id) == pytest.approx(expected, rel=0.03)
        assert of_case(found, PEAK, case.id) == 18 << 20
    assert math.isnan(of_case(found, RATIO, "layout/again")), "not measured: n/a, as asv itself has it"
    position = [case.id for case in CASES].index("window256/4k")
    (samples,) = [s for s in found.get_result_samples(RATIO, found.get_result_params(RATIO))[position : position + 1]]
    assert len(samples) == 5 and all(len(f"{sample!r}".strip("0.").replace(".", "")) <= 5 for sample in samples)
    stats = found.get_result_stats(RATIO, found.get_result_params(RATIO))[position]
    assert stats["ci_99_a"] < of_case(found, RATIO, "window256/4k") < stats["ci_99_b"] and stats["repeat"] == 5


def test_a_run_of_the_gpu_s_table_is_told_apart_by_its_races(ingest, made, tmp_path, capsys):
    """Some ids are in both tables, as other races."""
    both = {case.id for case in cuda_cases.CASES} & {case.id for case in CASES}
    assert "window256/16k/of-flex" in both
    wanted = [case for case in cuda_cases.CASES if case.id in ("window256/16k/of-flex", "window4096/128k/of-dense")]
    path = made(cases=wanted, **{"class": "cuda/h100"}, change=lambda run: run.settings.update(device="cuda", threads=16))
    assert ingest(path) == 0
    assert "cuda-h100/" in capsys.readouterr().out
    (found,) = results(tmp_path)
    ratio = "bench_break_even.GpuBreakEven.track_time_ratio"
    assert set(found.get_all_result_keys()) and all(".GpuBreakEven." in key for key in found.get_all_result_keys())
    for case in wanted:
        assert of_case(found, ratio, case.id) == pytest.approx(1 / stored.speedup(case), rel=0.03)
    assert found.params["machine"] == "cuda-h100" and found.env_vars == {}


def test_parameters_are_those_of_asv_run(config, made, ingest, tmp_path):
    """A curve of asv is a set of parameters: one that differs would split the history in two."""
    from asv.config import Config
    from asv.environment import get_environments

    (environment,) = get_environments(Config.load(str(config)), None, verbose=False)
    ingest(made(python=environment.python))
    (found,) = results(tmp_path)
    assert found.params == {"machine": "cpu-zen4-2c", "python": environment.python, **environment.requirements}
    assert found.env_vars == environment.env_vars
    assert environment.name not in found.env_name, "no result of asv's own is replaced"


def test_benchmarks_are_what_asv_finds(ingest, made, tmp_path, described):
    ingest(made())
    assert load_json(str(tmp_path / "results/benchmarks.json"), 2) == described
    families = [repr(family.id) for family in FAMILIES]
    cases = {".BreakEven.": [repr(case.id) for case in CASES], ".GpuBreakEven.": [repr(case.id) for case in cuda_cases.CASES]}
    assert {name.rpartition(".")[2] for name in described} == {
        "track_time_ratio", "track_all_cores_time_ratio", "track_eager_time_ratio", "track_warm_time_ratio", "track_sparse_time",
        "track_dense_time", "track_peak_memory", "track_crossing",
    }  # fmt: skip
    for name, benchmark in described.items():
        assert (benchmark["type"], benchmark["version"]) == ("track", "1")
        expected = (["family"], [families]) if name == CROSSING else (["case"], [next(ids for words, ids in cases.items() if words in name)])
        assert (benchmark["param_names"], benchmark["params"]) == expected


def test_again_changes_nothing(ingest, made, tmp_path, capsys):
    path = made()
    ingest(path)
    before = files(tmp_path)
    assert ingest(path) == 0 and files(tmp_path) == before and len(before) == 3
    assert "unchanged" in capsys.readouterr().out
    made(factors={"window256/4k": 0.5})
    assert ingest(path) == 0 and files(tmp_path).keys() == before.keys()
    assert "   changed, 3 cases" in capsys.readouterr().out


def test_nothing_replaces_another_run(ingest, made, tmp_path):
    def clocked(device, threads):
        return lambda run: run.settings.update(device=device, threads=threads)

    paths = [
        made("a.json"),
        made("b.json", change=clocked("cpu", 2)),
        made("c.json", day=2),
        made("d.json", change=clocked("cuda", 16), **{"class": "cuda/h100"}),
        made("e.json", change=clocked("cuda-graph", 16), **{"class": "cuda/h100"}),
        made("f.json", change=clocked("cuda", 26), day=3, **{"class": "cuda/h100"}),
        made("g.json", change=clocked("mine.clocks:Clock", 1)),
    ]
    assert ingest(*paths) == 0
    found = results(tmp_path)
    assert len({(result.params["machine"], result.env_name) for result in found}) == len(paths)
    curves = sorted((result.params["machine"], result.env_vars.get(THREADS)) for result in found)
    assert curves == sorted(
        [("cpu-zen4-2c", "1"), ("cpu-zen4-2c", "1"), ("cpu-zen4-2c", "2"), ("cpu-zen4-2c-mine.clocks_Clock", "1")]
        + [("cuda-h100", None), ("cuda-h100", None), ("cuda-h100-graph", None)],
        key=lambda curve: (curve[0], curve[1] or ""),
    )


def test_machines_are_named_by_class():
    assert machine_name("cpu/zen4/2c") == "cpu-zen4-2c" and machine_name("cuda/h100", "cuda") == "cuda-h100"


REFUSED = {
    "names no commit": {"commit": None},
    "with changes": {"dirty": True},
    "knows no commit 0123456789ab": {"commit": "0123456789ab"},
    "raced revision abcdef": {"change": lambda run: run.settings.update(base="abcdef0123")},
    "not in the table: window64/16k": {"cases": [stored.window(64, 16384)]},
    "not measured in quiet": {"change": lambda run: [block.clean.clear() for r in run.records.values() for block in r.blocks]},
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_a_result_is_refused(ingest, made, tmp_path, capsys, words):
    good, bad = made("good.json"), made("bad.json", day=2, **REFUSED[words])
    assert ingest(good, bad) == 2
    said = capsys.readouterr().err
    assert str(bad) in said and words in said and "nothing was written" in said
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": 1}', '{"schema": 99, "machine": {}, "cases": []}'])
def test_a_foreign_file_is_refused(ingest, made, tmp_path, capsys, text):
    (tmp_path / "foreign.json").write_text(text)
    assert ingest(made(), tmp_path / "foreign.json") == 2
    assert "foreign.json is not a stored run" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_a_missing_file_is_refused(ingest, tmp_path, capsys):
    assert ingest(tmp_path / "nowhere.json") == 2
    assert "nowhere.json" in capsys.readouterr().err


def test_a_folder_is_taken_as_far_as_it_goes(ingest, made, tmp_path, capsys):
    (tmp_path / "runs" / "cpu").mkdir(parents=True)
    (tmp_path / "runs" / "asv.json").write_text("{}")
    made("runs/cpu/good.json")
    made("runs/cpu/bad.json", dirty=True)
    assert ingest(tmp_path / "runs", "--json", tmp_path / "report.json") == 0
    assert len(results(tmp_path)) == 1 and "with changes" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert [Path(name).name for name in report["passed_over"]] == ["bad.json"]
    (entry,) = report["results"]
    assert (entry["machine"], entry["outcome"], entry["tracked"]["time_ratio"]) == (
        "cpu-zen4-2c",
        "new",
        sorted(case.id for case in CHOSEN),
    )
    assert ingest(tmp_path / "results") == 13, "asv's own files are no runs"


def test_chosen_cases_are_ingested_alone(ingest, made, tmp_path, capsys):
    assert ingest(made(), "--cases", "window256/*", "--json", tmp_path / "report.json") == 0
    (told,) = json.loads((tmp_path / "report.json").read_text())["results"]
    names = {name for names in told["tracked"].values() for name in names}
    assert names and all(name.startswith("window256/") for name in names)
    assert ingest(made("other.json"), "--cases", "renamed*") == 13
    assert "no case of sizes 'full' matches 'renamed*'" in capsys.readouterr().out


def test_a_person_may_say_which_commit_it_was(ingest, made, tmp_path, commits):
    assert ingest(made(commit=None), "--commit", "main") == 0
    assert results(tmp_path)[0].commit_hash == commits[1][1]
    assert ingest(made("dirty.json", dirty=True, day=2), "--commit", commits[1][0][:9]) == 0
    assert results(tmp_path)[1].commit_hash == commits[1][0]


def test_one_commit_is_not_said_of_many_runs(ingest, made, capsys):
    assert ingest(made("a.json"), made("b.json"), "--commit", "main") == 2
    assert "commit names what one run measured" in capsys.readouterr().err


def test_two_files_of_one_moment_are_not_guessed_about(ingest, made, capsys):
    assert ingest(made("a.json"), made("b.json", factors={"window256/4k": 0.5})) == 2
    assert "would both be" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(ingest, made, tmp_path, capsys):
    assert ingest(made(), "--dry-run") == 0
    assert "would be written" in capsys.readouterr().out and not (tmp_path / "results").exists()


def test_results_may_go_elsewhere(ingest, made, tmp_path):
    assert ingest(made(), "--results", tmp_path / "there") == 0
    assert (tmp_path / "there/benchmarks.json").exists() and not (tmp_path / "results").exists()


def test_cases_that_asv_cannot_know_are_named(ingest, made, tmp_path, capsys):
    other = replace(CHOSEN[0], args={**CHOSEN[0].args, "heads": 8})
    assert ingest(made(cases=[other, *CHOSEN[1:], stored.window(64, 16384)])) == 0
    said = capsys.readouterr().out
    assert f"another race than the table's of that name: {other.id}" in said and "not in the table: window64/16k" in said
    assert math.isnan(of_case(results(tmp_path)[0], RATIO, other.id))


def test_a_new_floor_is_no_new_race(ingest, made, tmp_path):
    assert ingest(made(cases=[replace(CHOSEN[0], floor=0.1, tags=("x",))])) == 0
    assert of_case(results(tmp_path)[0], RATIO, CHOSEN[0].id) > 0


def test_a_commit_beside_the_branches_is_said_to_be_left_out(ingest, made, commits, capsys):
    assert ingest(made(commit=commits[1][2])) == 0
    assert "is not on main: asv publish leaves it out" in capsys.readouterr().out


def test_a_machine_that_asv_describes_keeps_its_curve(ingest, made, tmp_path):
    (tmp_path / "results/cpu-zen4-2c").mkdir(parents=True)
    described = {"machine": "cpu-zen4-2c", "ram": "24 GB", "version": 1}
    (tmp_path / "results/cpu-zen4-2c/machine.json").write_text(json.dumps(described))
    assert ingest(made()) == 0
    assert results(tmp_path)[0].params["ram"] == "24 GB"
    assert json.loads((tmp_path / "results/cpu-zen4-2c/machine.json").read_text()) == described


def test_a_broken_machine_file_is_left_alone(ingest, made, tmp_path, capsys):
    (tmp_path / "results/cpu-zen4-2c").mkdir(parents=True)
    (tmp_path / "results/cpu-zen4-2c/machine.json").write_text("{")
    assert ingest(made()) == 2
    assert "machine.json is not asv's" in capsys.readouterr().err and len(files(tmp_path)) == 1


def test_a_failure_while_writing_leaves_nothing(ingest, made, tmp_path, monkeypatch):
    def fails(self, folder):
        raise OSError("disk full")

    monkeypatch.setattr(Project, "save_benchmarks", fails)
    assert ingest(made()) == 2
    assert files(tmp_path) == {}


@pytest.mark.parametrize("text", [None, "{", '{"version": 1}'])
def test_the_configuration_must_be_asvs(made, tmp_path, capsys, text):
    path = tmp_path / "other.json"
    if text is not None:
        path.write_text(text)
    assert main(["ingest", str(made()), "--config", str(path)]) == 2
    assert "other.json" in capsys.readouterr().err


def test_asv_is_asked_for_where_it_is_missing(made, monkeypatch, capsys):
    monkeypatch.setattr(asv_project.importlib.util, "find_spec", lambda name: None)
    assert main(["ingest", str(made())]) == 2
    assert "pip install asv" in capsys.readouterr().err


def record(**scout):
    found = stored.run([CHOSEN[0]]).records[CHOSEN[0].id]
    found.scout.update(scout)
    return found


def test_a_wrong_or_restless_case_has_no_figures():
    assert figures(record())
    assert figures(record(status="wrong", reason="zeros")) == {}
    assert figures(replace(record(), error="wrong after timing")) == {}
    restless = record()
    for block in restless.blocks[2:]:
        block.clean = [False] * 5
    assert figures(restless) == {}


def test_figures_of_all_cores_and_of_other_ways_to_launch():
    found = record(scale=2.0)
    found.columns = {"dense, 16 threads": {"seconds": 1.0, "speedup": 4.0}, "flex": {"seconds": 1.0, "speedup": 2.0}}
    for block in found.blocks:
        block.figures = {"candidate_eager_s": 3.0, "baseline_eager_s": 6.0, "candidate_warm_s": 1.0}
    shown = figures(found)
    assert shown["all_cores_time_ratio"] == 0.25 and shown["eager_time_ratio"] == [0.25] * 5 and "warm_time_ratio" not in shown
    plain = figures(record())["time_ratio"]
    assert shown["time_ratio"] == pytest.approx([ratio / 2 for ratio in plain], rel=1e-4)


def test_memory_of_the_allocator_is_not_tracked():
    assert "peak_memory" not in figures(record(candidate_peak_bytes=3 << 20))
    assert "peak_memory" not in figures(record(candidate_peak_bytes=None))


def test_asv_run_and_ingest_agree(monkeypatch):
    """The benchmarks themselves, over processes that only say what they would have measured."""
    bench = importlib.import_module("perf.bench_break_even")
    monkeypatch.setenv("SPARSE_ATTENTION_PERF_CASES", "window256/4k window256/1k")
    monkeypatch.setenv(THREADS, "1")
    races = []
    monkeypatch.setattr(race_module, "run_worker", FakeProcesses(lambda case: (1e-3, 5e-3)))
    monkeypatch.setattr(bench, "Race", lambda *given, **named: races.append(race_module.Race(*given, **named)) or races[-1])
    suite = bench.BreakEven()
    cache = suite.setup_cache()
    assert cache.keys() == {"window256/4k", "window256/1k"} and races[-1].settings.threads == 1
    for name, entry in cache.items():
        suite.setup(cache, name)
        assert entry == figures(races[-1].run.records[name])
        assert suite.track_time_ratio(cache, name) == {"samples": entry["time_ratio"], "number": 1}
        assert entry["time_ratio"] == pytest.approx([0.2] * 5, rel=0.2)
        assert math.isnan(suite.track_warm_time_ratio(cache, name))
    with pytest.raises(NotImplementedError):
        suite.setup(cache, "window256/16k")


def test_the_gpus_table_is_empty_without_kernels_and_fails_with_broken_ones(monkeypatch):
    bench = importlib.import_module("perf.bench_break_even")

    def chosen():
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(bench.device, "chosen", chosen)
    with pytest.raises(ImportError, match="libcudart"):
        bench.GpuBreakEven().setup_cache()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sparse_attention._build_cuda" else object())
    assert bench.GpuBreakEven().setup_cache() == {}


def test_a_study_is_made_only_when_asked_for(monkeypatch):
    bench = importlib.import_module("perf.bench_break_even")
    monkeypatch.delenv("SPARSE_ATTENTION_PERF_STUDY", raising=False)
    assert bench.Crossings().setup_cache() == {}
    monkeypatch.setattr(race_module, "run_worker", FakeProcesses(lambda case: (1e-3, case.args["q_len"] * 1e-5), sd=0.001))
    monkeypatch.setenv("SPARSE_ATTENTION_PERF_STUDY", FAMILIES[0].id)
    suite = bench.Crossings()
    cache = suite.setup_cache()
    low, estimate, high = suite.track_crossing(cache, FAMILIES[0].id)["samples"]
    assert low <= estimate <= high and 90 < estimate < 110
    with pytest.raises(NotImplementedError):
        suite.setup(cache, "unknown")


def crossed(family, verdict_of):
    """What a study would store of `family` had every eighth size these verdicts."""
    probes = [Probe(size, verdict_of(size)) for size in family.sizes[::8]]
    logs = {p.size: [0.1 if p.verdict is Verdict.PASS else -0.1] * 3 for p in probes}
    return crossing(family, probes, logs).as_dict()


LENGTH = next(family for family in FAMILIES if family.id == "window64/f32/64")
DENSITY = next(family for family in FAMILIES if family.id == "blocks/2k")


def above(size):
    return lambda x: Verdict.PASS if x > size else Verdict.FAIL


def test_a_crossing_is_better_when_it_is_lower():
    low, estimate, high = crossing_figure(LENGTH, crossed(LENGTH, above(100)))
    assert (low, high) == (64, 128) and low < estimate < high
    assert crossing_figure(LENGTH, crossed(LENGTH, above(0))) == LENGTH.sizes[0], "always: at most this"
    assert crossing_figure(LENGTH, crossed(LENGTH, above(9e9))) == LENGTH.sizes[::8][-1], "never: at least this"
    assert crossing_figure(LENGTH, crossed(LENGTH, lambda size: Verdict.INCONCLUSIVE)) is None
    denser = crossing_figure(DENSITY, crossed(DENSITY, lambda size: Verdict.PASS if size < 0.5 else Verdict.FAIL))
    sparser = crossing_figure(DENSITY, crossed(DENSITY, lambda size: Verdict.PASS if size < 0.1 else Verdict.FAIL))
    assert denser[1] < sparser[1] and 1 / denser[1] == pytest.approx(0.5, rel=0.2)
    assert crossing_figure(DENSITY, crossed(DENSITY, lambda size: Verdict.PASS)) == pytest.approx(1 / max(DENSITY.sizes[::8]), rel=1e-4)


def test_crossings_of_a_study(ingest, made, tmp_path, capsys):
    path = made(cases=[])
    data = json.loads(path.read_text())
    found = crossed(LENGTH, above(100))
    unknown = {**found, "family": "gone/f32"}
    cases = [json.loads(json.dumps({"case": LENGTH.case(p["size"]).as_dict(), "scout": {}, "blocks": [], "columns": {}, "error": None}))
             for p in found["probes"]]  # fmt: skip
    path.write_text(json.dumps({**data, "cases": cases, "crossings": [found, unknown], "published": []}))
    assert ingest(path) == 0
    (result,) = results(tmp_path)
    assert result.env_name.endswith("-study") and set(result.get_all_result_keys()) == {CROSSING}
    assert of_case(result, CROSSING, LENGTH.id) == for_asv(crossing_figure(LENGTH, found))["samples"][1]
    assert "not in the table of families: gone/f32" in capsys.readouterr().out


def test_the_command_explains_itself(capsys):
    with pytest.raises(SystemExit) as done:
        main(["ingest", "--help"])
    said = capsys.readouterr().out
    assert done.value.code == 0 and all(option in said for option in ("--results", "--dry-run", "--json", "--commit"))


def test_asv_would_show_these_results(ingest, made, tmp_path, described):
    """`asv publish` takes a benchmark's results only where the versions agree."""
    ingest(made())
    path = next(path for name in files(tmp_path) if "ingested" in name for path in [tmp_path / "results" / name])
    assert Results.load(str(path)).get_result_keys(described) >= {RATIO, PEAK}
