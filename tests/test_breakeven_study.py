"""Break-even sizes: the search on known truths, whole studies in fake and in fresh processes, and the command."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_attention.breakeven import Run, Settings, Verdict
from sparse_attention.breakeven import race as race_module
from sparse_attention.breakeven.cli import main
from sparse_attention.breakeven.crossing import Family, Probe, bracket, crossing, gaps, geometric, rungs, wanted
from sparse_attention.breakeven.progress import Silent
from sparse_attention.breakeven.study import POLICY, Study
from sparse_attention.breakeven.study_table import published_text, sentence, text
from tests import breakeven_toys as toys
from tests import study_toys
from tests.study_toys import FakeProcesses, family

WIN, LOSS, TIE = Verdict.PASS, Verdict.FAIL, Verdict.INCONCLUSIVE


def searched(truth, count, rung=8):
    """Positions tried, with what `truth` says of each, until the search wants no more."""
    verdicts = {}
    while now := wanted(verdicts, count, rung):
        assert not set(now) & set(verdicts)
        verdicts.update({position: truth(position) for position in now})
    return verdicts


def read(verdicts, sizes, wins_at="large"):
    made = Family("f", "m:f", ("n",), sizes, wins_at=wins_at)
    logs = {WIN: 0.2, LOSS: -0.2, TIE: 0.0}
    probes = [Probe(made.ordered[position], verdict) for position, verdict in verdicts.items()]
    return crossing(made, probes, {made.ordered[p]: [logs.get(v, 0.0)] * 3 for p, v in verdicts.items()})


@given(st.integers(2, 200), st.integers(1, 20), st.data())
def test_a_step_is_found_between_neighbours_with_few_probes(count, rung, data):
    step = data.draw(st.integers(1, count - 1))
    verdicts = searched(lambda position: WIN if position >= step else LOSS, count, rung)
    assert bracket(verdicts) == (step - 1, step)
    assert len(verdicts) <= len(rungs(count, rung)) + math.ceil(math.log2(rung)) + 1


@given(st.integers(2, 100), st.integers(1, 20), st.data())
def test_both_ends_of_what_cannot_be_told_are_found(count, rung, data):
    last_loss = data.draw(st.integers(0, count - 2))
    first_win = data.draw(st.integers(last_loss + 1, count - 1))
    verdicts = searched(lambda p: LOSS if p <= last_loss else WIN if p >= first_win else TIE, count, rung)
    assert bracket(verdicts) == (last_loss, first_win)
    assert not gaps(verdicts)


@given(st.lists(st.sampled_from([WIN, LOSS, TIE, Verdict.NOT_EVALUATED]), min_size=2, max_size=60), st.integers(1, 9))
def test_any_truth_ends_and_is_told_as_it_is(truth, rung):
    verdicts = searched(truth.__getitem__, len(truth), rung)
    found = read(verdicts, tuple(range(1, len(truth) + 1)))
    assert truth[-1] is WIN or found.wins is None
    if found.wins is not None:
        assert all(truth[size - 1] is WIN for size in (p.size for p in found.probes) if size >= found.wins)
    if found.loses is not None:
        tried = [p for p in found.probes if found.loses_from <= p.size <= found.loses]
        assert {p.verdict for p in tried} == {LOSS}
    if found.outcome == "crosses":
        low, high = found.interval
        assert low <= found.estimate <= high
    assert sentence(found)


SIZES = geometric(16, 1024, 1)  # 16, 32, ... 1024


@pytest.mark.parametrize(
    "marks, outcome, says",
    [
        ("LLLWWWW", "crosses", "wins from 90.5 [64, 128]"),
        ("WWWWWWW", "always", "wins from the smallest size tried, 16"),
        ("LLLLLLL", "never", "loses at every size tried, 16 to 1024"),
        ("WWLLLWW", "crosses", "wins from 362 [256, 512]; not monotone: it wins at 16 to 32 too"),
        ("LWLLLLL", "islands", "no crossing: wins at 32 only, of 16 to 1024"),
        ("TTTTTTT", "unknown", "undecided: no size could be told"),
        ("TTWWWWW", "unknown", "undecided: wins at 64 and beyond"),
        ("LLLTTTT", "unknown", "undecided: loses at 64"),
        ("LLTTWWW", "crosses", "wins from 90.5 [32, 256]"),
    ],
)
def test_what_is_said(marks, outcome, says):
    found = read({p: {"W": WIN, "L": LOSS, "T": TIE}[m] for p, m in enumerate(marks)}, SIZES)
    assert (found.outcome, sentence(found)) == (outcome, says)
    assert json.dumps(found.as_dict())


def test_small_sizes_may_be_those_that_win():
    found = read({0: LOSS, 1: LOSS, 2: WIN, 3: WIN}, (0.1, 0.2, 0.4, 0.8), "small")
    assert (found.loses, found.wins, found.interval) == (0.4, 0.2, (0.2, 0.4))
    assert sentence(found) == "wins up to 0.283 [0.2, 0.4]"
    assert sentence(read({0: WIN, 1: WIN}, (0.1, 0.8), "small")) == "wins up to the largest size tried, 0.8"


@pytest.mark.parametrize(
    "fields, name",
    [({"sizes": (1,)}, "sizes"), ({"sizes": (2, 1)}, "sizes"), ({"sizes": (1, 2), "wins_at": "end"}, "wins_at")],
)
def test_families_are_checked(fields, name):
    with pytest.raises(ValueError, match=name):
        Family("f", "m:f", ("n",), **fields)


def test_geometric_sizes():
    sizes = geometric(16, 1000)
    assert sizes[0] == 16 and sizes[-1] == 1000 and max(b / a for a, b in zip(sizes, sizes[1:])) < 1.15
    with pytest.raises(ValueError, match="first less than last"):
        geometric(4, 4)


def seconds(case):
    size = case.args["size"]
    return case.args.get("factor", 1.0) * (1e-3 + size / 400e3), size / 100e3


def studied(monkeypatch, families, processes=None, published=(), resume=None, save=lambda run: None, **settings):
    processes = processes or FakeProcesses(seconds)
    monkeypatch.setattr(race_module, "run_worker", processes)
    chosen = Settings(**{"budget_s": 1000.0, "threads": 1, "policy": POLICY, **settings})
    study = Study(families, chosen, Silent(), save, resume, published)
    study.execute()
    return study


def test_the_interval_holds_the_truth(monkeypatch):
    held = 0
    for seed in range(30):
        study = studied(monkeypatch, [family()], FakeProcesses(seconds, sd=0.04, seed=seed))
        (found,) = study.crossings()
        assert found.outcome == "crosses"
        held += found.loses <= study_toys.TRUTH <= found.wins
        assert abs(math.log(found.estimate / study_toys.TRUTH)) < 0.25
        assert found.wins / found.loses < 1.6
    assert held >= 26


def test_families_share_processes_and_take_few(monkeypatch):
    processes = FakeProcesses(seconds)
    families = [family(), family("quick", factor=0.01), family("slow", factor=50.0)]
    found = {c.family: c for c in studied(monkeypatch, families, processes).crossings()}
    assert [found[name].outcome for name in ("growing", "quick", "slow")] == ["crosses", "always", "never"]
    assert [(kind, len(names)) for kind, names in processes.started[:2]] == [("scout", 21), ("block", 21)]
    assert sum(kind == "block" for kind, _ in processes.started) <= 8 * 4
    assert sum(kind == "scout" for kind, _ in processes.started) <= 3


def test_a_disturbed_size_is_not_evaluated_and_the_search_goes_round_it(monkeypatch):
    (found,) = studied(monkeypatch, [family()], FakeProcesses(seconds, disturbed={"growing/128"})).crossings()
    assert found.outcome == "crosses" and found.loses < 128 < found.wins
    assert "not evaluated at 128: contended" in sentence(found)


def test_time_that_runs_out_is_said(monkeypatch):
    (found,) = studied(monkeypatch, [family()], budget_s=1e-9).crossings()
    assert found.outcome == "unknown" and not found.probes
    assert sentence(found) == "nothing measured; out of time"


def test_a_study_that_was_cut_short_goes_on(monkeypatch, tmp_path):
    path = tmp_path / "study.json"
    runs = []

    def stop_after_four(run):
        runs.append(run)
        run.save(path)
        if len(run.evidence) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        studied(monkeypatch, [family()], save=stop_after_four)
    processes = FakeProcesses(seconds, seed=1)
    study = studied(monkeypatch, [family()], processes, resume=Run.load(path))
    assert study.crossings()[0].outcome == "crosses"
    assert len(study.run.evidence) == 4 + sum(kind == "block" for kind, _ in processes.started)
    with pytest.raises(ValueError, match="not a size of the families"):
        studied(monkeypatch, [family("other")], resume=Run.load(path))
    with pytest.raises(ValueError, match="threads"):
        studied(monkeypatch, [family()], resume=Run.load(path), threads=7)


def test_times_known_beforehand_need_no_scout(monkeypatch):
    from sparse_attention.breakeven.study import scouted

    processes = FakeProcesses(seconds)
    monkeypatch.setattr(race_module, "run_worker", processes)
    study = Study(
        [family()],
        Settings(1000.0, 1, POLICY),
        Silent(),
        foresee=lambda case: scouted(seconds(case)[0], {"dense": seconds(case)[1]}),
    )
    study.execute()
    assert study.crossings()[0].outcome == "crosses"
    assert {kind for kind, _ in processes.started} == {"block"}


def test_printed_figures_stand_beside_measured_ones(monkeypatch):
    study = studied(monkeypatch, [], published=study_toys.PUBLISHED)
    shown = published_text(study.results())
    assert "theirs" in shown and "1.07x" in shown
    assert "2.00 ms" in shown and "1.4" in shown  # the faster of the two candidates
    assert shown.splitlines()[1].endswith("  1.0")


def test_in_fresh_processes_a_wrong_candidate_has_no_crossing():
    chosen = Settings(30.0, 1, POLICY, toys.DEVICE)
    good, bad = family(sizes=(16, 64, 128, 256)), family("zeros", sizes=(16, 64), fault="zeros")
    study = Study([good, bad], chosen, Silent())
    study.execute()
    right, wrong = study.crossings()
    assert right.outcome == "crosses" and right.loses in (64, 128) and right.wins in (128, 256)
    assert wrong.outcome == "unknown" and "wrong at 16: AssertionError" in sentence(wrong)
    assert "growing  wins from" in text([right, wrong])


COMMAND = ["study", "--table", "tests.study_toys", "--quiet", "--threads", "1"]


def test_command_study(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(race_module, "run_worker", FakeProcesses(seconds))
    path = tmp_path / "study.json"
    assert main([*COMMAND, "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "growing  wins from" in shown and "slow     loses at every size tried, 16 to 64" in shown and "paper/200" in shown
    stored = json.loads(path.read_text())
    assert [found["outcome"] for found in stored["crossings"]] == ["crosses", "never"]
    assert stored["published"][0]["figures"] == {"theirs": "1.07x"}
    monkeypatch.setattr(race_module, "run_worker", None)  # nothing is left to measure
    assert main([*COMMAND, "--resume", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == shown.splitlines()[1:]


def test_command_study_selects_and_refuses(monkeypatch, capsys):
    assert main([*COMMAND, "--dry-run", "--cases", "grow*"]) == 0
    assert "growing: 49 sizes, 16 to 1024" in capsys.readouterr().out
    assert main([*COMMAND, "--cases", "renamed"]) == 13
    assert main(["study", "--table", "no.such.module"]) == 2
    everything = {f.case(s).id for f in study_toys.FAMILIES for s in f.sizes}
    monkeypatch.setattr(race_module, "run_worker", FakeProcesses(seconds, disturbed=everything))
    assert main([*COMMAND, "--cases", "growing", "--cases", "slow"]) == 12


def test_the_projects_families_can_be_built():
    from perf import study
    from sparse_attention.breakeven.checking import check

    ids = [one.id for one in [*study.FAMILIES, *study.PUBLISHED]]
    assert len(set(ids)) == len(ids)
    families = {family.build: family for family in study.FAMILIES}
    assert len(families) == 4
    for found in families.values():
        case = found.case(found.sizes[8])
        check(replace(case, args={**case.args, **({"length": 256} if "length" in case.args else {})}).load())
    check(study.PUBLISHED[0].cases[0].load())


def test_the_tree_of_the_seeds_has_their_92_pairs():
    from perf.densities import EAGLE, chains
    from sparse_attention.patterns import Tree

    assert Tree(EAGLE).pairs(26, 26) == 92
    for positions in (50, 100, 1000):
        assert Tree(chains(positions, 0.136)).pairs(positions, positions) / positions**2 == pytest.approx(0.136, rel=0.05)
