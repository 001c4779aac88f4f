"""decode: against attention in float64, branch by branch, over strided and paged caches, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attention import Causal, Sinks, SlidingWindow, Tree, attention, decode, eagle

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-12}
IMPLS = ("native", "reference")


def tensors(batch, heads, kv_heads, q_len, capacity, dim, dtype=torch.float32, seed=0):
    """q and the caches, normal."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, q_len, dim)] + 2 * [(batch, kv_heads, capacity, dim)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def parents_of(kind, nodes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = [int(torch.randint(-1, n, (), generator=generator)) if n else -1 for n in range(nodes)]
    return {"chain": list(range(-1, nodes - 1)), "star": [-1] + [0] * (nodes - 1), "random": drawn}[kind]


def poison(cache, lengths):
    """NaN beyond each request's keys."""
    for row, length in zip(cache, lengths):
        row[:, length:] = torch.nan
    return cache


def exact(q, k, v, pattern, scale=None):
    return attention(q.double(), k.double(), v.double(), pattern, scale=scale, impl="reference", return_lse=True)


def check(found, expected, dtype):
    out, lse = found
    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(out.double(), expected[0], atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])
    torch.testing.assert_close(lse.double(), expected[1], atol=1e-5, rtol=1e-5)


def same(first, second):
    return all(torch.equal(a.view(torch.int8), b.view(torch.int8)) for a, b in zip(first, second))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, kv_heads, nodes", [(4, 4, 1), (8, 2, 1), (8, 2, 2), (4, 1, 7), (8, 2, 26), (4, 4, 70), (12, 3, 60)])
def test_trees_of_one_size(heads, kv_heads, nodes, dtype, impl):
    for dim, prefix, kind in ((8, 0, "random"), (64, 5, "star"), (128, 64, "random"), (72, 200, "chain")):
        q, k, v = tensors(2, heads, kv_heads, nodes, prefix + nodes + 3, dim, dtype)
        length = prefix + nodes
        parents = parents_of(kind, nodes)
        found = decode(
            q, poison(k, [length] * 2), poison(v, [length] * 2), length, parents=torch.tensor(parents), return_lse=True, impl=impl
        )
        check(found, exact(q, k[:, :, :length], v[:, :, :length], Tree(tuple(parents))), dtype)


@pytest.mark.parametrize("dim", [16, 120, 136, 256])
def test_head_dims(dim):
    for dtype in DTYPES:
        for nodes in (1, 30):
            q, k, v = tensors(1, 4, 2, nodes, 90, dim, dtype)
            check(decode(q, k, v, 90, return_lse=True), exact(q, k, v, Causal()), dtype)


@pytest.mark.parametrize("nodes", [127, 128, 129, 300])
def test_large_trees(nodes):
    """More nodes than a word, a tile and a vector hold."""
    q, k, v = tensors(1, 4, 2, nodes, 40 + nodes, 16)
    parents = parents_of("random", nodes)
    check(decode(q, k, v, 40 + nodes, parents=torch.tensor(parents), return_lse=True), exact(q, k, v, Tree(tuple(parents))), torch.float32)


