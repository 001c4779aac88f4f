"""The proof: error rates drawn from blocks against what simulation says they are, negative controls, and what is written."""

import importlib
import json
import math
import os
import random
import re

import pytest

from sparse_attention.breakeven import Case, ExitCode, Run, TwoStage
from sparse_attention.breakeven.cli import main
from sparse_attention.breakeven.controls import Control, neighbours, run_controls
from sparse_attention.breakeven.machine import Usage, pinned
from sparse_attention.breakeven.power import Power
from sparse_attention.breakeven.proof import SLOWDOWNS, Injected, analyse, load_sessions, save, sessions_of
from sparse_attention.breakeven.proof_text import markdown, put, summary
from sparse_attention.breakeven.resampling import POLICIES, Rate, disjoint, mean_rate, pooled, rate, suites
from sparse_attention.breakeven.store import Block, Record
from tests import breakeven_toys as toys

TEN = POLICIES["10 blocks"]
MACHINE = {"class": "cpu/zen4/2c", "cpu": "EPYC", "commit": "a" * 40, "dirty": False, "versions": {}}
MACHINE["time"] = "2026-01-02T00:00:00Z"


def noise(rng, count, sd=0.02, mean=1.0):
    return [rng.gauss(mean, sd) for _ in range(count)]


def test_alarms_at_the_true_floor_are_about_what_is_promised():
    """Over many sessions of 60 blocks; the uncertain floor may add as much again."""
    rng, shares = random.Random(0), []
    for _ in range(40):
        logs = noise(rng, 60)
        shares.append(rate(logs, logs, TEN, 100, rng).share)
    assert 0.003 < sum(shares) / len(shares) < 0.03


def test_alarms_vanish_below_the_true_floor_and_slowdowns_are_found():
    rng = random.Random(0)
    logs = noise(rng, 60)
    assert rate(logs, logs, TEN, 300, rng, below=0.05).caught == 0
    slow = [x + math.log(1 / 1.05) for x in logs]
    assert rate(slow, logs, TEN, 300, rng).share > 0.95
    assert disjoint(slow, logs, TEN).runs == 6


def test_repeated_gates_err_as_often_as_the_rule_says():
    rng, shares = random.Random(1), []
    for _ in range(40):
        logs = noise(rng, 60)
        shares.append(rate(logs, logs, TEN, 100, rng, "repeated").share)
    assert 0.003 < sum(shares) / len(shares) < 0.025


def test_the_floor_is_never_from_the_judged_blocks():
    """A block that is far off lowers its own gate's mean, but not that gate's floor."""
    logs = [1.0] * 30 + [-50.0]
    assert rate(logs, logs, TEN, 50, random.Random(0), floor=math.exp(0.99)).caught == 0
    assert rate([0.5] * 31, [1.0] * 31, TEN, 50, random.Random(0)).caught == 50


def test_drift_shows_in_order():
    """A session that slows down by a tenth: gates in order differ from the rest, shuffled ones do not."""
    rng = random.Random(0)
    logs = [1.0 - 0.002 * k + rng.gauss(0, 0.004) for k in range(60)]
    ordered, shuffled = (rate(logs, logs, TEN, 200, rng, order) for order in ("in order", "shuffled"))
    assert ordered.share > 0.2 > shuffled.share


def test_bounds_tell_how_far_the_blocks_themselves_decide():
    """Half-way up the power curve, single sessions of 40 blocks must not claim more than their blocks show."""
    rng, inside, trials = random.Random(3), 0, 30
    hits = []
    for _ in range(trials):
        logs = noise(rng, 40, sd=0.03)
        hits.append(rate([x - 0.045 for x in logs], logs, TEN, 60, rng))
    truth = sum(r.share for r in hits) / trials
    inside = sum(r.low <= truth <= r.high for r in hits)
    assert inside >= 0.85 * trials


def test_too_few_blocks_are_refused():
    with pytest.raises(ValueError, match="17 or more, got 16 and 16"):
        rate([0.0] * 16, [0.0] * 16, TwoStage(), 10, random.Random(0))


