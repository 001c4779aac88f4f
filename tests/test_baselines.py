"""The dense rivals: which there are, that they agree, and that one which cannot run is left out with its reason."""

import sys
import types

import pytest
import torch

from sparse_attention import attention, baselines
from sparse_attention.breakeven import Workload
from sparse_attention.breakeven.worker import _baselines
from sparse_attention.patterns import BlockSparse, Causal, Dilated, Lengths, LogSparse, Longformer, SlidingWindow
from tests.breakeven_toys import ToldClock, take


def tensors(kv_heads=4, length=32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, length, 16, generator=generator) for heads in (4, kv_heads, kv_heads)]


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_every_way_gives_the_same(kv_heads, causal):
    ways = baselines.dense(*tensors(kv_heads), causal=causal)
    first, *others = ways.values()
    assert next(iter(ways)) == "sdpa" and "sdpa math" in ways
    assert ("sdpa, heads repeated" in ways) == (kv_heads == 2)
    for other in others:
        torch.testing.assert_close(other(), first())


def test_the_compiled_way_is_asked_for_on_a_cpu(monkeypatch):
    compiled = []

    def compile(call, dynamic):
        def run():
            compiled.append(call)
            return call()

        return run

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.delenv(baselines.COMPILED_FLAG, raising=False)
    assert baselines.COMPILED not in baselines.dense(*tensors(), causal=True)
    monkeypatch.setenv(baselines.COMPILED_FLAG, "1")
    ways = baselines.dense(*tensors(), causal=True)
    assert list(ways)[-1] == baselines.COMPILED and not compiled, "nothing is compiled before it is to be timed"
    ready = baselines.prepare(ways)
    ready("sdpa")
    assert not compiled
    ready(baselines.COMPILED)
    assert len(compiled) == 1
    torch.testing.assert_close(ways[baselines.COMPILED](), ways["sdpa"]())
    q, k, v = (x.requires_grad_() for x in tensors())
    assert baselines.COMPILED not in baselines.dense(q, k, v, causal=True), "its backward would be compiled while timed"


def raises():
    raise RuntimeError("No available kernel.")


def test_a_baseline_that_cannot_run_is_left_out():
    workload = Workload(lambda: None, {"flash": raises, "plain": lambda: take(2e-3), "quick": lambda: take(1e-3)})
    found, absent = _baselines(workload, ToldClock())
    assert absent == {"flash": "RuntimeError: No available kernel."}
    assert list(found) == ["plain", "quick"]
    assert found["quick"][0] == pytest.approx(1e-3, rel=0.1) and found["plain"][0] == pytest.approx(2e-3, rel=0.1)


def test_a_first_call_that_compiles_is_not_the_time_of_a_baseline(monkeypatch):
    calls = []

    def compiling():
        calls.append(0)
        take(5.0 if len(calls) == 1 else 1e-3)

    class Device(ToldClock):
        on_threads = False

    monkeypatch.setattr("sparse_attention.breakeven.worker.time", type("T", (), {"perf_counter": lambda: ToldClock.now}))
    found, _ = _baselines(Workload(lambda: None, {"jit": compiling}), Device())
    assert found["jit"][0] == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize("pattern, lengths, heads", [
    (SlidingWindow(100), (700, 700), 1), (Dilated(40, 4), (300, 600), 1), (Longformer(50, 3), (640, 640), 1), (Causal(), (256, 384), 1),
    (BlockSparse(torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5, 64), (256, 256), 2),
], ids=str)  # fmt: skip
def test_the_mask_of_flex_attention_is_its_own(pattern, lengths, heads):
    flexible = pytest.importorskip("torch.nn.attention.flex_attention")
    lengths = Lengths(*lengths)
    masks = torch.stack([pattern.mask(*lengths, heads)[head] for head in range(heads)])

    def mask_mod(batch, head, i, j):
        return masks[head, i, j]

    theirs = flexible.create_block_mask(mask_mod, None, heads, *lengths, device="cpu")
    for most in (1 << 16, 1 << 28):
        ours = baselines.flex_mask(mask_mod, heads, lengths, torch.device("cpu"), most)
        for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_indices", "full_q_indices"):
            a, b = getattr(ours, name), getattr(theirs, name)
            assert a.dtype == b.dtype and torch.equal(a, b), name
        assert ours.seq_lengths == theirs.seq_lengths