@pytest.mark.parametrize("q_len", [1, 3, 40])
def test_long_caches_are_split_over_keys(q_len):
    """Several items of keys for each tile, merged."""
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = tensors(2, 4, 2, q_len, 5000, 32, dtype)
        lengths = torch.tensor([5000, 2900])
        out, lse = decode(q, k, v, lengths, return_lse=True)
        for b, length in enumerate(lengths.tolist()):
            want = exact(q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length], Causal())
            check((out[b : b + 1], lse[b : b + 1]), want, dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_branches_are_causal_sequences(impl):
    """A node's row is the last one of causal attention over the prefix and its own branch (vLLM's test of tree attention)."""
    prefix, nodes = 100, 26
    parents = parents_of("random", nodes)
    q, k, v = tensors(1, 8, 2, nodes, prefix + nodes, 64)
    for pattern, cut in ((Causal(), {}), ((SlidingWindow(4) | Sinks(3)) & Causal(), {"window": 4, "sinks": 3})):
        out, lse = decode(q, k, v, prefix + nodes, parents=torch.tensor(parents), return_lse=True, impl=impl, **cut)
        for node in range(nodes):
            branch, at = [node], parents[node]
            while at >= 0:
                branch, at = [at, *branch], parents[at]
            rows = torch.tensor([*range(prefix), *(prefix + n for n in branch)])
            want = exact(q[:, :, [node]], k[:, :, rows], v[:, :, rows], pattern)
            check((out[:, :, [node]], lse[:, :, [node]]), want, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("window, sinks", [(1, 0), (5, 2), (64, 0), (70, 100), (1000, 3)])
def test_windows_of_chunks(window, sinks, impl):
    pattern = (SlidingWindow(window) | Sinks(sinks)) & Causal() if sinks else SlidingWindow(window)
    for q_len in (1, 9, 80):
        q, k, v = tensors(1, 4, 2, q_len, 300, 16)
        check(decode(q, k, v, 300, window=window, sinks=sinks, return_lse=True, impl=impl), exact(q, k, v, pattern), torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
def test_keys_outside_the_window_are_not_looked_at(impl):
    q, k, v = tensors(1, 4, 2, 3, 300, 16)
    want = decode(q, k, v, 300, window=20, sinks=5)
    for cache in (k, v):
        cache[:, :, 5:278] = torch.nan
    assert torch.equal(decode(q, k, v, 300, window=20, sinks=5, impl=impl).isnan().any(), torch.tensor(False))
    torch.testing.assert_close(decode(q, k, v, 300, window=20, sinks=5, impl=impl), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_trees_of_different_sizes(impl):
    """Missing nodes give 0, and their keys may hold anything; a batch of prefixes, one request idle."""
    sizes, prefixes, most = (5, 26, 1, 0), (40, 0, 300, 0), 26
    parents = torch.full((4, most), -2)
    q, k, v = tensors(4, 8, 2, most, 400, 64)
    for b, (size, prefix) in enumerate(zip(sizes, prefixes)):
        parents[b, :size] = torch.tensor(parents_of("random", size, b), dtype=torch.int64)
        q[b, :, size:] = torch.nan
        for cache in (k, v):
            cache[b, :, prefix + size :] = torch.nan
    lengths = torch.tensor(prefixes) + most
    lengths[3] = 0
    found = decode(q, k, v, lengths, parents=parents, return_lse=True, impl=impl)
    words = eagle.tree_mask(parents.clamp(min=-1), "bits") * (parents > -2)[:, :, None]
    assert same(decode(q, k, v, lengths, ancestors=words, return_lse=True, impl=impl), found)
    out, lse = found
    for b, (size, prefix) in enumerate(zip(sizes, prefixes)):
        assert not out[b, :, size:].any() and (lse[b, :, size:] == -torch.inf).all()
        if size:
            rows = (slice(b, b + 1), slice(None), slice(prefix + size))
            want = exact(q[b : b + 1, :, :size], k[rows], v[rows], Tree(tuple(parents[b, :size].tolist())))
            check((out[b : b + 1, :, :size], lse[b : b + 1, :, :size]), want, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
def test_short_requests_stand_at_the_end_of_a_chunk(impl):
    q, k, v = tensors(2, 4, 2, 6, 20, 16)
    out, lse = decode(q, poison(k, [20, 2]), poison(v, [20, 2]), torch.tensor([20, 2]), return_lse=True, impl=impl)
    assert not out[1, :, :4].any() and (lse[1, :, :4] == -torch.inf).all()
    check((out[1:, :, 4:], lse[1:, :, 4:]), exact(q[1:, :, 4:], k[1:, :, :2], v[1:, :, :2], Causal()), torch.float32)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("q_len", [1, 20])
def test_strides(q_len, dtype):
    """A slice of a preallocated cache, one that interleaves heads or K and V, and a q of transposed heads, all where they lie."""
    q, k, v = tensors(2, 8, 2, q_len, 150, 24, dtype)
    want = decode(q, k, v, 150, return_lse=True)
    wide = [torch.full((2, 400, 2, 40), torch.nan, dtype=dtype) for _ in range(2)]
    views = [x.transpose(1, 2)[:, :, 7:157, 9:33] for x in wide]
    both = torch.stack([k, v], dim=3)
    for view, cache in zip(views, (k, v)):
        view.copy_(cache)
    q_turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    for caches in (views, both.unbind(3), [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]):
        assert same(decode(q_turned, *caches, 150, return_lse=True), want)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("page", [16, 32, 64, 128, 256])
def test_pages(page, impl):
    """Shuffled pages of any strides hold what a plain cache holds; table entries past a request's end may be anything."""
    q, k, v = tensors(3, 8, 2, 7, 4 * page, 16)
    lengths = torch.tensor([4 * page, page + 9, 7])
    table = torch.randperm(15, generator=torch.Generator().manual_seed(page))[:12].view(3, 4)
    pages = [torch.full((15, page, 2, 16), torch.nan).transpose(1, 2) for _ in range(2)]
    for b, length in enumerate(lengths.tolist()):
        for row in range(length):
            for cache, plain in zip(pages, (k, v)):
                cache[table[b, row // page], :, row % page] = plain[b, :, row]
    table[1, 2:], table[2, 1:] = -1, 99
    parents = torch.tensor(parents_of("random", 7))
    for tree in ({}, {"parents": parents}, {"window": 20, "sinks": 3}):
        want = decode(q, k, v, lengths, return_lse=True, impl=impl, **tree)
        for kind in (torch.int32, torch.int64):
            assert same(decode(q, *pages, lengths, block_table=table.to(kind), return_lse=True, impl=impl, **tree), want)


@pytest.mark.parametrize("scale", [0.3, -0.2, 0.0, 1e-12])
def test_scales(scale):
    for dtype in DTYPES:
        q, k, v = tensors(1, 4, 2, 20, 80, 32, dtype)
        check(decode(q, k, v, 80, scale=scale, return_lse=True), exact(q, k, v, Causal(), scale), dtype)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_engine_is_the_reference(data):
    """Any words, closed under ancestors or not, any window, sinks, lengths and pages."""
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (2, 3), (1, 5)]))
    q_len, dim = data.draw(st.integers(1, 70)), data.draw(st.sampled_from([8, 24]))
    page = data.draw(st.sampled_from([None, 16, 64]))
    capacity = 3 * page if page else data.draw(st.integers(1, 300))
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, capacity), min_size=2, max_size=2)))
    seed = data.draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    q, k, v = tensors(2, kv_heads * group, kv_heads, q_len, capacity, dim, seed=seed)
    arguments = {"window": data.draw(st.none() | st.integers(1, 80)), "sinks": data.draw(st.integers(0, 90)), "return_lse": True}
    if data.draw(st.booleans()):
        seen = torch.rand(data.draw(st.integers(1, 2)), q_len, (q_len + 63) // 64 * 64, generator=generator) < 0.3
        arguments["ancestors"] = (seen.unflatten(2, (-1, 64)).long() << torch.arange(64)).sum(-1)
    if page:
        k, v = (x.unflatten(2, (3, page)).transpose(1, 2).flatten(0, 1) for x in (k, v))
        arguments["block_table"] = torch.arange(6).view(2, 3)
    (out, lse), (want, want_lse) = (decode(q, k, v, lengths, impl=impl, **arguments) for impl in IMPLS)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("q_len", [1, 2, 26])
def test_equal_bits_on_repeat_and_for_any_number_of_threads(q_len):
    parents = torch.tensor(parents_of("random", q_len))
    before = torch.get_num_threads()
    try:
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = tensors(2, 8, 2, q_len, 3000, 64, dtype)
            lengths = torch.tensor([3000, 1700])
            found = []
            for threads in (1, 2, 5, 2, 1):
                torch.set_num_threads(threads)
                found.append(decode(q, k, v, lengths, parents=parents, return_lse=True))
            assert all(same(again, found[0]) for again in found)
    finally:
        torch.set_num_threads(before)


def test_a_request_does_not_depend_on_its_neighbours():
    q, k, v = tensors(3, 8, 2, 5, 200, 64)
    lengths = torch.tensor([200, 60, 5])
    together = decode(q, k, v, lengths)
    for b in range(3):
        assert torch.equal(decode(q[b : b + 1], k[b : b + 1], v[b : b + 1], lengths[b : b + 1]), together[b : b + 1])


def test_nan_and_infinity_reach_those_who_see_them():
    q, k, v = tensors(1, 4, 2, 20, 100, 16)
    v[0, 1, 90] = torch.nan
    nans = decode(q, k, v, 100).isnan().any(-1)
    assert not nans[0, :2].any() and nans[0, 2:, 10:].all()


MALFORMED = [
    ({"lengths": torch.tensor([51, 20])}, r"lengths\[0\] is 51; expected 0 to 50"),
    ({"lengths": torch.tensor([50, -1])}, r"lengths\[1\] is -1; expected 0 to 50"),
    ({"lengths": 51}, "lengths is 51; expected an integer from 0 to 50"),
    ({"lengths": torch.tensor([50.0, 20.0])}, "lengths has dtype torch.float32; expected torch.int64"),
    ({"lengths": torch.tensor([50])}, r"lengths has shape \(1,\); expected \[2\]"),
    ({"parents": torch.tensor([-1, 0, 2, 0])}, r"parents\[0, 2\] is 2; expected a node from -1 to 1"),
    ({"parents": torch.tensor([-1, 0, -3, 0])}, r"parents\[0, 2\] is -3; expected a node, -1 for a root or -2 for no node"),
    ({"parents": torch.tensor([-1, -2, 1, 0])}, r"parents\[0, 2\] is 1; expected a node that is there"),
    ({"parents": torch.tensor([-1, 0, 0])}, r"parents has shape \(3,\); expected \[4\]"),
    ({"parents": [-1, 0, 0, 0]}, "parents is .*; expected a tensor"),
    ({"ancestors": torch.ones(3, 4, 1, dtype=torch.int64)}, r"ancestors has shape \(3, 4, 1\); expected \[2, 4, 1\]"),
    ({"ancestors": torch.ones(1, 4, 1)}, "ancestors has dtype torch.float32"),
    ({"ancestors": torch.ones(1, 4, 1, dtype=torch.int64), "parents": torch.tensor([-1, 0, 0, 0])}, "parents and ancestors are both given"),
    ({"window": 0}, "window is 0; expected an integer of at least 1"),
    ({"sinks": -1}, "sinks is -1; expected an integer of at least 0"),
    ({"scale": float("nan")}, "scale is nan; expected a finite number"),
    ({"impl": "fast"}, "impl is 'fast'; expected one of"),
    ({"block_table": torch.zeros(2, 4, dtype=torch.int64)}, "pages of 50 rows; expected one of 16, 32, 64, 128, 256"),
    ({"q": torch.randn(2, 3, 4, 16)}, "k_cache has shape .* 2 heads; expected a divisor of q's 3 heads"),
    ({"q": torch.randn(2, 4, 4, 24)}, r"k_cache has shape .*; expected \[2, \*, \*, 24\]"),
    ({"q": torch.randn(2, 4, 4, 16, requires_grad=True)}, r"q requires a gradient; expected none.*attention\(\)"),
    ({"q": torch.randn(2, 4, 16, 4).mT}, "q has strides .*; expected a contiguous last dimension"),
    ({"k_cache": torch.randn(2, 2, 16, 50).mT}, "k_cache has strides .*; expected a contiguous last dimension"),
    ({"k_cache": torch.randn(2, 2, 50, 16).half()}, "k_cache has dtype torch.float16; expected torch.float32"),
    ({"v_cache": torch.randn(2, 2, 49, 16)}, r"v_cache has shape \(2, 2, 49, 16\); expected \[2, 2, 50, 16\]"),
    ({"v_cache": None}, "v_cache is None; expected a tensor"),
]


@pytest.mark.parametrize("changed, message", MALFORMED, ids=[message[:40] for _, message in MALFORMED])
def test_malformed_input(changed, message):
    arguments = {"q": torch.randn(2, 4, 4, 16), "k_cache": torch.randn(2, 2, 50, 16), "v_cache": torch.randn(2, 2, 50, 16), "lengths": 50}
    with pytest.raises(ValueError, match=message):
        decode(**{**arguments, **changed})


def test_malformed_pages():
    q, (k, v) = torch.randn(2, 4, 4, 16), torch.randn(2, 5, 2, 16, 16)
    table = torch.tensor([[0, 5], [1, -1]])
    for impl in IMPLS:
        with pytest.raises(ValueError, match=r"block_table\[0, 1\] is 5; expected a page from 0 to 4"):
            decode(q, k, v, 20, block_table=table, impl=impl)
        with pytest.raises(ValueError, match=r"block_table\[1, 1\] is -1"):
            decode(q, k, v, torch.tensor([16, 17]), block_table=table, impl=impl)
        with pytest.raises(ValueError, match=r"lengths\[0\] is 33; expected 0 to 32"):
            decode(q, k, v, torch.tensor([33, 16]), block_table=table, impl=impl)


def test_a_tree_has_at_most_1024_nodes():
    q, k, v = tensors(1, 1, 1, 1025, 1025, 8)
    with pytest.raises(ValueError, match="1025 nodes; expected a tree of at most 1024"):
        decode(q, k, v, 1025, parents=torch.arange(1025) - 1)
    check(decode(q, k, v, 1025, return_lse=True), exact(q, k, v, Causal()), torch.float32)


def test_head_dim_of_no_engine_runs_on_the_reference():
    q, k, v = tensors(1, 2, 1, 3, 30, 12)
    check(decode(q, k, v, 30, return_lse=True), exact(q, k, v, Causal()), torch.float32)
    with pytest.raises(ValueError, match="impl is 'native', but q has head_dim 12"):
        decode(q, k, v, 30, impl="native")


def test_the_engine_checks_what_it_is_told():
    """A raw call cannot read outside a cache either."""
    from sparse_attention._build import kernels

    q, k, v = tensors(1, 4, 2, 3, 32, 16)
    forward, length = kernels().decode_forward, torch.tensor([32])
    for arguments, message in (
        ((q, k, v, length + 1, None, -1, 0, None, 1.0), r"lengths\[0\] is 33"),
        ((q, k, v, length, torch.zeros(1, 3, 2, dtype=torch.int64), -1, 0, None, 1.0), "ancestors has shape"),
        ((q, k, v, length, None, -1, 0, torch.tensor([[1]], dtype=torch.int32), 1.0), r"block_table\[0, 0\] is 1; expected a page"),
        ((q, k, v[:, :, :31], length, None, -1, 0, None, 1.0), "the caches must have one shape"),
        ((q, k, v, length, None, 0, 0, None, 1.0), "window is 0"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            forward(*arguments)
