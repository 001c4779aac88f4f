"""Which calls of `attention` the decode engine runs, and that they mean the same."""

from __future__ import annotations

import pytest
import torch

from sparse_attention import Causal, Sinks, SlidingWindow, Tree, attention, decode_cuda, dispatch, explain, plan
from sparse_attention.decode_pattern import suits_cuda
from sparse_attention.dispatch import Sizes
from tests.test_decode import check, exact, tensors


FEW = [
    (Causal(), 1, 40),
    (Causal(), 5, 300),
    (SlidingWindow(9), 3, 300),
    (SlidingWindow(9) | Sinks(3), 4, 300),
    (Causal() & (Sinks(30) | SlidingWindow(9)), 2, 20),
    (Tree((-1, 0, 0, 1, -1)), 5, 40),
]


@pytest.mark.parametrize("pattern, q_len, kv_len", FEW, ids=lambda x: str(x)[:40])
def test_attention_runs_few_queries_here(pattern, q_len, kv_len):
    """`attention` chooses the engine by itself, its gradients are those of the formula, and explain names it."""
    x = [t.requires_grad_() for t in tensors(2, 8, 2, q_len, kv_len, 32)]
    assert plan(*x, pattern).impl == "decode" and "impl      decode: " in explain(*x, pattern)
    results = []
    for impl in ("auto", "reference"):
        out, lse = attention(*x, pattern, impl=impl, return_lse=True)
        results.append([out, lse, *torch.autograd.grad((out * out).sum() + lse.sin().sum(), x)])
    for found, want in zip(*results):
        torch.testing.assert_close(found, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("pattern, q_len, kv_len", [
    (Causal(), 40, 300), (SlidingWindow(9) | Sinks(30), 1, 20), (Sinks(3), 1, 300), (Tree((-1, 0)), 3, 300), (Tree((-1, 0)), 2, 3),
    (SlidingWindow(9, causal=False), 1, 300), (SlidingWindow(9) & Tree((-1, 0)), 2, 300),
])  # fmt: skip
def test_attention_runs_other_calls_elsewhere(pattern, q_len, kv_len):
    x = tensors(1, 4, 2, q_len, kv_len, 16)
    assert plan(*x, pattern).impl != "decode"
    check(attention(*x, pattern, return_lse=True), exact(*x, pattern), torch.float32)


def test_a_growing_cache_keeps_the_other_engines():
    from sparse_attention import engines

    q, k, v = tensors(1, 2, 1, 1, 1200, 8)
    attention(q, k[:, :, :5], v[:, :, :5], Causal())
    kept = dict(engines._engines)
    for length in range(600, 1200):
        attention(q, k[:, :, :length], v[:, :, :length], Causal())
    assert engines._engines == kept and len(engines._decoding) <= engines._MOST_DECODING


@pytest.mark.parametrize("pattern, q_len, kv_len, runs", [
    (Causal(), 1, 4000, True), (Causal(), 64, 512, True), (Causal(), 64, 511, False), (Causal(), 65, 9000, False),
    (SlidingWindow(9) | Sinks(3), 1, 20, True), (SlidingWindow(9) | Sinks(30), 1, 20, False), (Tree((-1, 0)), 2, 2, True),
    (Tree((-1, 0)), 1, 9, False), (Tree((-1, *[0] * 1023)), 1024, 1024, True), (Tree((-1, *[0] * 1024)), 1025, 9000, False),
], ids=lambda x: str(x)[:40])  # fmt: skip
def test_which_calls_run_here_on_cuda(pattern, q_len, kv_len, runs):
    assert bool(suits_cuda(pattern, q_len, kv_len)) == runs


@pytest.mark.parametrize("nodes, kv_len, dtype, head_dim, capability, runs", [
    (1024, 1024, torch.float16, 128, (9, 0), True), (300, 2399, torch.bfloat16, 64, (9, 0), True), (300, 2399, torch.float32, 64, (9, 0), False),
    (300, 2399, torch.float16, 192, (9, 0), False), (300, 2399, torch.float16, 64, (8, 0), False), (300, 2400, torch.float32, 64, (8, 0), True),
    (256, 256, torch.float32, 192, (8, 0), True), (300, 300, torch.float16, 64, (7, 5), False),
], ids=str)  # fmt: skip
def test_where_large_trees_run_here_on_cuda(monkeypatch, nodes, kv_len, dtype, head_dim, capability, runs):
    monkeypatch.setattr(decode_cuda, "device_obstacle", lambda capability: capability < (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    sizes = Sizes(1, 32, 8, nodes, kv_len, head_dim, dtype, "cuda")
    assert bool(dispatch._decoding(Tree((-1, *[0] * (nodes - 1))), sizes)) == runs
