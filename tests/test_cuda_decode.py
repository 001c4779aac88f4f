"""Decoding on a CUDA device: against the reference in float64, NaN past the end, pages, graphs that replay as the cache grows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparse_attention as sa
from sparse_attention import _build_cuda
from sparse_attention.decode import decode
from sparse_attention.eagle import tree_mask

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if torch.cuda.get_device_capability() < (8, 0):
    pytest.skip(f"needs compute capability 8.0, this is {torch.cuda.get_device_capability()}", allow_module_level=True)

pytestmark = pytest.mark.cuda


def tensors(batch, heads, kv_heads, q_len, capacity, head_dim, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = (heads, q_len), (kv_heads, capacity), (kv_heads, capacity)
    return [torch.randn(batch, *shape, head_dim, device="cuda", generator=generator).to(dtype) for shape in shapes]


def random_tree(nodes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parents = [-1] + [int(torch.randint(max(0, n - 8), n, (), generator=generator)) for n in range(1, nodes)]
    return tree_mask(torch.tensor([parents]), "bits").cuda()


def check(q, k, v, lengths, poison=True, **given):
    lengths = torch.tensor(lengths, device="cuda")
    right, right_lse = decode(*(x.double() for x in (q, k, v)), lengths, return_lse=True, impl="reference", **given)
    theirs = decode(q, k, v, lengths, impl="reference", **given)
    if poison and given.get("block_table") is None:
        past = torch.arange(k.shape[2], device="cuda")[None, None, :, None] >= lengths[:, None, None, None]
        k, v = (x.masked_fill(past, torch.nan) for x in (k, v))
    out, lse = decode(q, k, v, lengths, return_lse=True, impl="native", **given)
    # The reference computes in float32 and rounds once; two units in the last place, and the rounding of the weights.
    # float32 is multiplied as three products of TF32, whose sums the tensor cores cut off.
    single = 1e-5 if q.dtype == torch.float32 else 0
    allowed = single + 4 * torch.finfo(q.dtype).eps * right.abs().amax(-1, keepdim=True) + 2 * (theirs.double() - right).abs().amax(-1, keepdim=True)
    assert ((out.double() - right).abs() <= allowed).all(), float((out.double() - right).abs().max())
    assert torch.equal(lse == -torch.inf, right_lse == -torch.inf)
    assert (lse.double() - right_lse).nan_to_num(0.0, 0.0, 0.0).abs().max() < 1e-3
    return out


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("head_dim", (8, 64, 72, 128, 192, 256))
@pytest.mark.parametrize("nodes", (1, 26, 60, 200))
def test_trees_after_a_prefix(nodes, head_dim, dtype):
    q, k, v = tensors(2, 8, 2, nodes, 3000, head_dim, dtype)
    for lengths in ([nodes, nodes + 1], [nodes + 2048, 3000], [128, 129 + nodes]):
        check(q, k, v, lengths, ancestors=random_tree(nodes))
        check(q, k, v, lengths)


@pytest.mark.parametrize("heads, kv_heads", ((1, 1), (32, 32), (32, 8), (64, 2), (7, 1)))
def test_groups(heads, kv_heads):
    q, k, v = tensors(3, heads, kv_heads, 5, 1000, 128)
    check(q, k, v, [1000, 5, 700])
    check(q, k, v, [3, 0, 777])


def test_a_thousand_nodes():
    q, k, v = tensors(1, 4, 1, 1000, 1500, 128)
    for length in (1000, 1437):
        check(q, k, v, [length], ancestors=random_tree(1000))


@pytest.mark.parametrize("window, sinks", ((1, 0), (100, 4), (4096, 0), (700, 300)))
def test_windows(window, sinks):
    q, k, v = tensors(2, 8, 2, 1, 9000, 128)
    check(q, k, v, [9000, 4100], window=window, sinks=sinks)
    q, k, v = tensors(2, 8, 2, 26, 9000, 128)
    check(q, k, v, [9000, 90], window=window, sinks=sinks)
    if window >= 26:
        check(q, k, v, [8000, 90], window=window, sinks=sinks, ancestors=random_tree(26))


@pytest.mark.parametrize("page", (16, 32, 64, 128, 256))
def test_pages(page):
    q, k, v = tensors(2, 8, 2, 13, 2048, 128)
    width = 2048 // page
    table = torch.randperm(2 * width + 5, device="cuda")[: 2 * width].view(2, width)
    paged = [torch.full((2 * width + 5, 2, page, 128), torch.nan, device="cuda", dtype=q.dtype) for _ in range(2)]
    for to, x in zip(paged, (k, v)):
        for request in range(2):
            to[table[request]] = x[request].unflatten(1, (width, page)).transpose(0, 1)
    lengths = torch.tensor([2048, 333], device="cuda")
    for given in ({}, {"ancestors": random_tree(13)}, {"window": 100}):
        want = decode(q, k, v, lengths, impl="native", **given)
        for kind in (table, table.int()):
            assert torch.equal(decode(q, *paged, lengths, block_table=kind, impl="native", **given), want)


def test_a_strided_cache_is_read_in_place():
    cache = torch.randn(2, 4096, 2, 4, 64, device="cuda").bfloat16()  # [batch, capacity, (k, v), kv_heads, head_dim]
    k, v = (cache[:, :, n].transpose(1, 2) for n in range(2))
    q = tensors(2, 8, 4, 4, 1, 64)[0]
    check(q, k, v, [4096, 1000])
    one = decode(q, k, v, torch.tensor([900, 1000], device="cuda"))
    assert torch.equal(one, decode(q, k.contiguous(), v.contiguous(), torch.tensor([900, 1000], device="cuda")))


def test_a_graph_replays_as_the_cache_grows():
    q, k, v = tensors(2, 8, 2, 26, 4096, 128)
    lengths, ancestors = torch.tensor([26, 1000], device="cuda"), random_tree(26)
    decode(q, k, v, lengths, ancestors=ancestors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode(q, k, v, lengths, ancestors=ancestors)
    for step, seed in ((0, 1), (17, 2), (3000, 3)):
        lengths += step
        ancestors.copy_(random_tree(26, seed))
        graph.replay()
        assert torch.equal(out, decode(q, k, v, lengths, ancestors=ancestors))
        check(q, k, v, lengths.tolist(), ancestors=ancestors)


def test_repeats_are_bit_equal_and_nothing_waits():
    q, k, v = tensors(1, 32, 8, 26, 8192, 128)
    lengths, ancestors = torch.tensor([8000], device="cuda"), random_tree(26)
    first = decode(q, k, v, lengths, ancestors=ancestors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        outs = [decode(q, k, v, lengths, ancestors=ancestors) for _ in range(300)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(first, out) for out in outs)


def test_gradients_through_attention():
    gradients = []
    for impl in ("auto", "reference"):
        x = [t.requires_grad_() for t in tensors(1, 8, 2, 3, 300, 64)]
        out = sa.attention(*x, sa.Causal(), impl=impl)
        gradients.append(torch.autograd.grad(out, x, torch.ones_like(out)))
    for found, want in zip(*gradients):
        torch.testing.assert_close(found, want)


KERNELS = {"narrow": 0, "wide": 1, "many": 2, "warpgroups": 3, "warpgroup": 4}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("splits", (1, 2, 3, 8, 16, 40))
def test_every_kernel_with_any_number_of_splits(kernel, splits):
    capability = torch.cuda.get_device_capability()
    if kernel.startswith("warpgroup") and capability != (9, 0):
        pytest.skip("compute capability 9.0 only")
    native = _build_cuda.kernels(capability)
    q, k, v = tensors(2, 8, 2, 100, 6000, 128)
    words = random_tree(100)
    for given, window, sinks in ((words, -1, 0), (None, -1, 0), (words, 3000, 5), (words, 3, 1)):
        for lengths in ([6000, 100], [3333, 0]):
            lengths = torch.tensor(lengths, device="cuda")
            want, want_lse = decode(
                *(x.double() for x in (q, k, v)), lengths, ancestors=given, window=None if window < 0 else window, sinks=sinks,
                return_lse=True, impl="reference",
            )  # fmt: skip
            out, lse = native.decode_forward(q, k, v, lengths, 0, given, window, sinks, None, 128**-0.5, True, KERNELS[kernel], splits)
            assert (out.double() - want).abs().max() < 0.03 and torch.equal(lse == -torch.inf, want_lse == -torch.inf)
            assert (lse.double() - want_lse).nan_to_num(0.0, 0.0, 0.0).abs().max() < 1e-3
            again = native.decode_forward(q, k, v, lengths, 0, given, window, sinks, None, 128**-0.5, False, KERNELS[kernel], splits)
            assert torch.equal(out, again[0]) and again[1] is None


@pytest.mark.parametrize("nodes, splits", ((33, 1), (50, 2), (64, 8), (64, 16)))
def test_two_tiles_of_rows_bring_each_other_keys(nodes, splits):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("compute capability 9.0 only")
    native, scale, warpgroups = _build_cuda.kernels((9, 0)), 128**-0.5, KERNELS["warpgroups"]
    q, k, v = tensors(2, 8, 2, nodes, 6144, 128)
    words = random_tree(nodes).clone()
    words[0, 20] = 0  # no node
    pages = [x.unflatten(2, (96, 64)).transpose(1, 2).flatten(0, 1) for x in (k, v)]
    table = torch.arange(192, device="cuda", dtype=torch.int32).view(2, 96)
    for given, window, sinks in ((words, -1, 0), (None, -1, 0), (None, 3000, 5)):
        for lengths in ([6144, nodes], [3333, 0]):
            lengths = torch.tensor(lengths, device="cuda")
            past = torch.arange(6144, device="cuda")[None, None, :, None] >= lengths[:, None, None, None]
            spoiled = [x.masked_fill(past, torch.nan) for x in (k, v)]
            want, want_lse = decode(
                *(x.double() for x in (q, k, v)), lengths, ancestors=given, window=None if window < 0 else window, sinks=sinks,
                return_lse=True, impl="reference",
            )  # fmt: skip
            for (a, b), at in ((spoiled, None), (pages, table)):
                out, lse = native.decode_forward(q, a, b, lengths, 0, given, window, sinks, at, scale, True, warpgroups, splits)
                assert (out.double() - want).abs().max() < 0.03 and torch.equal(lse == -torch.inf, want_lse == -torch.inf)
                assert (lse.double() - want_lse).nan_to_num(0.0, 0.0, 0.0).abs().max() < 1e-3
                for _ in range(30):
                    assert torch.equal(out, native.decode_forward(q, a, b, lengths, 0, given, window, sinks, at, scale, False, warpgroups, splits)[0])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_one_number_of_keys_for_all(dtype):
    q, k, v = tensors(2, 8, 2, 5, 900, 128, dtype)
    for given in ({}, {"impl": "native"}):
        for length in (400, 899):  # the first is cut into other splits than the capacity is, the last is not: test_cuda_decode_limits.py
            one, each = (decode(q, k, v, keys, **given) for keys in (length, torch.full((2,), length, device="cuda")))
            # Both calls round each weight once, relative to maxima of their own, and the output once, to within eps / 2.
            right, sizes = (decode(q.double(), k.double(), x, length, impl="reference") for x in (v.double(), v.double().abs()))
            cut_off = 2e-5 if dtype == torch.float32 else 0  # `single` of both, as in `check`
            allowed = torch.finfo(dtype).eps * (right.abs() + sizes) + cut_off
            assert ((one.double() - each.double()).abs() <= allowed).all(), float((one.double() - each.double()).abs().max())
        assert torch.equal(one, each)
    with pytest.raises(ValueError, match="lengths is 901"):
        decode(q, k, v, 901)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("pattern, q_len, kv_len", [
    (sa.Causal(), 1, 4000), (sa.SlidingWindow(100) | sa.Sinks(4), 7, 3000), (sa.Tree((-1, 0, 0, 1, 2, 2)), 6, 6), (sa.Tree((-1, 0, 0, 1)), 4, 900),
], ids=str)  # fmt: skip
def test_attention_runs_few_queries_here(pattern, q_len, kv_len, dtype):
    q, k, v = tensors(2, 8, 2, q_len, kv_len, 128, dtype)
    assert sa.plan(q, k, v, pattern).impl == "decode"
    out, lse = sa.attention(q, k, v, pattern, return_lse=True)
    right, right_lse = sa.attention(*(x.double() for x in (q, k, v)), pattern, impl="reference", return_lse=True)
    if dtype == torch.float32:
        assert_within_twice(q, k, v, pattern, out, right)
    assert (out.double() - right).abs().max() < 0.03 and (lse.double() - right_lse).abs().max() < 1e-3
    odd = torch.empty(2, 2, kv_len, 129, device="cuda", dtype=dtype)[..., 1:]  # rows that begin anywhere
    assert torch.equal(sa.attention(q, odd.copy_(k), v, pattern), out)


def assert_within_twice(q, k, v, pattern, out, right):
    """Errors of a float32 output at most twice those of PyTorch's matmuls, TF32 off: all together (root mean square), and the worst."""
    assert not torch.backends.cuda.matmul.allow_tf32
    mask = pattern.mask(q.shape[2], k.shape[2], q.shape[1]).cuda()
    with sdpa_kernel(SDPBackend.MATH):
        theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    error, allowed = ((x.double() - right).abs() for x in (out, theirs))
    unit = torch.finfo(torch.float32).eps * right.abs()
    assert error.square().mean().sqrt() <= max(2 * allowed.square().mean().sqrt(), unit.square().mean().sqrt() / 2)
    assert (error <= 2 * allowed.max() + 4 * unit).all(), f"off by {float(error.max()):.2e} where PyTorch is by {float(allowed.max()):.2e}"


