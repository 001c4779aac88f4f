"""What must agree with what: one pattern written in several ways, parts with their union, a run with its repetition."""

import os
import subprocess
import sys

import pytest
import torch

from sparse_attention import (
    BlockSparse,
    Causal,
    Csr,
    Dilated,
    Documents,
    Predicate,
    SlidingWindow,
    attention,
    merge,
)
from sparse_attention.breakeven.machine import cores
from tests.cases import CASES

ENGINES = ("tile", "gather")


def tensors(length, heads=2, head_dim=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, heads, length, head_dim, generator=generator) for _ in range(3))


def everything(q, k, v, pattern, impl):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves, pattern, impl=impl, return_lse=True)
    return out, lse, *torch.autograd.grad(out, leaves, torch.ones_like(out))


def csr_of(mask):
    counts = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    return Csr(counts, mask.nonzero()[:, 1])


@pytest.mark.parametrize("impl", ENGINES)
def test_one_window_in_four_spellings(impl):
    q, k, v = tensors(190)
    window = SlidingWindow(50)
    spellings = (csr_of(window.mask(190, 190)), Predicate(lambda i, j: (i - j >= 0) & (i - j < 50)), Dilated(50, 1))
    want = everything(q, k, v, window, impl)
    for other in spellings:
        torch.testing.assert_close(everything(q, k, v, other, impl), want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("impl", ENGINES)
def test_documents_are_blocks(impl):
    q, k, v = tensors(192)
    want = everything(q, k, v, Documents((64, 64, 64)), impl)
    torch.testing.assert_close(everything(q, k, v, BlockSparse(torch.eye(3, dtype=torch.bool), 64), impl), want)
    torch.testing.assert_close(everything(q, k, v, BlockSparse(torch.block_diag(*[torch.ones(4, 4)] * 3).bool(), 16), impl), want)


@pytest.mark.parametrize("impl", ENGINES)
def test_dilation_is_a_strided_view(impl):
    q, k, v = tensors(203)
    out = attention(q, k, v, Dilated(9, 4), impl=impl)
    for residue in range(4):
        views = (x[:, :, residue::4] for x in (q, k, v))
        torch.testing.assert_close(out[:, :, residue::4], attention(*views, SlidingWindow(9), impl=impl), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("impl", ENGINES)
def test_disjoint_parts_merge_to_the_whole(impl):
    q, k, v = tensors(150)
    near, far = SlidingWindow(40), Predicate(lambda i, j: i - j >= 40)
    parts = [attention(q, k, v, part, impl=impl, return_lse=True) for part in (near, far)]
    whole = attention(q, k, v, Causal(), impl=impl, return_lse=True)
    torch.testing.assert_close(merge(*zip(*parts)), whole, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("impl", ENGINES)
def test_heads_and_batches_are_independent(impl):
    q, k, v = (x.reshape(2, 3, 120, 16) for x in tensors(120, heads=6, head_dim=16))
    pattern = Dilated(10, (1, 2, 5))
    out = attention(q, k, v, pattern, impl=impl)
    for batch in range(2):
        for head in range(3):
            alone = (x[batch : batch + 1, head : head + 1] for x in (q, k, v))
            assert torch.equal(attention(*alone, Dilated(10, (1, 2, 5)[head]), impl=impl)[0, 0], out[batch, head])


@pytest.mark.parametrize("impl", ENGINES)
def test_a_constant_in_all_keys_changes_nothing(impl):
    q, k, v = (x.double() for x in tensors(130))
    shifted = attention(q, k + torch.randn(32, dtype=torch.float64), v, SlidingWindow(30), impl=impl)
    torch.testing.assert_close(shifted, attention(q, k, v, SlidingWindow(30), impl=impl))


@pytest.mark.parametrize("impl", ENGINES)
def test_two_hundred_runs_are_bit_equal_on_any_number_of_threads(impl):
    q, k, v = tensors(260, heads=4)
    pattern = SlidingWindow(70) | Dilated(20, 6)
    before = torch.get_num_threads()
    want = everything(q, k, v, pattern, impl)
    try:
        for turn in range(200):
            torch.set_num_threads(1 + turn % max(2, cores()))
            for one, other in zip(everything(q, k, v, pattern, impl), want):
                assert torch.equal(one, other)
    finally:
        torch.set_num_threads(before)


OTHER_WIDTHS = """
import torch
from tests.cases import CASES
from sparse_attention import attention
torch.manual_seed(0)
for case in CASES[::4]:
    q = torch.randn(1, case.heads, case.q_len, 40)
    k, v = torch.randn(2, 1, case.heads, case.kv_len, 40)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    want = attention(*leaves, case.make(), impl="reference")
    grads = torch.autograd.grad(want, leaves, torch.ones_like(want))
    for impl in ("tile", "gather"):
        out = attention(*leaves, case.make(), impl=impl)
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(out, leaves, torch.ones_like(out)), grads, atol=1e-4, rtol=1e-4)
"""


@pytest.mark.parametrize("width", ("baseline", "avx2"))
def test_narrower_vectors_give_the_same(width):
    from sparse_attention._build import TIERS, tier

    if list(TIERS).index(width) >= list(TIERS).index(tier()):
        pytest.skip(f"this processor's own width is {tier()}")
    environment = {**os.environ, "SPARSE_ATTENTION_CPU": width}
    done = subprocess.run([sys.executable, "-c", OTHER_WIDTHS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_table_covers_every_pattern():
    from sparse_attention import patterns

    public = {name for name in patterns.__all__ if isinstance(getattr(patterns, name), type)}
    public = {name for name in public if issubclass(getattr(patterns, name), patterns.Pattern)} - {"Pattern"}
    text = " ".join(repr(case.make()) for case in CASES)
    assert not [name for name in public if f"{name}(" not in text]