def test_each_flex_attention_has_code_of_its_own(monkeypatch):
    compiled = []

    def compile(function, **options):
        compiled.append(function)
        return lambda q, k, v, block_mask: q

    monkeypatch.setattr(torch, "compile", compile)
    for window in (3, 4):
        baselines.flex(*tensors(), SlidingWindow(window))
    assert len({id(function.__code__) for function in compiled}) == 2, "past a limit of each code object it would run uncompiled"


def test_flex_attention_takes_requests_a_few_at_a_time(monkeypatch):
    """Past `most` elements; views of the tensors that compile once, and give what one call does."""
    compile, given = torch.compile, []

    def traced(function, **options):  # its graphs and their guards are Inductor's; the kernels are not
        compiled = compile(function, backend="eager", **options)

        def run(*args):
            given.append(args[1])
            return compiled(*args)

        return run

    monkeypatch.setattr(torch, "compile", traced)
    q, k, v = (torch.randn(6, heads, length, 16) for heads, length in ((4, 1), (2, 256), (2, 256)))
    whole = baselines.flex(q, k, v, SlidingWindow(100))()
    assert {x.shape[0] for x in given} == {6}
    given.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        call = baselines.flex(q, k, v, SlidingWindow(100), most=5 * k[0].numel() - 1)
        torch.testing.assert_close(call(), whole)
        for x in (q, k, v):  # as between the checks of a race
            x.normal_()
        torch.testing.assert_close(call(), attention(q, k, v, SlidingWindow(100), impl="reference"))
    assert [(x.shape[0], x.data_ptr() - k.data_ptr()) for x in given[-2:]] == [(3, 0), (3, 3 * k.stride(0) * 4)], "copies"


def test_the_requests_of_a_call_of_flex_attention():
    q, k = (torch.empty(64, heads, length, 128, dtype=torch.float16, device="meta") for heads, length in ((32, 1), (8, 131072)))
    assert baselines.flex_requests(q, k, k) == 8 and k[:8].numel() == 2**30
    assert baselines.flex_requests(q[:16], k[:16], k[:16]) == 8 and baselines.flex_requests(q[:13], k[:13], k[:13]) == 13
    assert baselines.flex_requests(q[:17], k[:17], k[:17]) == 1, "calls of equal size"
    assert baselines.flex_requests(q[:4], k[:4, :, :16], k[:4, :, :16], most=k.stride(0) + 1) == 1, "a view spans the cache that it is of"


@pytest.mark.parametrize("pattern", [SlidingWindow(9), BlockSparse(torch.eye(2).bool().expand(4, 2, 2), 16), LogSparse()], ids=str)
def test_torch_sparse_gives_the_same(pattern):
    q, k, v = tensors()
    torch.testing.assert_close(baselines.torch_sparse(q, k, v, pattern)(), attention(q, k, v, pattern, impl="reference"))


def test_flash_attn_is_called_as_it_wants_to_be(monkeypatch):
    def told(q, k, v, causal):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return (torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2), None)

    monkeypatch.setattr(baselines, "FLASH_ATTN", {"flash-attn 4": "a_flash_attn", "flash-attn 2": "not_a_module"})
    monkeypatch.setitem(sys.modules, "a_flash_attn", types.SimpleNamespace(flash_attn_func=told))
    q, k, v = tensors()
    found = baselines.flash_attn(q, k, v, causal=True)
    assert list(found) == ["flash-attn 4"]
    torch.testing.assert_close(found["flash-attn 4"](), baselines.dense(q, k, v, causal=True)["sdpa"]())