def test_the_tree_is_the_pattern():
    q, k, v = tensors(1, 8, 2, 26, 1050, 128)
    parents = [-1] + [max(0, n - 1 - n % 3) for n in range(1, 26)]
    want = sa.attention(q, k, v, sa.Tree(tuple(parents)), impl="tile")
    got = decode(q, k, v, 1050, parents=torch.tensor(parents, device="cuda"))
    assert (got.double() - want.double()).abs().max() < 0.02


@pytest.mark.parametrize("window, sinks", ((1, 0), (3, 0), (5, 2), (4, 12)))
def test_a_window_of_less_than_a_tree(window, sinks):
    q, k, v = tensors(2, 8, 2, 60, 400, 128)
    check(q, k, v, [400, 61], ancestors=random_tree(60), window=window, sinks=sinks)


def test_what_the_kernels_do_not_take():
    q, k, v = tensors(1, 8, 2, 26, 300, 128)
    with pytest.raises(ValueError, match="float64 and the CUDA kernels take"):
        decode(q.double(), k.double(), v.double(), 300, impl="native")
    assert torch.isfinite(decode(q.double(), k.double(), v.double(), 300)).all()
    odd = torch.zeros(1, 2, 300, 130, device="cuda", dtype=q.dtype)[..., :128]
    with pytest.raises(ValueError, match="k_cache has strides .* no multiples of 16 bytes"):
        decode(q, odd, v, 300, impl="native")
    with pytest.raises(ValueError, match="q requires a gradient"):
        decode(q.requires_grad_(), k, v, 300)
