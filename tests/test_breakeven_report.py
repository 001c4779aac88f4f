"""The report: what it calls changed, who did it, its history and curves, its markdown and its annotations."""

import json
import math
import shlex
from dataclasses import replace

import pytest

from sparse_attention.breakeven import Run, Verdict, select
from sparse_attention.breakeven.cli import main
from sparse_attention.breakeven.power import Power, PowerPoint
from sparse_attention.breakeven.report.content import build, policy_of
from sparse_attention.breakeven.report.curves import of_run, of_study
from sparse_attention.breakeven.report.github import annotations, summarise
from sparse_attention.breakeven.report.history import read, series
from sparse_attention.breakeven.report.markdown import comment
from sparse_attention.breakeven.report.sticky import MARK, MOST
from tests import breakeven_stored as stored

CASES = stored.ladder()
WINNING = [case for case in CASES if stored.speedup(case) > 1.1]
NAMES = [case.id for case in WINNING]


def changed(report):
    return {row.result.id: row for row in report.changed}


@pytest.fixture(scope="module")
def base():
    return stored.run(WINNING, commit="ba5eba5eba5eba5e", day=1, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Fourteen runs in which one case became slower and another faster."""
    folder = tmp_path_factory.mktemp("history")
    stored.history(WINNING, folder, {"window256/4k": (7, 0.9), "window256/16k": (9, 1.15)})
    return folder


def test_all_above_their_floors():
    report = build(stored.run(WINNING))
    assert (report.verdict, report.changed, report.base) == ("PASS", [], "")
    assert report.sentence == f"all {len(WINNING)} cases are at or above their floor"
    assert len(report.unchanged) == len(WINNING)


def test_a_slower_kernel_is_the_kernels_doing(base):
    report = build(stored.run(WINNING, {"window256/4k": 0.85}, commit="deed" * 4, day=2, seed=2), base)
    (row,) = report.changed
    assert (row.result.id, row.result.verdict, row.change.side) == ("window256/4k", Verdict.PASS, "kernel")
    assert math.exp(row.change.speedup.log) == pytest.approx(0.85, abs=0.03)
    assert report.base == "ba5eba5eba of 2026-03-01"


def test_a_slower_baseline_is_the_baselines_doing(base):
    now = stored.run(WINNING, commit="deed" * 4, day=2, seed=2, baseline=1.2, versions={"torch": "2.14.0", "numpy": "2.4.6"})
    sides = {row.change.side for row in build(now, base).changed}
    assert len(build(now, base).changed) == len(WINNING) and sides == {"baseline"}


def test_noise_changes_nothing(base):
    found = [build(stored.run(WINNING, commit="deed" * 4, day=2, seed=seed), base).changed for seed in range(100, 130)]
    assert sum(map(len, found)) <= 1


def test_new_and_missing_cases_are_named(base):
    now = stored.run([*WINNING[1:], stored.window(96, 8192)], commit="deed" * 4, day=2, seed=2)
    report = build(now, base)
    assert changed(report)["window96/8k"].remark == "new"
    assert report.notes == [f"in the base, but not run here: {NAMES[0]}"]


def test_another_machine_class_is_no_base(base):
    there = replace(base, machine={**base.machine, "class": "cuda/h100"})
    report = build(stored.run(WINNING, {"window256/4k": 0.5}, seed=2), there)
    assert report.changed == [] and "two machine classes are not compared" in report.notes[0]


def broken(run):
    """Every way not to pass, the worst last."""
    names = list(run.records)
    run.records[names[0]] = replace(run.records[names[0]], case=replace(run.records[names[0]].case, floor=stored.speedup(WINNING[0])))
    run.records[names[1]].scout = {"status": "unavailable", "reason": "needs a compiler | @all <b>"}
    slow = stored.run([WINNING[2]], {names[2]: 0.5}, blocks=15).records[names[2]]
    run.records[names[2]] = replace(slow, case=replace(slow.case, floor=stored.speedup(WINNING[2])))
    run.records[names[3]].error = "AssertionError: 3 of 8 elements are NaN"
    return run


def test_what_did_not_pass_comes_first_and_worst_first():
    report = build(broken(stored.run(WINNING, seed=4)))
    verdicts = [row.result.verdict for row in report.changed]
    assert verdicts == [Verdict.WRONG, Verdict.FAIL, Verdict.NOT_EVALUATED, Verdict.INCONCLUSIVE]
    assert report.verdict == "WRONG"
    assert report.sentence == (
        f"1 of {len(WINNING)} cases wrong: {NAMES[3]}; 1 below break-even; 1 not evaluated; 1 inconclusive; {len(WINNING) - 4} pass"
    )


def test_what_is_suspicious_is_an_error_without_a_speedup():
    run = stored.run(WINNING)
    run.records[NAMES[1]].scout |= {"status": "suspicious", "reason": "work on another stream: over after 1e-05 s"}
    report = build(run)
    assert [(row.result.verdict, row.result.speedup) for row in report.changed] == [(Verdict.SUSPICIOUS, None)]
    assert report.sentence.startswith(f"1 of {len(WINNING)} cases suspicious: {NAMES[1]}")
    (said,) = annotations(report)
    assert said.startswith("::error ") and "another stream" in said


def test_a_class_without_floors_is_reported_not_judged():
    run = stored.run(WINNING)
    run.settings["unjudged"] = "reported, not judged: no floors for machine class cpu/zen9/1c/1t"
    report = build(run)
    assert (report.verdict, report.sentence, report.changed) == ("NOT JUDGED", run.settings["unjudged"], [])
    assert list(annotations(report)) == []


def against_revision(factors, blocks=15):
    """The cases raced against themselves."""
    own = {case.id: factors.get(case.id, 1.0) / stored.speedup(case) for case in WINNING}
    run = stored.run(WINNING, own, blocks=blocks, sd=0.005)
    run.settings["base"] = "0123456789abcdef"
    run.records = {name: replace(r, case=replace(r.case, floor=0.97)) for name, r in run.records.items()}
    return run


def test_a_race_against_a_revision_says_so():
    report = build(against_revision({NAMES[0]: 0.5, NAMES[2]: 1.1}), base=stored.run(WINNING, seed=9))
    assert report.labels == ("base", "head")
    assert report.sentence.startswith(f"1 of {len(WINNING)} cases slower than 0123456789: {NAMES[0]}, 0.50x")
    assert (report.base, "--base 0123456789abcdef" in report.command) == ("", True)
    rows = changed(report)
    assert list(rows) == [NAMES[0], NAMES[2]]
    assert rows[NAMES[2]].remark.startswith("the kernel is ") and rows[NAMES[2]].remark.endswith(" % faster than in the base")
    assert build(against_revision({})).sentence == f"all {len(WINNING)} cases are at least 0.97x as fast as 0123456789"


def test_both_gates_in_one_report():
    report = build(stored.run(WINNING))
    report.against = build(against_revision({NAMES[0]: 0.5}))
    text = comment(report)
    assert report.worst is report.against
    assert text.startswith(f"{MARK}\n\n### Break-even: ❌ FAIL\n\nAll {len(WINNING)} cases are at or above their floor.")
    first, _, second = text.partition("#### Against 0123456789: ❌ FAIL")
    assert "| `" in first and "| base, head |" not in first
    assert f"| `{NAMES[0]}`<br><sub>the kernel is " in second and "| base, head |" in second
    report.against = build(against_revision({}))
    assert report.worst is report


def test_the_command_measures_what_changed_as_it_was_measured(base):
    report = build(stored.run(WINNING, {"window256/4k": 0.85}, commit="deed" * 4, day=2, seed=2), base)
    words = report.command.replace("\\\n", " ").split()
    assert words == [*"python -m sparse_attention.breakeven gate --threads 1 --cases window256/4k".split()]
    report.run.settings.update(policy={"name": "Sequential", "looks": [5, 10], "alpha": 0.02}, budget_s=60.0, table="mine:ROWS")
    words = report.command.replace("\\\n", " ").split()
    assert words[4:-2] == "--table mine:ROWS --policy sequential --alpha 0.02 --budget 60s --threads 1".split()


def test_the_command_selects_names_that_look_like_patterns():
    case = replace(WINNING[0], id="window[bfloat16]*")
    run = stored.run([WINNING[0]])
    run.records = {case.id: replace(run.records[WINNING[0].id], case=replace(case, floor=99.0))}
    pattern = shlex.split(build(run).command)[-1]
    assert [c.id for c in select([case, WINNING[0]], [pattern])] == [case.id]


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="no known policy"):
        policy_of({"policy": {"name": "Coin"}})


def test_history_finds_steps_in_both_directions(folder):
    found = read(folder, "cpu/zen4/2c")
    assert (len(found.runs), found.notes) == (14, [])
    steps = {s.id: s.steps for s in series(found.runs, found.runs[-1]) if s.steps}
    assert {name: [step.index for step in seen] for name, seen in steps.items()} == {"window256/4k": [7], "window256/16k": [9]}
    down, up = steps["window256/4k"][0], steps["window256/16k"][0]
    assert (down.speedup, up.speedup) == (pytest.approx(0.9, abs=0.02), pytest.approx(1.15, abs=0.02))
    assert (down.candidate, down.baseline) == (pytest.approx(1 / 0.9, abs=0.03), pytest.approx(1, abs=0.01))
    assert down.point.label == "07abcde" and "at 07abcde: candidate's time +9." in down.words


def test_the_run_at_hand_is_shown_but_is_no_history_yet(folder):
    found = read(folder, "cpu/zen4/2c")
    now = stored.run(WINNING, {"window256/1k": 0.5}, commit="new", day=20)
    by_name = {s.id: s for s in series(found.runs, now)}
    assert len(by_name["window256/1k"].points) == 15 and by_name["window256/1k"].open
    assert by_name["window256/1k"].steps == ()
    assert found.before(now).machine["commit"].startswith("13")
    assert not any(s.open for s in series(found.runs, found.runs[-1]))


def test_history_is_ordered_by_commits_and_compares_like_with_like(tmp_path):
    (case,) = [c for c in CASES if c.id == "window256/4k"]
    for number, day in enumerate((3, 1, 2)):
        stored.run([case], commit=f"{day}", day=day, seed=number).save(tmp_path / f"{number}.json")
    other = stored.run([case], commit="4", day=4)
    other.settings["threads"] = 2
    other.save(tmp_path / "3.json")
    elsewhere = stored.run([case], commit="5", day=5, **{"class": "cuda/h100"})
    elsewhere.save(tmp_path / "4.json")
    (tmp_path / "benchmarks.json").write_text('{"version": 2}')
    (tmp_path / "broken.json").write_text("{")
    found = read(tmp_path, "cpu/zen4/2c")
    assert [run.machine["commit"] for run in found.runs] == ["1", "2", "3", "4"]
    assert [note.partition(" ")[0] for note in found.notes] == ["broken.json"]
    (only,) = series(found.runs, found.runs[0])
    assert [point.commit for point in only.points] == ["1", "2", "3"]


def test_only_the_newest_power_curve_of_a_gate_and_of_this_class(tmp_path):
    def save(name, day, machine_class="cpu/zen4/2c", gate="two-stage"):
        machine = {"class": machine_class, "time": f"2026-03-{day:02}T00:00:00Z"}
        Power((PowerPoint.of("window", 0.05, 100, day),), machine, {"name": gate}).save(tmp_path / name)

    save("a.json", 2)
    save("b.json", 1)
    save("c.json", 9, machine_class="cuda/h100")
    save("d.json", 3, gate="sequential")
    assert sorted(p.points[0].caught for p in read(tmp_path, "cpu/zen4/2c").powers) == [2, 3]


def test_ladders_give_the_length_and_the_density_of_break_even():
    run = stored.run(CASES, seed=6)
    length, density = of_run(run, build(run).results)
    assert (length.axis, length.title) == ("length", "SlidingWindow(256), 4 heads of 64, float32, forward")
    assert [p.size for p in length.crossing.probes] == list(stored.LENGTHS)
    low, high = length.crossing.interval
    assert (length.crossing.outcome, low, high) == ("crosses", 512, 1024)
    assert low < length.crossing.estimate < high
    assert (density.axis, density.crossing.outcome) == ("density", "always")
    assert [round(p.size, 3) for p in density.crossing.probes] == [0.004, 0.008, 0.016, 0.031, 0.061, 0.117, 0.219]


def test_two_points_are_no_ladder():
    run = stored.run(CASES[:2])
    assert of_run(run, build(run).results) == []


def test_curves_of_a_stored_study(tmp_path):
    run = stored.run(CASES, seed=6)
    curves = of_run(run, build(run).results)
    path = tmp_path / "study.json"
    run.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "crossings": [c.crossing.as_dict() for c in curves]}))
    assert [(c.axis, c.crossing) for c in of_study(path)] == [(c.axis, c.crossing) for c in curves]
    assert main(["report", str(path), "--md", str(tmp_path / "study.md")]) == 0
    text = (tmp_path / "study.md").read_text()
    assert "STUDY\n\n2 families: 1 with a crossing, 1 faster at every size." in text
    assert "breakeven study --threads 1\n" in text and f"<summary>{len(CASES)} sizes measured</summary>" in text


def test_rooflines_count_useful_work():
    run = stored.run(WINNING)
    (found,) = build(run).rooflines
    spot = found.spots[0]
    work, result = stored.work_of(WINNING[0]), build(run).results[0]
    assert spot.intensity == pytest.approx(work["flops"] / work["bytes"])
    assert spot.rate == pytest.approx(work["flops"] / result.candidate_s)
    assert spot.rate / spot.baseline_rate == pytest.approx(result.baseline_s / result.candidate_s)
    assert found.flops_per_s == pytest.approx(80e9) and found.bytes_per_s == pytest.approx(20e9)
    assert found.share(spot) == pytest.approx(spot.rate / min(80e9, 20e9 * spot.intensity))
    for block in run.records[WINNING[0].id].blocks:
        block.clean = [False] * len(block.clean)
    assert [s.id for s in build(run).rooflines[0].spots] == NAMES[1:]
    for record in run.records.values():
        record.scout["work"] = {}
    assert build(run).rooflines == []


def test_markdown_shows_what_changed_and_folds_the_rest(base):
    now = broken(stored.run(WINNING, commit="deed" * 4, day=2, seed=4))
    text = comment(build(now, base), link="https://example.org/report.html")
    assert text.startswith(f"{MARK}\n\n### Break-even: ❌ WRONG\n\n1 of ")
    table, _, rest = text.partition("<details>")
    assert [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")] == [NAMES[3], NAMES[2], NAMES[1], NAMES[0]]
    assert f"<summary>{len(WINNING) - 4} unchanged</summary>" in rest
    assert f"--cases {NAMES[3]}" in rest and "[The whole report](https://example.org/report.html)" in rest
    assert rest.count("<details>") + 1 == rest.count("</details>")


def test_free_text_cannot_break_the_markdown():
    text = comment(build(broken(stored.run(WINNING, seed=4))))
    assert "needs a compiler \\| @\u200ball &lt;b&gt;" in text
    assert "@all" not in text and "<b>" not in text


def test_markdown_fits_into_a_comment():
    many = [stored.window(w, 8192) for w in range(64, 964)]
    text = comment(build(stored.run(many, blocks=5)))
    assert len(text) < MOST and "Left out here for its length" in text
    assert "--cases" not in text


def test_annotations_name_the_case_and_escape_the_text():
    lines = list(annotations(build(broken(stored.run(WINNING, seed=4))), "perf/cases.py"))
    levels = [line[2:].split()[0] for line in lines]
    assert levels == ["error", "error", "warning", "warning"]
    assert lines[0].startswith(f"::error file=perf/cases.py,title=WRONG%3A {NAMES[3]}::") and "\n" not in lines[0]
    assert "AssertionError: 3 of 8" in lines[0]


def test_the_summary_is_appended(tmp_path):
    path = tmp_path / "summary.md"
    path.write_text("before\n")
    assert summarise("after", {"GITHUB_STEP_SUMMARY": str(path)}) and path.read_text() == "before\nafter\n"
    assert not summarise("after", {})


def test_power_file_round_trip(tmp_path):
    found = Power((PowerPoint.of("window", 0.0, 300, 0), PowerPoint.of("window", 0.05, 100, 97)), None, {"name": "TwoStage"})
    found.save(tmp_path / "power.json")
    again = Power.load(tmp_path / "power.json")
    assert again == found
    assert [point.share for point in again.curves()["window"]] == [0.0, 0.97]
    assert again.points[0].high == pytest.approx(0.0122, abs=1e-3)
    (tmp_path / "other.json").write_text('{"kind": "power", "schema": 1, "points": [], "machine": null, "policy": {}}')
    with pytest.raises(ValueError, match="not a stored power curve.*points must not be empty"):
        Power.load(tmp_path / "other.json")


def test_command_line(tmp_path, folder, capsys):
    now = stored.run(CASES, {"window256/4k": 0.8}, commit="deed" * 4, day=20, seed=2)
    now.save(tmp_path / "run.json")
    html, md = tmp_path / "report.html", tmp_path / "comment.md"
    assert main(["report", str(tmp_path / "run.json"), "--history", str(folder), "--html", str(html), "--md", str(md)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("NOT EVALUATED: 2 of 13 cases not evaluated; 11 pass\n"), "suspects without a second look"
    assert f"wrote {html}" in said and f"wrote {md}" in said
    assert "window256/4k" in md.read_text() and "<!doctype html>" in html.read_text()


def test_chosen_cases_and_json(tmp_path, capsys):
    stored.run(WINNING).save(tmp_path / "run.json")
    told = tmp_path / "report.json"
    assert main(["report", str(tmp_path / "run.json"), "--cases", "window256/*", "--json", str(told)]) == 0
    found = json.loads(told.read_text())
    assert found["verdict"] == "PASS" and found["exit"] == 0 and found["says"] in capsys.readouterr().out
    assert found["results"] and all(name.startswith("window256/") for name in found["results"])
    assert main(["report", str(tmp_path / "run.json"), "--cases", "renamed"]) == 13


def test_a_missing_race_against_the_base_is_nothing_checked(tmp_path, capsys):
    stored.run(WINNING).save(tmp_path / "run.json")
    html, md, gone = tmp_path / "report.html", tmp_path / "comment.md", tmp_path / "against.json"
    command = ["report", str(tmp_path / "run.json"), "--against", str(gone), "--html", str(html), "--md", str(md), "--github"]
    assert main(command) == 0
    assert f"NOTHING CHECKED: the race against the base revision left no {gone}" in capsys.readouterr().out
    text = md.read_text()
    assert text.startswith(f"{MARK}\n\n### Break-even: ❌ NOTHING CHECKED\n")
    assert "#### Against the base revision: ❌ NOTHING CHECKED" in text
    assert "<h2>Against the base revision</h2>" in html.read_text()
    assert text.count("Measure again") == html.read_text().count("Measure again") == 1


@pytest.mark.parametrize(
    "arguments, wrong",
    [
        (["report", "nowhere.json"], "nowhere.json"),
        (["report", "{run}", "--history", "nowhere"], "history must be a folder, got 'nowhere'"),
        (["report", "{run}", "--power", "{run}"], "is not a stored power curve"),
        (["report", "{text}"], "is not a stored run"),
        (["report", "{run}", "--against", "{run}"], "--against must be a run of `gate --base`"),
    ],
)
def test_wrong_usage_is_exit_2(arguments, wrong, tmp_path, capsys):
    stored.run(WINNING[:1]).save(tmp_path / "run.json")
    (tmp_path / "text.json").write_text("{}")
    places = {"run": tmp_path / "run.json", "text": tmp_path / "text.json"}
    assert main([argument.format(**places) for argument in arguments]) == 2
    assert wrong in capsys.readouterr().err


def test_selftest_writes_a_power_file(tmp_path, capsys):
    main(["selftest", "--runs", "5", "--json", str(tmp_path / "power.json")])
    found = Power.load(tmp_path / "power.json")
    assert {p.slowdown for p in found.points} == {0.0, 0.05, 0.1, 0.2} and found.policy["name"] == "TwoStage"


def test_stored_runs_round_trip(tmp_path):
    run = stored.run(WINNING)
    run.save(tmp_path / "run.json")
    assert Run.load(tmp_path / "run.json").records.keys() == run.records.keys()
