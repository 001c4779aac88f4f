"""What a result keeps beside its speedup: memory, every baseline, the clock's further figures; and what disturbed a block."""

import pytest

from sparse_attention.breakeven import Run, Sequential, Verdict
from sparse_attention.breakeven.cli import main
from sparse_attention.breakeven.result import result
from sparse_attention.breakeven.store import Block, Record
from sparse_attention.breakeven.table import headline, markdown, text
from tests import breakeven_stored as stored
from tests.breakeven_toys import case

POLICY = Sequential((2,))


def record(**scout):
    baselines = {"sdpa": 6.0, "sdpa math": 3.0}
    found = Record(case("x"), {"status": "ok", "baselines": baselines, **scout})
    for number in range(3):
        figures = {"candidate_eager_s": 1.1 + number, "candidate_warm_s": 0.9} if number else {"candidate_eager_s": 1.1}
        found.blocks.append(Block(number, "sdpa math", [3.0] * 4, [1.0] * 4, [True] * 4, figures=figures))
    return found


def test_the_speedup_over_the_default_baseline_is_kept():
    found = result(record(), POLICY)
    assert (found.baseline, found.default_baseline) == ("sdpa math", "sdpa")
    assert found.speedup == pytest.approx(3.0)
    assert found.speedup_over_default == pytest.approx(6.0)
    kept = found.as_dict()
    assert kept["speedup_over_default"] == pytest.approx(6.0) and kept["baselines"] == {"sdpa": 6.0, "sdpa math": 3.0}


def test_without_an_interval_there_is_no_speedup_over_the_default():
    assert result(Record(case("x"), {"status": "wrong", "reason": "zeros"}), POLICY).speedup_over_default is None


def test_figures_that_every_block_has_are_kept():
    assert result(record(), POLICY).as_dict()["figures"] == {"candidate_eager_s": pytest.approx(2.1)}


def test_memory_is_shown_on_demand():
    found = [result(record(candidate_peak_bytes=3 << 20, baseline_peak_bytes={"sdpa": 1, "sdpa math": 70 << 20}), POLICY)]
    assert "MiB" not in text(found)
    row = next(line for line in text(found, memory=True).splitlines() if line.startswith("x"))
    assert row.split()[-4:] == ["70.0", "MiB", "3.0", "MiB"]
    assert "dense memory" in text(found, memory=True)
    assert "| 70.0 MiB | 3.0 MiB |" in markdown(found, memory=True)


def test_the_command_line_shows_memory_of_a_stored_run(tmp_path, capsys):
    path = tmp_path / "run.json"
    stored.run([stored.window(256, 4096)]).save(path)
    main(["regate", str(path)])
    assert "MiB" not in capsys.readouterr().out
    main(["regate", str(path), "--memory"])
    assert capsys.readouterr().out.split("PASS")[1].split()[:4] == ["34.0", "MiB", "18.0", "MiB"]


@pytest.mark.parametrize(
    "disturbed, said",
    [({}, "contended"), ({"slow clock": 3, "contended": 1}, "slow clock"), ({"throttled (power cap)": 4}, "throttled")],
)
def test_the_reason_names_what_disturbed_most_pairs(disturbed, said):
    found = Record(case("x"), {"status": "ok", "baselines": {"plain": 1.0}})
    found.blocks = [Block(n, "plain", [3.0] * 4, [1.0] * 4, [False] * 4, disturbed) for n in range(3)]
    judged = result(found, POLICY)
    assert judged.verdict is Verdict.NOT_EVALUATED
    assert judged.reason.startswith(said)


def test_further_figures_survive_the_disk(tmp_path):
    run = stored.run([stored.window(256, 4096)])
    block = next(iter(run.records.values())).blocks[0]
    block.figures, block.disturbed = {"candidate_eager_s": 1e-5}, {"contended": 1}
    run.save(tmp_path / "run.json")
    again = next(iter(Run.load(tmp_path / "run.json").records.values())).blocks[0]
    assert again == block


def test_absent_nvml_is_said():
    run = stored.run([stored.window(256, 4096)])
    assert "NVML" not in headline(run, [])
    run.evidence[0]["clock"] = {"nvml": "read"}
    assert "NVML" not in headline(run, [])
    run.evidence[1]["clock"] = {"nvml": "absent: libnvidia-ml.so.1 is not here"}
    assert "NVML absent: libnvidia-ml.so.1 is not here" in headline(run, [])