def test_rates_of_several_cases():
    assert pooled([Rate(10, 1, 0, 1), Rate(30, 0, 0, 1)]).caught == 1
    joined = mean_rate([Rate(100, 10, 0.05, 0.2), Rate(100, 30, 0.2, 0.4)])
    assert joined.share == pytest.approx(0.2)
    assert joined.low == pytest.approx(0.2 - math.hypot(0.05, 0.1) / 2)
    assert joined.high == pytest.approx(0.2 + math.hypot(0.1, 0.1) / 2)


def test_suites_fail_as_often_as_their_cases_let_one_expect():
    rng = random.Random(0)
    pools = [noise(rng, 60) for _ in range(4)]
    alone = mean_rate([rate(p, p, TEN, 400, rng) for p in pools])
    together = suites(pools, TEN, 300, rng, cases=10)
    assert together.share == pytest.approx(1 - (1 - alone.share) ** 10, abs=0.08)
    assert suites(pools, TEN, 100, rng, cases=10, below=0.05).caught == 0


def injected(name="a", slowdowns=SLOWDOWNS):
    slowed = {x: Case(f"{name} +{x}", "m:f") for x in slowdowns}
    return Injected(Case(name, "m:f"), slowed)


def run_of(item, blocks=30, sd=0.02, own_sd=0.005, seed=0, disturbed=()):
    """A race in which the slowed variants really are slower, in blocks whose noise all variants share but for their own."""
    rng = random.Random(seed)
    records = {case.id: Record(case, {"status": "ok", "baselines": {"sdpa": 1.0}}) for case in item.cases}
    for number in range(blocks):
        both = math.exp(rng.gauss(0, sd))
        for slowdown, case in [(0.0, item.plain), *item.slowed.items()]:
            own = (1 + slowdown) * both * math.exp(rng.gauss(0, own_sd))
            clean = [number not in disturbed or case is not item.plain] * 4
            records[case.id].blocks.append(Block(number, "sdpa", [3e-3] * 4, [1e-3 * own] * 4, clean))
    return Run(MACHINE, {"threads": 1, "device": "cpu", "unjudged": ""}, records)


def test_a_session_knows_what_was_injected():
    session = sessions_of(run_of(injected(), disturbed=(3, 4)), [injected()])[0]
    assert session.blocks == 28, "blocks in which one variant was disturbed are left out for all"
    for slowdown in (0.05, 0.5):
        middle, low, high = session.slowdown(slowdown)
        assert low < middle < high and middle == pytest.approx(slowdown, abs=0.01)
    assert math.exp(sum(session.speedup[0.0]) / 28) == pytest.approx(3.0, rel=0.02)


@pytest.fixture(scope="module")
def proof():
    items = [injected("a"), injected("b", slowdowns=())]
    sessions = [s for n, item in enumerate(items) for s in sessions_of(run_of(item, blocks=45, seed=n), [item])]
    return analyse(sessions, MACHINE, 1, runs=40)


def test_small_slowdowns_are_missed_and_large_ones_found(proof):
    for gate in POLICIES:
        shares = [proof.power[gate]["a"][x].share for x in SLOWDOWNS]
        assert shares[0] < 0.1 and shares[-1] == 1.0 and shares[-2] > 0.95
    assert proof.power["regression"]["a"][0.1].share == 1.0 and proof.power["regression"]["a"][0.02].share < 0.2
    assert set(proof.alarms["two-stage"]["in order"]) == {"a", "b"} and set(proof.alarms["regression"]["shuffled"]) == {"a"}
    assert proof.suites["two-stage"]["repeated"][0.05].caught == 0
    assert proof.disjoint["10 blocks"][0.5].runs == proof.disjoint["10 blocks"][0.5].caught == 4


def test_a_short_session_proves_nothing():
    sessions = sessions_of(run_of(injected(), blocks=12), [injected()])
    with pytest.raises(ValueError, match="every case needs 22 or more valid blocks; a has 12"):
        analyse(sessions, MACHINE, 1)
    with pytest.raises(ValueError, match="nothing was measured"):
        analyse([], MACHINE, 1)


