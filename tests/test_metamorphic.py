"""Two ways to write one thing agree: patterns, parts, strides, heads, scales and offsets."""

from __future__ import annotations

import pytest
import torch

from sparse_attention import (
    BigBird,
    BlockSparse,
    Causal,
    Csr,
    Dense,
    Dilated,
    Documents,
    LogSparse,
    Longformer,
    MultiScale,
    Predicate,
    Sinks,
    SlidingWindow,
    Tree,
    attention,
    merge,
)
from sparse_attention.layout import layout
from tests.calls import SPARSE, run, same_bits
from tests.cases import block_mask
from tests.oracle import Results, check, expected, inputs


def as_csr(mask):
    """A `[q_len, kv_len]` mask as pairs."""
    return Csr(torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)]), mask.nonzero()[:, 1])


def as_blocks(mask, block):
    """A mask that is made of whole blocks."""
    return BlockSparse(mask[::block, ::block], block)


@pytest.mark.parametrize("impl", SPARSE)
@pytest.mark.parametrize("window", [1, 30, 64, 100])
def test_one_window_written_four_ways(window, impl):
    """As a window, as pairs, as a predicate and as compositions; all of them obey the rule, gradients included."""
    q_len, kv_len = 150, 200
    pattern = SlidingWindow(window)
    x = inputs(pattern.mask(q_len, kv_len, 2), kv_heads=1, head_dim=16)
    want = expected(x)
    first = run(x, pattern, impl)
    for other in (
        as_csr(x.mask[0]),
        Predicate(lambda i, j: (i >= j) & (i - j < window)),
        Dilated(window, 1),
        SlidingWindow(max(window - 1, 1), causal=False) & Causal() & pattern,
        Dense() & pattern,
        pattern | SlidingWindow((window + 1) // 2),
    ):
        assert torch.equal(other.mask(q_len, kv_len), x.mask[0])
        got = run(x, other, impl)
        check(got, want)
        # One split into tiles, one order of sums: not even a rounding differs.
        assert same_bits(got, first), other


@pytest.mark.parametrize("impl", SPARSE)
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_blocks_written_three_ways(block, impl):
    mask = block_mask(-(-200 // block), -(-260 // block), density=0.5, seed=block)
    pattern = BlockSparse(mask, block)
    x = inputs(pattern.mask(200, 260, 2), head_dim=24, dtype=torch.float64)
    first = run(x, pattern, impl)
    check(first, expected(x))
    table = x.mask[0]
    for other in (as_csr(table), Predicate(lambda i, j: table[i - 60, j]), as_blocks(table, 16)):
        assert same_bits(run(x, other, impl), first), other


@pytest.mark.parametrize("impl", SPARSE)
def test_documents_are_separate_calls(impl):
    lengths = (1, 64, 70, 15)
    x = inputs(Documents(lengths).mask(150, 150, 2), kv_heads=1, head_dim=16)
    whole = run(x, Documents(lengths) & Causal(), impl)
    ends = torch.tensor((0,) + lengths).cumsum(0).tolist()
    for first, stop in zip(ends, ends[1:]):
        part = slice(first, stop)
        q, k, v, dout = (y[:, :, part] for y in (x.q, x.k, x.v, x.dout))
        one = run(x._replace(q=q, k=k, v=v, dout=dout, dlse=x.dlse[:, :, part]), Causal(), impl)
        for a, b in zip(whole, one):
            torch.testing.assert_close(a[:, :, part], b, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("impl", SPARSE)
def test_keys_split_in_two_and_merged(impl):
    for whole, near in (
        (Causal(), SlidingWindow(33)),
        (MultiScale(16), Dilated(16, 2)),
        (Longformer(20, 3), Sinks(3)),
        (LogSparse(), SlidingWindow(1)),
    ):
        x = inputs(whole.mask(140, 140, 2), kv_heads=1, head_dim=16)
        far = whole & Predicate(lambda i, j, near=near: ~near.mask(140, 140)[i, j])
        parts = [attention(x.q, x.k, x.v, part, impl=impl, return_lse=True) for part in (near & whole, far)]
        out, lse = merge(*zip(*parts))
        want = expected(x)
        check(run(x, whole, impl)._replace(out=out, lse=lse), want)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dilation", [2, 3, 7])
@pytest.mark.parametrize("impl", SPARSE)
def test_dilation_is_strided_views(impl, dilation, causal):
    """Residue class c is the sequence c, c + dilation, ...: the same bits, where the layout is made of such sequences."""
    window, length = 40, 7 * 77 + 4  # no multiple of a dilation
    x = inputs(Dense().mask(length, length, 2), kv_heads=1, head_dim=16)
    whole = run(x, Dilated(window, dilation, causal), impl)
    for residue in range(dilation):
        part = slice(residue, None, dilation)
        q, k, v, dout = (y[:, :, part] for y in (x.q, x.k, x.v, x.dout))
        one = run(x._replace(q=q, k=k, v=v, dout=dout, dlse=x.dlse[:, :, part]), SlidingWindow(window, causal), impl)
        assert layout(Dilated(window, dilation, causal), length, length, 2).parts[0].stride == dilation
        assert same_bits(Results(*(a[:, :, part] for a in whole)), one)


@pytest.mark.parametrize("impl", SPARSE)
def test_heads_and_batch_are_independent(impl):
    """Each head of each batch entry has the bits that it has alone, whatever its layout and place are."""
    dilations = (2, 1, 3, 2)
    blocks = block_mask(4, 5, 5, density=0.5)
    for pattern, alone in (
        (Dilated(20, dilations), [Dilated(20, d) for d in dilations]),
        (BlockSparse(blocks, 32), [BlockSparse(one, 32) for one in blocks]),
        (SlidingWindow(50), [SlidingWindow(50)] * 4),
        (BigBird(16, seed=5), [BigBird(16, seed=5).for_head(h) for h in range(4)]),
    ):
        x = inputs(pattern.mask(150, 150, 4), batch=3, head_dim=16)
        whole = run(x, pattern, impl)
        for batch in range(3):
            for head in range(4):
                here = slice(batch, batch + 1), slice(head, head + 1)
                one = run(x._replace(**{n: getattr(x, n)[here] for n in ("q", "k", "v", "dout", "dlse")}), alone[head], impl)
                assert same_bits(one, Results(*(part[here] for part in whole)))


@pytest.mark.parametrize("impl", SPARSE)
def test_permuted_heads(impl):
    order = [2, 0, 3, 1]
    dilations = (2, 1, 3, 5)
    x = inputs(Dilated(20, dilations).mask(150, 150, 4), batch=2, head_dim=16)
    whole = run(x, Dilated(20, dilations), impl)
    moved = {n: getattr(x, n)[:, order].flip(0) for n in ("q", "k", "v", "dout", "dlse")}
    got = run(x._replace(**moved), Dilated(20, tuple(dilations[h] for h in order)), impl)
    assert same_bits(got, Results(*(part[:, order].flip(0) for part in whole)))


@pytest.mark.parametrize("impl", SPARSE)
def test_shared_keys_are_repeated_keys(impl):
    pattern = Dilated(20, (2, 1, 3, 5))
    x = inputs(pattern.mask(150, 150, 4), batch=2, kv_heads=2, head_dim=16, dtype=torch.float64)
    shared = run(x, pattern, impl)
    repeated = run(x._replace(k=x.k.repeat_interleave(2, 1), v=x.v.repeat_interleave(2, 1)), pattern, impl)
    assert all(torch.equal(getattr(shared, name), getattr(repeated, name)) for name in ("out", "lse", "dq"))
    for name in ("dk", "dv"):
        summed = getattr(repeated, name).unflatten(1, (2, 2)).sum(2)
        torch.testing.assert_close(getattr(shared, name), summed, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("impl", SPARSE)
def test_one_vector_added_to_all_keys(impl):
    """All scores of a row move by q . c: out stays, and the LSE moves with them."""
    pattern = SlidingWindow(60) | Sinks(4)
    x = inputs(pattern.mask(120, 150, 2), head_dim=16, dtype=torch.float64)
    before = run(x, pattern, impl)
    step = torch.randn(16, dtype=torch.float64)
    after = run(x._replace(k=x.k + step), pattern, impl)
    torch.testing.assert_close(after.out, before.out, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(after.lse, before.lse + x.q @ step * x.factor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", SPARSE)
def test_powers_of_two(impl):
    """Numbers of another size have the same bits: nothing in an engine has a scale of its own."""
    pattern = Dilated(30, 2) | Sinks(4)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = inputs(pattern.mask(120, 150, 2), kv_heads=1, head_dim=16, dtype=dtype, scale=0.25)
        a = run(x, pattern, impl)
        b = run(x._replace(q=x.q * 8, k=x.k / 2, scale=0.25 / 4), pattern, impl)
        assert same_bits(b._replace(dq=b.dq * 8, dk=b.dk / 2), a)
        c = run(x._replace(v=x.v * 4, dlse=x.dlse * 4), pattern, impl)
        assert same_bits(Results(c.out / 4, c.lse, c.dq / 4, c.dk / 4, c.dv), a)
        d = run(x._replace(q=-x.q, scale=-0.25), pattern, impl)
        assert same_bits(d._replace(dq=-d.dq), a)


@pytest.mark.parametrize("impl", SPARSE)
def test_last_queries_alone(impl):
    """Decoding with a cache: the last rows of a long call are a call of few queries."""
    for pattern in (Causal(), SlidingWindow(40), Dilated(15, 3), MultiScale(8), LogSparse(), BigBird(16), Longformer(20, 2)):
        x = inputs(pattern.mask(200, 200, 2), kv_heads=1, head_dim=16)
        whole = run(x, pattern, impl, gradients=False)
        for last in (1, 2, 63, 65, 130):
            got = attention(x.q[:, :, -last:], x.k, x.v, pattern, impl=impl, return_lse=True)
            for a, b in zip(got, whole):
                torch.testing.assert_close(a, b[:, :, -last:], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("impl", SPARSE)
def test_the_future_changes_nothing(impl):
    """Of a causal pattern, the first rows have the bits that they have without the rest."""
    for pattern in (Causal(), SlidingWindow(70), LogSparse(), Sinks(4) & Causal()):
        x = inputs(pattern.mask(200, 200, 2), head_dim=16)
        whole = run(x, pattern, impl, gradients=False)
        for first in (64, 128):
            q, k, v = (y[:, :, :first] for y in (x.q, x.k, x.v))
            got = attention(q, k, v, pattern, impl=impl, return_lse=True)
            assert all(torch.equal(a, b[:, :, :first]) for a, b in zip(got, whole))


@pytest.mark.parametrize("impl", SPARSE)
def test_branches_of_a_tree_are_causal_sequences(impl):
    """Each path from the root to a node, after the prefix, is a plain causal sequence."""
    parents, prefix = (-1, 0, 0, 1, 1, 2, 5, 3, -1, 8), 90
    nodes = len(parents)
    x = inputs(Tree(parents).mask(nodes, prefix + nodes, 2), kv_heads=1, head_dim=16, dtype=torch.float64)
    out, lse = attention(x.q, x.k, x.v, Tree(parents), impl=impl, return_lse=True)
    for node in range(nodes):
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        keys = [*range(prefix), *(prefix + n for n in path)]
        one = attention(x.q[:, :, path], x.k[:, :, keys], x.v[:, :, keys], Causal(), impl=impl, return_lse=True)
        for whole, branch in zip((out, lse), one):
            torch.testing.assert_close(branch, whole[:, :, path], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("impl", SPARSE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_rounded_float32(dtype, impl):
    """Accumulation is in float32: out is the float32 result of the same inputs, rounded once, and the LSE has its bits."""
    for pattern in (SlidingWindow(70), Dilated(20, 3) | Sinks(2), Predicate(lambda i, j: (i + j) % 3 == 0)):
        for head_dim in (8, 40, 64):
            x = inputs(pattern.mask(140, 150, 2), kv_heads=1, head_dim=head_dim, dtype=dtype)
            half = run(x, pattern, impl, gradients=False)
            full = run(x._replace(q=x.q.float(), k=x.k.float(), v=x.v.float()), pattern, impl, gradients=False)
            assert torch.equal(half.lse, full.lse)
            assert torch.equal(half.out, full.out.to(dtype))
