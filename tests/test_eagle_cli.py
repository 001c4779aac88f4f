"""python -m sparse_attention.eagle: doctor, bench and test, and what they say when something is wrong."""

import json
import subprocess
import sys

import pytest
import torch

from sparse_attention.eagle import bench, bench_operations
from sparse_attention.eagle.__main__ import main
from sparse_attention.eagle.bench_sections import SECTIONS, Sections, counted_syncs
from sparse_attention.eagle.doctor import KERNELS
from sparse_attention.eagle.optimize import optimize_eagle
from sparse_attention.eagle.small_model import EaModel

SMALL = ["--vocab", "96", "--total-token", "12", "--depth", "3", "--top-k", "4"]
GRID = ["--batch", "1", "--nodes", "8", "--vocab", "50", "--k", "3"]


def test_doctor(tmp_path, capsys):
    assert main(["doctor", "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    printed = capsys.readouterr().out
    assert found["environment"]["torch"] == torch.__version__ and torch.__version__ in printed
    assert found["engines"]["cpu"] == dict.fromkeys(KERNELS, "compiled")
    patches = found["model"]["patches"]
    assert patches["model.ea_layer.topK_genrate"] == "logsoftmax_topk, cumulative_topk, build_tree"
    for step in ("tree_decoding", "evaluate_posterior", "update_inference_inputs"):
        assert any(f"{step}, as called by eagenerate" in place for place in patches)
    assert all(place in printed for place in patches)


def test_doctor_finds_a_missing_kernel(monkeypatch, capsys):
    monkeypatch.setattr("sparse_attention.eagle.doctor.engine", lambda name, device, impl: None if name == "commit" else main)
    assert main(["doctor"]) == 1
    assert "commit            none: the PyTorch reference runs" in capsys.readouterr().out


def test_bench(tmp_path, capsys):
    arguments = ["--iterations", "2", "--warmup", "0", "--max-tokens", "6", *SMALL, "--json", str(tmp_path / "run.json")]
    assert main(["bench", *arguments]) == 0
    run = json.loads((tmp_path / "run.json").read_text())
    baseline, patched = run["variants"]["baseline"], run["variants"]["patched"]
    assert run["divergence"] == [] and baseline["tokens"] == patched["tokens"] and baseline["steps"] == patched["steps"]
    assert run["hits"]["commit"] == patched["steps"] and not any("reference" in name for name in run["hits"])
    assert len(run["speedup"]["pairs"]) == len(baseline["latency_s"]) == 2 and baseline["syncs_per_step"] is None
    for variant in (baseline, patched):
        assert set(variant["section_s"]) == {*SECTIONS.values(), "rest"} and all(seconds > 0 for seconds in variant["section_s"].values())
    printed = capsys.readouterr().out
    assert "speedup" in printed and "output  equal" in printed and "tokens/s" in printed


def test_bench_says_where_output_differs(monkeypatch, capsys):
    def wrong(model):
        model.base_model.lm_head.weight.data.neg_()
        return optimize_eagle(model)

    monkeypatch.setattr(bench, "optimize_eagle", wrong)
    assert main(["bench", "--iterations", "1", "--warmup", "0", "--max-tokens", "4", *SMALL]) == 1
    assert "output  of prompt 0 differs from token 12 on, where the two logits are" in capsys.readouterr().out


def test_sections_add_up_and_leave_nothing_behind():
    torch.manual_seed(0)
    model = EaModel(total_token=12, depth=3, top_k=4).eval()
    prompt = torch.arange(9)[None]
    plain, _, last = model.eagenerate(prompt, max_new_tokens=6, max_length=64, log=True)
    before = list(vars(model)), list(vars(model.ea_layer))
    with Sections(model) as sections, counted_syncs(model) as syncs:
        assert torch.equal(model.eagenerate(prompt, max_new_tokens=6, max_length=64), plain)
    assert sections.steps == last + 1 and not syncs
    assert (list(vars(model)), list(vars(model.ea_layer))) == before
    assert sections.seconds["target"] > sections.seconds["rest"] > 0


def test_operations(tmp_path, capsys):
    assert main(["test", "--detailed-report", *GRID, "--json", str(tmp_path / "rows.json")]) == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert f"{len(rows)} of {len(rows)} checks equal" in printed and printed.count(" equal ") == len(rows) + 1
    assert {row["operation"] for row in rows} >= {"logsoftmax_topk", "build_tree", "verify_greedy", "verify_sampling", "commit"}
    assert all(row["equal"] and row["seconds"] > 0 and row["reference_s"] > 0 for row in rows)


def test_operations_that_differ_are_found(monkeypatch, capsys):
    right = bench_operations.verify_greedy

    def wrong(tree, logits, *, impl):
        verified = right(tree, logits, impl=impl)
        return verified._replace(next_token=verified.next_token + (impl == "auto"))

    monkeypatch.setattr(bench_operations, "verify_greedy", wrong)
    assert main(["test", *GRID]) == 1
    printed = capsys.readouterr().out
    assert printed.count("DIFFERS") == 1 and "verify_greedy" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["bench", "--base-model", "somewhere"], "--draft-model is not given"),
        (["doctor", "--draft-model", "somewhere"], "--base-model is not given"),
        (["bench", "--prompt", "Hello"], "--prompt is 'Hello'; expected none without --base-model"),
        (["bench", "--base-model", "somewhere", "--draft-model", "there"], "expected EAGLE to be installed"),
        (["test", "--nodes", "5000"], "--nodes is 5000; expected at most"),
        (["bench", "--total-token", "500", "--depth", "1", "--top-k", "4"], "--total-token is 500; expected 2 to 21 with --depth 1"),
        (["bench", "--device", "cuda:77"], "--device is 'cuda:77'; expected"),
        (["doctor", "--device", "abacus"], "--device is 'abacus'; expected"),
    ],
)
def test_wrong_use_is_named(arguments, message, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "eagle", None)
    grid = ["--batch", "1", "--vocab", "50", "--k", "3"] if arguments[0] == "test" else []
    assert main([*arguments, *grid]) == 2
    assert message in capsys.readouterr().err


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "sparse_attention.eagle", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and all(name in done.stdout for name in ("doctor", "bench", "test"))