def test_a_proof_survives_the_disk(proof, tmp_path):
    paths = save(proof, tmp_path)
    assert [p.rpartition("/")[2] for p in paths] == [
        "certificate-2026-01-02.json",
        "proof-two-stage-2026-01-02.json",
        "proof-two-stage-0.01-2026-01-02.json",
        "proof-sequential-2026-01-02.json",
        "proof-10-blocks-2026-01-02.json",
        "proof-regression-2026-01-02.json",
    ]
    sessions, machine, threads, controls = load_sessions(paths[0])
    assert (machine["class"], threads, controls) == ("cpu/zen4/2c", 1, ())
    assert sessions[0].speedup[0.05] == pytest.approx(proof.sessions[0].speedup[0.05], rel=1e-5)
    curve = Power.load(paths[4])
    assert [p.slowdown for p in curve.curves()["a"]] == list(SLOWDOWNS)
    assert (curve.policy["blocks"], curve.policy["threads"]) == (10, 1)
    with pytest.raises(ValueError, match="is not a stored proof"):
        load_sessions(paths[1])


def test_the_page_has_one_block_a_class(proof, tmp_path):
    page = tmp_path / "proof.md"
    put(page, "cpu/zen4/2c", markdown(proof))
    put(page, "cuda/h100", "none yet")
    page.write_text(page.read_text().replace("# The proof\n", "# The proof\n\nWords of ours.\n"))
    put(page, "cuda/h100", "one by now")
    text = page.read_text()
    assert "Words of ours." in text and "one by now" in text and "none yet" not in text
    assert text.count("## cpu/zen4/2c") == 1
    for said in ("2026-01-02", "commit aaaaaaaaaa", "1 thread,", "False alarms", "Detection", "| `a` | 45 |", "5 % below"):
        assert said in text, said
    assert "two-stage: false alarms" in summary(proof)


def tried(*arguments, **fields):
    return next(run_controls([Control("it", arguments, **{"expected": (13,), **fields})], threads=1))


GATE = ("sparse_attention.breakeven", "gate", "--device", toys.DEVICE, "--threads", "1", "--thresholds", "none", "--quiet")
GATE += ("--policy", "sequential", "--table", "tests.breakeven_toys:CASES")


def test_a_control_holds_when_its_gate_refuses():
    found = tried(*GATE, "--cases", "renamed", says="no case .* matches")
    assert (found.exit, found.held) == (13, True)
    assert "renamed" in found.said
    assert tried(*GATE, "--cases", "renamed", says="something else").held is False
    assert tried(*GATE, "--cases", "par", expected=(0,)).held is False


def test_a_control_that_cannot_be_tried_is_said_so():
    import torch

    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    found = tried(*GATE, needs="cuda")
    assert (found.exit, found.held) == (None, None) and "cuda" in found.said


def test_busy_neighbours_are_seen():
    """Not by their effect on a time: by the switches that they force on this process, which the gate counts as evidence."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("processes cannot be pinned here")
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, pinned(1))
        with neighbours(pinned(1), each=3):
            start = Usage.now()
            while Usage.now().since(start).wall_s < 1.0:
                sum(range(1000))
            seen = Usage.now().since(start)
    finally:
        os.sched_setaffinity(0, before)
    assert seen.contended and seen.cpu_s < 0.7 * seen.wall_s


PROOF_TABLE = """
from sparse_attention.breakeven.controls import Control
from sparse_attention.breakeven.proof import Injected
from tests import breakeven_toys as toys

