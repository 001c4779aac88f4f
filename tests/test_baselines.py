"""The dense rivals: which there are, that they agree, and that one which cannot run is left out with its reason."""

import pytest
import torch

from sparse_attention import baselines
from sparse_attention.breakeven import Workload
from sparse_attention.breakeven.worker import _baselines
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
