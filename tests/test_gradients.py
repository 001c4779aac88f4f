"""Gradients by finite differences in float64, and the ways in which autograd asks for them."""

from __future__ import annotations

import pytest
import torch

from sparse_attention import (
    BlockSparse,
    Causal,
    Dense,
    Dilated,
    LogSparse,
    Predicate,
    Sinks,
    SlidingWindow,
    attention,
    merge,
)
from tests.calls import IMPLS, SPARSE
from tests.cases import block_mask
from tests.oracle import exact_gradients, inputs

# (pattern, q_len, kv_len, heads, kv_heads); small, as every number that goes in is moved twice.
CHECKED = [
    (Dense(), 5, 7, 2, 1),
    (Causal(), 9, 6, 2, 2),  # the first three queries see nothing
    (SlidingWindow(3), 4, 70, 1, 1),  # beyond one tile
    (SlidingWindow(2, causal=False), 66, 5, 1, 1),
    (Dilated(3, (2, 3)), 12, 12, 2, 1),
    (Dilated(4, 2) | Sinks(2), 10, 13, 1, 1),  # parts that merge
    (Predicate(lambda i, j: (i * j) % 3 == 1), 9, 11, 2, 1),
    (LogSparse(), 11, 11, 1, 1),
    (BlockSparse(block_mask(2, 2, 2, density=0.5), 16), 18, 20, 2, 2),
]


@pytest.mark.parametrize("impl", (*SPARSE, "reference"))
@pytest.mark.parametrize("pattern, q_len, kv_len, heads, kv_heads", CHECKED, ids=lambda x: str(x).split("(")[0])
def test_gradcheck(pattern, q_len, kv_len, heads, kv_heads, impl):
    x = inputs(pattern.mask(q_len, kv_len, heads), kv_heads=kv_heads, head_dim=8, dtype=torch.float64)

    def call(q, k, v):
        out, lse = attention(q, k, v, pattern, impl=impl, scale=0.7, return_lse=True)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(call, [y.requires_grad_() for y in (x.q, x.k, x.v)])


def leaves(x):
    return [y.detach().clone().requires_grad_() for y in (x.q, x.k, x.v)]


@pytest.mark.parametrize("impl", IMPLS)
def test_one_of_two_results(impl):
    """A loss may take out alone, or the LSE alone."""
    pattern = SlidingWindow(40) | Sinks(2)
    x = inputs(pattern.mask(90, 100, 2), kv_heads=1, head_dim=16, dtype=torch.float64)
    zero_out, zero_lse = torch.zeros_like(x.dout), torch.zeros_like(x.dlse)
    for dout, dlse in ((x.dout, None), (None, x.dlse)):
        q, k, v = leaves(x)
        out, lse = attention(q, k, v, pattern, impl=impl, return_lse=True)
        loss = (out * dout).sum() if dlse is None else (lse * dlse).sum()
        given = x._replace(dout=zero_out if dout is None else dout, dlse=zero_lse if dlse is None else dlse)
        for mine, true in zip(torch.autograd.grad(loss, [q, k, v], materialize_grads=True), exact_gradients(given)):
            torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-12)
    q, k, v = leaves(x)
    out = attention(q, k, v, pattern, impl=impl)
    for mine, true in zip(torch.autograd.grad(out, [q, k, v], x.dout), exact_gradients(x._replace(dlse=zero_lse))):
        torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wanted", ["q", "k", "v", "qv", "kv"])
def test_some_of_three_inputs(wanted, impl):
    pattern = Dilated(10, 3)
    x = inputs(pattern.mask(60, 70, 2), head_dim=8, dtype=torch.float64)
    tensors = {name: getattr(x, name).clone().requires_grad_(name in wanted) for name in "qkv"}
    out, lse = attention(**tensors, pattern=pattern, impl=impl, return_lse=True)
    torch.autograd.backward([out, lse], [x.dout, x.dlse])
    for name, true in zip("qkv", exact_gradients(x)):
        if name in wanted:
            torch.testing.assert_close(tensors[name].grad, true, rtol=1e-11, atol=1e-12)
        else:
            assert tensors[name].grad is None


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_any_strides(impl):
    """sum() gives a gradient of stride 0; a transposed result one that is not contiguous in its last dimension."""
    pattern = SlidingWindow(30)
    x = inputs(pattern.mask(70, 70, 2), head_dim=16, dtype=torch.float64)
    zero = torch.zeros_like(x.dlse)
    weight = torch.randn(1, 2, 16, 70, dtype=torch.float64)
    for loss, dout in ((torch.sum, torch.ones_like(x.dout)), (lambda out: (out.mT * weight).sum(), weight.mT)):
        q, k, v = leaves(x)
        grads = torch.autograd.grad(loss(attention(q, k, v, pattern, impl=impl)), [q, k, v])
        for mine, true in zip(grads, exact_gradients(x._replace(dout=dout, dlse=zero))):
            torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_accumulates_and_repeats(impl):
    """One tensor in three roles, a graph that is used twice, and a gradient through strides that it was given."""
    pattern = Causal()
    base = torch.randn(2, 40, 3, 16, dtype=torch.float64, requires_grad=True)
    x = base.transpose(1, 2)
    out = attention(x, x, x, pattern, impl=impl)
    loss = (out**2).sum()
    once = torch.autograd.grad(loss, base, retain_graph=True)[0]
    loss.backward()
    assert torch.equal(base.grad, once)
    y = base.detach().clone().requires_grad_()
    z = y.transpose(1, 2)
    scores = (z @ z.mT * 16**-0.5).masked_fill(~torch.ones(40, 40).tril().bool(), -torch.inf)
    (theirs,) = torch.autograd.grad(((torch.softmax(scores, -1) @ z) ** 2).sum(), y)
    torch.testing.assert_close(once, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", (*SPARSE, "dense"))
def test_changed_inputs_are_noticed(impl):
    """Autograd must not compute a gradient from a tensor that was overwritten after the forward pass."""
    q, k, v = (torch.randn(1, 2, 20, 8, requires_grad=True) for _ in range(3))
    scratch = q * 1.0
    out = attention(scratch, k, v, SlidingWindow(5), impl=impl)
    scratch.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("impl", SPARSE)
def test_gradient_through_merge(impl):
    """Two halves of the keys, merged, have the gradients of the whole: dlse is what carries them."""
    near, far = SlidingWindow(20), Predicate(lambda i, j: (i - j >= 20) & (j % 2 == 0))
    x = inputs((near | far).mask(100, 100, 2), kv_heads=1, head_dim=16, dtype=torch.float64)
    q, k, v = leaves(x)
    parts = [attention(q, k, v, part, impl=impl, return_lse=True) for part in (near, far)]
    out, lse = merge(*zip(*parts))
    grads = torch.autograd.grad([out, lse], [q, k, v], [x.dout, x.dlse])
    for mine, true in zip(grads, exact_gradients(x)):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-12)
