"""The builders of EAGLE's cases: small ones are right, follow their inputs, and their checks find an output that is wrong."""

from __future__ import annotations

import gc

import pytest
import torch

from perf import decode_workloads, eagle_cases, eagle_generation, eagle_workloads, mask_race
from sparse_attention import baselines, eagle
from sparse_attention.breakeven import select
from sparse_attention.breakeven.checking import check_fresh
from sparse_attention.patterns import Lengths, SlidingWindow

HEADS = {"dtype": "float32", "heads": 4, "kv_heads": 2, "head_dim": 16}
SMALL = {
    "build": (eagle_workloads.build, {"nodes": 20, "depth": 3}),
    "build bits": (eagle_workloads.build, {"nodes": 20, "depth": 3, "mask": "bits"}),
    "mask": (eagle_workloads.mask, {"nodes": 40}),
    "verify": (eagle_workloads.verify, {"vocab": 500, "dtype": "float32"}),
    "verify, argmax": (eagle_workloads.verify, {"vocab": 500, "dtype": "bfloat16", "batch": 3, "rival": "argmax"}),
    "commit": (eagle_workloads.commit, {"layers": 2, "rows": 400, "dtype": "bfloat16"}),
    "step": (eagle_workloads.step, {"vocab": 600, "layers": 2, "rows": 400, "dtype": "float32"}),
    "draft": (eagle_workloads.draft, {"vocab": 700, "dtype": "float32"}),
    "tree": (decode_workloads.tree, {"nodes": 9, "prefix": 30, **HEADS}),
    "tree, eager": (decode_workloads.tree, {"nodes": 9, "prefix": 0, "eager": True, **HEADS}),
    "window": (decode_workloads.window, {"batch": 3, "window": 16, "length": 90, **HEADS}),
}


@pytest.mark.parametrize("name", SMALL)
def test_right_on_changing_inputs(name):
    builder, args = SMALL[name]
    workload = builder(**args)
    check_fresh(workload, 0)  # the seed that a race changes them with
    for name, call in workload.baselines.items():
        if "EAGLE" not in name and name not in ("argmax", "PyTorch's"):
            workload.check(call())


def test_generation_is_equal():
    check_fresh(eagle_generation.generate(vocab=96, tokens=12), 5)


@pytest.mark.parametrize("name", ["build", "build bits", "mask", "verify", "commit", "step"])
def test_a_wrong_output_is_found(name, monkeypatch):
    builder, args = SMALL[name]
    workload = builder(**args)
    right = workload.candidate()
    workload.check(right)
    wrong = {
        "build": lambda: right._replace(depths=right.depths + 1),
        "build bits": lambda: right._replace(tree_mask=right.tree_mask ^ torch.eye(20, 1, dtype=torch.int64)[None]),
        "mask": lambda: right | True,
        "verify": lambda: right._replace(accept_length=right.accept_length - 1),
        "commit": lambda: right._replace(hidden=right.hidden * 2),
        "step": lambda: ([*right[0], 3], right[1]),
    }[name]()
    with pytest.raises(AssertionError):
        workload.check(wrong)
    if name in ("commit", "step"):  # a cache that is left as it is
        nothing = right if name == "commit" else eagle.Committed(torch.zeros(1).long(), right[1])
        monkeypatch.setattr(eagle, "commit", lambda *caches_and_path, hidden: nothing)
        with pytest.raises(AssertionError):
            workload.check(right)


def test_eager_calls_are_made_in_a_row_on_both_sides(monkeypatch):
    calls = []

    def count(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **options: (calls.append(name), function(*args, **options))[1])

    count(decode_workloads, "decode")
    count(torch.nn.functional, "scaled_dot_product_attention")
    workload = decode_workloads.tree(nodes=9, prefix=0, eager=True, **HEADS)
    assert {"sdpa mask", "sdpa bias", "sdpa, heads repeated mask", "sdpa math mask"} <= {*workload.baselines}
    for name, call in {"": workload.candidate, **workload.baselines}.items():
        calls.clear()
        call()
        assert calls == ["scaled_dot_product_attention" if name else "decode"] * decode_workloads.EAGER_CALLS


def test_flex_attention_is_given_the_window_of_the_whole_cache(monkeypatch):
    given = []

    def flex(q, k, v, pattern):
        given.append((k, v, pattern))
        kept = slice(k.shape[2] - pattern.window, None)
        return lambda: torch.nn.functional.scaled_dot_product_attention(q, k[:, :, kept], v[:, :, kept], enable_gqa=True)

    monkeypatch.setattr(baselines, "flex", flex)
    workload = decode_workloads.window(batch=2, window=128, length=384, rival="flex", **HEADS)
    check_fresh(workload, 0)
    workload.check(workload.baselines["flex"]())
    ((k, v, pattern),) = given
    assert pattern == SlidingWindow(128) and k.shape == v.shape == (2, 2, 384, 16)
    assert k[:, :, :256].isnan().all() and v[:, :, :256].isnan().all() and torch.isfinite(k[:, :, 256:]).all()
    monkeypatch.setattr(baselines, "flex_requests", lambda *tensors: 1)
    assert list(decode_workloads.window(batch=2, window=128, length=384, rival="flex", **HEADS).baselines) == ["flex, 1 requests a call"]
    with pytest.raises(ValueError, match="window is 100 of 384; expected one that begins with a block of 128 keys"):
        decode_workloads.window(batch=2, window=100, length=384, rival="flex", **HEADS)


@pytest.mark.parametrize("case", [c for c in eagle_cases.CUDA if c.args.get("rival") == "flex"], ids=lambda c: c.id)
def test_flex_attention_reads_nothing_that_is_nan(case):
    """The rows of the table: the blocks that its mask lists are those of the window."""
    pytest.importorskip("torch.nn.attention.flex_attention")
    length, window = case.args["length"], case.args["window"]
    pattern, lengths = SlidingWindow(window), Lengths(1, length)
    mask = baselines.flex_mask(lambda b, h, i, j: pattern.allows(i + lengths.offset, j, lengths), 1, lengths, torch.device("cpu"))
    listed = ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    blocks = [block for count, indices in listed for block in indices.flatten()[: int(count)].tolist()]
    assert sorted(blocks) == list(range((length - window) // 128, length // 128))


def test_the_windows_share_a_cache_while_one_of_them_is_in_use():
    first = decode_workloads.window(batch=2, window=32, length=384, **HEADS)
    (caches,) = decode_workloads._caches_in_use.values()
    second = decode_workloads.window(batch=2, window=32, length=384, **HEADS)
    assert [*decode_workloads._caches_in_use.values()] == [caches]
    del first, caches
    gc.collect()
    assert len(decode_workloads._caches_in_use) == 1
    del second
    gc.collect()
    assert not decode_workloads._caches_in_use


def test_few_rows_run_by_default_on_the_cpu():
    assert 3 <= len(select(eagle_cases.CPU)) <= 4 < len(select(eagle_cases.CPU, sizes="full"))
    for table in (eagle_cases.CPU, eagle_cases.CUDA):
        assert {"build", "mask", "verify", "commit", "step", "generate", "tree"} <= {case.build.split(":")[1] for case in table}


def test_the_mask_race_prints_its_tables(capsys):
    mask_race.main(["--nodes", "16", "33", "--sections", "20", "--budget", "0"])
    masks, sections = capsys.readouterr().out.split("\n\n")
    assert [line.split(" | ")[0] for line in masks.splitlines()[2:]] == ["| 16", "| 33"]
    assert "tolist" in sections and [line.split(" | ")[0] for line in sections.splitlines()[2:]] == [f"| {way}" for way in mask_race.WAYS]