INJECTED = [Injected(toys.case("quick"), {0.0: toys.case("quick +0%")})]
CONTROLS = [
    Control("an empty table", EMPTY, (13,)),
    Control("one that passes", SOUND, (10,)),
]
"""


def test_command_proof(proof, tmp_path, monkeypatch, capsys):
    empty = ("sparse_attention.breakeven", "gate", "--table", "tests.breakeven_toys:CASES", "--cases", "renamed")
    table = tmp_path / "proof_table.py"
    sound = ("sparse_attention.breakeven", "list", "--table", "tests.breakeven_toys:CASES")
    table.write_text(PROOF_TABLE.replace("EMPTY", repr(empty)).replace("SOUND", repr(sound)))
    monkeypatch.syspath_prepend(str(tmp_path))
    places = ["--results", str(tmp_path / "results"), "--page", str(tmp_path / "proof.md"), "--quiet", "--table", "proof_table"]
    assert main(["proof", *places, "--dry-run"]) == 0
    assert "60 blocks" in capsys.readouterr().out
    assert main(["proof", *places, "--only", "controls"]) == ExitCode.WRONG
    assert "one that passes: DID NOT HOLD (exit 0, expected 10)" in capsys.readouterr().out
    assert "an empty table" in (tmp_path / "proof.md").read_text()
    measured = ["--device", toys.DEVICE, "--blocks", "2", "--budget", "5m", "--json", str(tmp_path / "blocks.json")]
    assert main(["proof", *places, *measured, "--only", "rates"]) == ExitCode.USAGE
    said = capsys.readouterr()
    assert "quick: left out, 2 of 22 blocks undisturbed" in said.out and "nothing was measured" in said.err
    again = [*measured[:3], "3", *measured[4:6], "--resume", str(tmp_path / "blocks.json")]
    assert main(["proof", *places, *again, "--only", "rates"]) == ExitCode.USAGE
    assert "quick: left out, 3 of 22 blocks undisturbed" in capsys.readouterr().out
    blocks = json.loads((tmp_path / "blocks.json").read_text())["cases"][0]["blocks"]
    assert [block["number"] for block in blocks] == [0, 1, 2], "two of them were there"
    assert main(["proof", *places, "--cases", "an empty*"]) == 0
    said = capsys.readouterr().out
    assert "an empty table: held" in said and "one that passes" not in said
    assert main(["proof", *places, "--cases", "renamed"]) == ExitCode.NOTHING_CHECKED
    stored = save(proof, tmp_path / "stored")[0]
    assert main(["proof", *places, "--stored", stored, "--runs", "20"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"10 blocks: false alarms .*; 5 % slowdowns found: ", said)
    kept = json.loads(next((tmp_path / "results" / "cpu-zen4-2c").glob("certificate-*.json")).read_text())
    assert kept["machine"]["time"] == MACHINE["time"], "a proof keeps the date at which its blocks were measured"


@pytest.mark.parametrize("table", ["perf.proof", "perf.proof_cuda"])
def test_the_projects_own_tables(table):
    module = importlib.import_module(table)
    INJECTED, CONTROLS = module.INJECTED, module.CONTROLS
    names = [case.id for item in INJECTED for case in item.cases]
    assert len(names) == len(set(names))
    assert sum(bool(item.slowed) for item in INJECTED) >= 1 and len(INJECTED) >= 4
    assert all(0 not in control.expected or "sound" in control.name for control in CONTROLS)


@pytest.mark.parametrize("extra", [0.0, 0.05, 0.5])
def test_repeated_work_is_real_and_of_the_size_it_says(extra):
    from perf.cases import shape
    from perf.proof import slowed

    workload = slowed(extra, "SlidingWindow(100)", True, **shape(2, 2048, 64))
    workload.check(workload.candidate())
    if extra:
        again, whole = map(int, re.findall(r"\d+", workload.note)[:2])
        assert again / whole == pytest.approx(extra, rel=0.25)



@pytest.mark.parametrize("fault", ["", "another row", "zeros", "not finite"])
def test_the_gpus_check_finds_a_wrong_row(fault):
    """On CPU tensors: it runs wherever they are."""
    import torch

    from perf import proof_cuda
    from sparse_attention import SlidingWindow
    from sparse_attention.reference import reference

    q, k, v = (torch.randn(1, 3, 256, 64, generator=torch.Generator().manual_seed(n)).bfloat16() for n in range(3))
    pattern = SlidingWindow(32)
    out = reference(q.double(), k.double(), v.double(), pattern)[0].bfloat16()
    out = {"another row": out.roll(1, 2), "zeros": out * 0, "not finite": out / 0}.get(fault, out)
    if fault:
        with pytest.raises(AssertionError, match="must be finite" if fault == "not finite" else "is off by"):
            proof_cuda.check(out, q, k, v, pattern)
    else:
        proof_cuda.check(out, q, k, v, pattern)


def test_the_gpus_slowdowns_are_whole_heads():
    from perf.proof_cuda import INJECTED

    for item in INJECTED:
        heads = item.plain.args["heads"]
        assert all(case.args["extra"] == pytest.approx(x * heads) and case.share for x, case in item.slowed.items())
        assert not item.slowed or {0.0, 0.02, 0.1} <= item.slowed.keys() and item.plain.share
