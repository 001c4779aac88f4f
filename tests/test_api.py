"""What users call: meaning, every wrong input, queries without keys, merging, LongNet."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sparse_attention as sa
from sparse_attention import dispatch, engines

ENGINES = ["tile", "gather", "dense", "reference"]


def tensors(q=(2, 4, 20, 16), k=(2, 2, 20, 16), v=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in (q, k, v or k)]


Q, K, V = tensors()
WINDOW = sa.SlidingWindow(4)


# What is wrong: (a call, what the message must say).
WRONG = {
    "q is a list": (lambda: sa.attention([[1.0]], K, V, WINDOW), r"q is \[\[1.0\]\]; expected a tensor"),
    "k is None": (lambda: sa.attention(Q, None, V, WINDOW), "k is None; expected a tensor"),
    "v is an array": (lambda: sa.attention(Q, K, V.numpy(), WINDOW), "v is array.*expected a tensor"),
    "q without batch": (lambda: sa.attention(Q[0], K, V, WINDOW), r"q has shape \(4, 20, 16\); expected \[batch, heads, q_len"),
    "v of rank 5": (lambda: sa.attention(Q, K, V[None], WINDOW), r"v has shape \(1, 2, 2, 20, 16\); expected \[batch, kv_heads"),
    "no queries": (lambda: sa.attention(Q[:, :, :0], K, V, WINDOW), r"q has shape \(2, 4, 0, 16\).*none of them 0"),
    "no keys": (lambda: sa.attention(Q, K[:, :, :0], V[:, :, :0], WINDOW), r"k has shape \(2, 2, 0, 16\).*none of them 0"),
    "batch": (lambda: sa.attention(Q, K[:1], V[:1], WINDOW), r"k has shape \(1, 2, 20, 16\), batch 1; expected 2"),
    "head_dim": (lambda: sa.attention(Q, K[..., :8], V[..., :8], WINDOW), "k has shape .*, head_dim 8; expected 16"),
    "head_dim of v": (lambda: sa.attention(Q, K, V[..., :8], WINDOW), "v has shape .*, head_dim 8; expected 16"),
    "length of v": (lambda: sa.attention(Q, K, V[:, :, :9], WINDOW), r"v has shape \(2, 2, 9, 16\); expected \(2, 2, 20, 16\)"),
    "heads not divisible": (lambda: sa.attention(Q[:, :3], K, V, WINDOW), r"k has shape .*, 2 heads; expected a divisor of q's 3"),
    "more kv heads": (lambda: sa.attention(Q[:, :1], K, V, WINDOW), "k has shape .*, 2 heads; expected a divisor of q's 1"),
    "mixed dtypes": (lambda: sa.attention(Q, K.double(), V, WINDOW), "k has dtype torch.float64; expected torch.float32"),
    "integers": (lambda: sa.attention(Q.long(), K.long(), V.long(), WINDOW), "q has dtype torch.int64; expected torch.float32"),
    "complex": (lambda: sa.attention(*(x.cfloat() for x in (Q, K, V)), WINDOW), "q has dtype torch.complex64; expected"),
    "mixed devices": (lambda: sa.attention(Q, K, V.to("meta"), WINDOW), "v is on meta; expected cpu"),
    "sparse tensor": (lambda: sa.attention(Q.to_sparse(), K, V, WINDOW), "q has layout torch.sparse_coo; expected a strided"),
    "strides of q": (lambda: sa.attention(Q.mT.contiguous().mT, K, V, WINDOW), r"q has strides \(.*\); expected a contiguous last"),
    "strides of v": (lambda: sa.attention(Q, K, V.mT.contiguous().mT, WINDOW), r"v has strides \(.*\); expected a contiguous last"),
    "expanded v": (lambda: sa.attention(Q, K, V[..., :1].expand_as(V), WINDOW), r"v has strides .*; expected a contiguous last"),
    "pattern is a mask": (lambda: sa.attention(Q, K, V, torch.ones(20, 20).bool()), "pattern is a torch.bool tensor.*BlockSparse"),
    "pattern is a class": (lambda: sa.attention(Q, K, V, sa.Causal), "pattern is <class .*; expected a Pattern, such as"),
    "pattern is a list": (lambda: sa.attention(Q, K, V, [sa.Causal()]), r"pattern is \[Causal\(\)\]; expected a Pattern"),
    "pattern is None": (lambda: sa.attention(Q, K, V, None), "pattern is None; expected a Pattern"),
    "pattern is a text": (lambda: sa.attention(Q, K, V, "causal"), "pattern is 'causal'; expected a Pattern"),
    "unknown impl": (lambda: sa.attention(Q, K, V, WINDOW, impl="cuda"), "impl is 'cuda'; expected one of auto, tile, gather"),
    "impl is None": (lambda: sa.attention(Q, K, V, WINDOW, impl=None), "impl is None; expected one of auto"),
    "impl is a list": (lambda: sa.attention(Q, K, V, WINDOW, impl=["tile"]), r"impl is \['tile'\]; expected one of auto"),
    "NaN scale": (lambda: sa.attention(Q, K, V, WINDOW, scale=math.nan), "scale is nan; expected a finite number"),
    "infinite scale": (lambda: sa.attention(Q, K, V, WINDOW, scale=-math.inf), "scale is -inf; expected a finite number"),
    "scale is a text": (lambda: sa.attention(Q, K, V, WINDOW, scale="0.1"), "scale is '0.1'; expected a finite number"),
    "scale is a tensor": (lambda: sa.attention(Q, K, V, WINDOW, scale=torch.tensor(0.1)), "scale is a torch.float32 tensor"),
    "scale is True": (lambda: sa.attention(Q, K, V, WINDOW, scale=True), "scale is True; expected a finite number"),
    "head_dim 12 by tile": (
        lambda: sa.attention(Q[..., :12], K[..., :12], V[..., :12], WINDOW, impl="tile"),
        "impl is 'tile', but head_dim is 12 and the sparse engines take multiples of 8 from 8 to 256",
    ),
    "head_dim 264 by gather": (
        lambda: sa.attention(*tensors((1, 1, 9, 264), (1, 1, 9, 264)), WINDOW, impl="gather"),
        "impl is 'gather', but head_dim is 264",
    ),
    "tile off the cpu": (
        lambda: sa.attention(Q.to("meta"), K.to("meta"), V.to("meta"), WINDOW, impl="tile"),
        "impl is 'tile', but q is on meta",
    ),
    "block mask of the wrong size": (
        lambda: sa.attention(Q, K, V, sa.BlockSparse(torch.ones(3, 2, dtype=torch.bool), 16)),
        r"block_mask has shape \(3, 2\); expected \(2, 2\) blocks of 16",
    ),
    "block mask of other heads": (
        lambda: sa.attention(Q, K, V, sa.BlockSparse(torch.ones(3, 2, 2, dtype=torch.bool), 16)),
        "block_mask has shape .* 3 heads; expected 4 heads",
    ),
    "documents of another length": (lambda: sa.attention(Q, K, V, sa.Documents((5, 6))), "lengths sum to 11; expected kv_len, 20"),
    "a tree longer than the keys": (lambda: sa.attention(Q, K, V, sa.Tree((-1,) * 21)), "parents.*21"),
    "dilations of other heads": (lambda: sa.attention(Q, K, V, sa.Dilated(4, (1, 2))), "dilation.*4 heads"),
    "plan": (lambda: sa.plan(Q, K, V, WINDOW, impl="fast"), "impl is 'fast'; expected one of"),
    "plan of an array": (lambda: sa.plan(Q.numpy(), K, V, WINDOW), "q is array.*expected a tensor"),
    "explain strides": (lambda: sa.explain(Q, K.mT.contiguous().mT, V, WINDOW), "k has strides"),
    "merge nothing": (lambda: sa.merge([], []), "outs has 0 tensors"),
    "merge unequal": (lambda: sa.merge([Q, Q], [Q[..., 0]]), "outs has 2 tensors and lses 1"),
    "merge shapes": (lambda: sa.merge([Q, K], [Q[..., 0], K[..., 0]]), r"outs\[1\] has shape \(2, 2, 20, 16\)"),
    "merge lse shape": (lambda: sa.merge([Q], [Q]), r"lses\[0\] \(2, 4, 20, 16\); expected .* \(2, 4, 20\)"),
    "longnet lengths": (lambda: sa.longnet(Q[:, :, :9], K, V, (8,), (1,)), "k has shape .*, 20 tokens; expected 9"),
    "longnet segments": (lambda: sa.longnet(Q, K, V, (0,), (1,)), r"segments is \(0,\); expected positive ints"),
    "longnet no level": (lambda: sa.longnet(Q, K, V, (), ()), r"segments is \(\); expected positive ints"),
    "longnet one number": (lambda: sa.longnet(Q, K, V, 8, 1), "segments is 8; expected positive ints"),
    "longnet dilations": (lambda: sa.longnet(Q, K, V, (8,), (1.5,)), r"dilations is \(1.5,\); expected positive ints"),
    "longnet levels": (lambda: sa.longnet(Q, K, V, (8, 16), (1,)), "dilations has 1 levels; expected 2"),
    "longnet divisor": (lambda: sa.longnet(Q, K, V, (8,), (3,)), r"dilations\[0\] is 3; expected a divisor of segments\[0\], 8"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_a_value_error(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["mixed dtypes", "strides of v", "pattern is a list", "heads not divisible"])
def test_wrong_input_after_a_right_one(name):
    """The way that skips the checks is taken by equal inputs only."""
    sa.attention(Q, K, V, WINDOW)
    test_wrong_input_is_a_value_error(name)


def test_wrong_input_under_compile():
    with pytest.raises(Exception, match="pattern is 'causal'; expected a Pattern"):
        torch.compile(sa.attention, backend="eager")(Q, K, V, "causal")
    with pytest.raises(ValueError, match="heads; expected a divisor of q's 3"):
        torch.compile(lambda q: sa.attention(q, K, V, WINDOW), fullgraph=True, backend="eager")(Q[:, :3])


@pytest.mark.parametrize("impl", ["auto", *ENGINES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_causal_is_sdpa(impl, dtype):
    q, k, v = tensors(dtype=dtype)
    expected = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), is_causal=True, enable_gqa=True)
    out, lse = sa.attention(q, k, v, sa.Causal(), impl=impl, return_lse=True)
    alone = sa.attention(q, k, v, sa.Causal(), impl=impl)
    assert out.dtype == alone.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(alone.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("scale", [None, 0.0, -0.7, 2, np.float32(0.25)])
def test_scale(impl, scale):
    q, k, v = tensors(dtype=torch.float64)
    out, lse = sa.attention(q, k, v, sa.Dense(), scale=scale, impl=impl, return_lse=True)
    scores = (q @ k.repeat_interleave(2, 1).mT) * (0.25 if scale is None else float(scale))
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.testing.assert_close(out, scores.softmax(-1) @ v.repeat_interleave(2, 1))


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("op", [False, True], ids=["eager", "op"])
def test_a_query_without_keys_gives_zero(impl, op):
    """More queries than keys: the first 7 stand before every key."""
    q, k, v = (x.requires_grad_() for x in tensors(k=(2, 2, 13, 16)))
    torch._dynamo.reset()
    call = torch.compile(sa.attention, fullgraph=True, backend="eager") if op else sa.attention
    for return_lse in (False, True):
        result = call(q, k, v, sa.SlidingWindow(3), impl=impl, return_lse=return_lse)
        out, lse = result if return_lse else (result, None)
        assert (out[:, :, :7] == 0).all() and (out[:, :, 7:] != 0).all()
        loss = out.square().sum()
        if return_lse:
            assert (lse[:, :, :7] == -torch.inf).all() and lse[:, :, 7:].isfinite().all()
            loss = loss + lse[:, :, 7:].sum()
        for gradient in torch.autograd.grad(loss, (q, k, v)):
            assert gradient.isfinite().all()
        (dq,) = torch.autograd.grad(call(q, k, v, sa.SlidingWindow(3), impl=impl).sum(), q)
        assert (dq[:, :, :7] == 0).all()


@pytest.mark.parametrize("impl", ENGINES)
def test_no_query_has_a_key(impl):
    q, k, v = tensors()
    never = sa.Predicate(lambda i, j: (i < 0) & (j < 0))
    out, lse = sa.attention(q, k, v, never, impl=impl, return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("impl", ENGINES)
def test_strided_inputs_are_read_in_place(impl):
    packed = torch.randn(2, 20, 3, 4, 16)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    expected = sa.attention(q.contiguous(), k.contiguous(), v.contiguous(), WINDOW, impl=impl)
    torch.testing.assert_close(sa.attention(q, k, v, WINDOW, impl=impl), expected, rtol=0, atol=1e-6)
    every_other = sa.attention(q[:, ::2, ::3], k[:, ::2, ::3], v[:, ::2, ::3], WINDOW, impl=impl)
    expected = sa.attention(*(x[:, ::2, ::3].contiguous() for x in (q, k, v)), WINDOW, impl=impl)
    torch.testing.assert_close(every_other, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", ENGINES)
def test_rows_that_overlap_or_repeat(impl):
    memory = torch.randn(200)
    overlapping = memory.as_strided((1, 2, 5, 16), (200, 40, 1, 1))
    repeated = memory[:16].expand(1, 2, 5, 16)
    for x in (overlapping, repeated):
        expected = sa.attention(x.contiguous(), x.contiguous(), x.contiguous(), WINDOW, impl="reference")
        torch.testing.assert_close(sa.attention(x, x, x, WINDOW, impl=impl), expected, rtol=0, atol=1e-5)


def test_out_has_the_strides_of_q():
    q = torch.randn(2, 20, 4, 16).transpose(1, 2)
    for impl in ("tile", "gather"):
        assert sa.attention(q, q, q, WINDOW, impl=impl).stride() == q.stride()


def test_unusual_head_dims_run_by_auto():
    for head_dim in (1, 12, 264):
        q, k, v = tensors((1, 2, 30, head_dim), (1, 2, 30, head_dim))
        expected = sa.attention(q, k, v, WINDOW, impl="reference")
        torch.testing.assert_close(sa.attention(q, k, v, WINDOW), expected, rtol=0, atol=1e-5)
        assert "head_dim" in sa.explain(q, k, v, WINDOW)


def test_parameters_and_subclasses():
    class Tagged(torch.Tensor):
        pass

    expected = sa.attention(Q, K, V, WINDOW)
    assert torch.equal(sa.attention(torch.nn.Parameter(Q), K, V, WINDOW), expected)
    out = sa.attention(Q.as_subclass(Tagged), K, V, WINDOW)
    assert type(out) is Tagged and torch.equal(out.as_subclass(torch.Tensor), expected)


def test_threads_call_at_once():
    from concurrent.futures import ThreadPoolExecutor

    q, k, v = tensors((1, 4, 300, 64), (1, 4, 300, 64))
    expected = {impl: sa.attention(q, k, v, WINDOW, impl=impl) for impl in ENGINES}
    with ThreadPoolExecutor(4) as pool:
        outs = list(pool.map(lambda impl: (impl, sa.attention(q, k, v, WINDOW, impl=impl)), ENGINES * 5))
    assert all(torch.equal(out, expected[impl]) for impl, out in outs)


def test_plan_names_the_engine_and_the_reason():
    q, k, v = tensors((1, 4, 4096, 64), (1, 4, 4096, 64))
    plan = sa.plan(q, k, v, sa.SlidingWindow(64))
    assert plan.impl in ("tile", "gather") and plan.why
    assert sa.plan(q, k, v, sa.SlidingWindow(64), impl="dense").impl == "dense"
    told = sa.explain(q, k, v, sa.SlidingWindow(64))
    for word in (plan.impl, "tiles", "full", "partial", "FLOPs", "bytes", "expected"):
        assert word in told


def test_dense_is_what_a_user_runs_who_gave_up_the_sparsity():
    square, longer = (dispatch.Sizes(1, 4, 4, n, 4096, 64, torch.float32, "cpu") for n in (4096, 64))
    tree = sa.Tree((-1, 0, 0, 1))
    for pattern, sizes, given_up in (
        (sa.SlidingWindow(64), square, sa.Causal()),
        (sa.SlidingWindow(64), longer, sa.Dense()),
        (sa.SlidingWindow(64) | sa.Sinks(4), square, sa.Dense()),
        (sa.BigBird(64), square, sa.Dense()),
        (tree | sa.Sinks(4), longer, tree | sa.Sinks(4)),
    ):
        assert dispatch.without_sparsity(pattern, sizes) == given_up
    plan = dispatch.plan(sa.SlidingWindow(64), square)
    assert 1 < plan.speedup < plan.estimates["dense"] / plan.estimates[plan.impl]  # which reads a mask


def test_tables_kept_for_later_calls_are_bounded(monkeypatch):
    monkeypatch.setattr(engines, "_engines", {})
    monkeypatch.setattr(engines, "_MOST_BYTES", 1 << 20)
    q, k, v = tensors((1, 1, 600, 16), (1, 1, 600, 16))
    for seed in range(20):
        columns = torch.randint(600, (60_000,), generator=torch.Generator().manual_seed(seed))
        sa.attention(q, k, v, sa.Csr(torch.arange(601) * 100, columns), impl="gather")
        assert 1 <= len(engines._engines) <= 2


def test_merge_of_disjoint_parts_is_the_whole():
    q, k, v = (x.double().requires_grad_() for x in tensors((1, 2, 30, 16), (1, 2, 30, 16)))
    window, rest = sa.SlidingWindow(5), sa.Predicate(lambda i, j: i - j >= 5)
    parts = [sa.attention(q, k, v, p, impl="gather", return_lse=True) for p in (window, rest)]
    out, lse = sa.merge(*zip(*parts))
    whole, whole_lse = sa.attention(q, k, v, sa.Causal(), impl="reference", return_lse=True)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, whole_lse)
    ours = torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))
    for a, b in zip(ours, torch.autograd.grad(whole.square().sum() + whole_lse.sum(), (q, k, v))):
        torch.testing.assert_close(a, b)


def test_merge_with_parts_that_reach_nothing():
    out, lse = torch.randn(3, 8, requires_grad=True), torch.tensor([0.3, -torch.inf, 2.0], requires_grad=True)
    nothing = torch.zeros(3, 8), torch.full((3,), -torch.inf)
    with torch.no_grad():
        out[1] = 0
    merged, merged_lse = sa.merge([out, nothing[0]], [lse, nothing[1]])
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(merged_lse, lse)
    for gradient in torch.autograd.grad(merged.sum() + merged_lse[[0, 2]].sum(), (out, lse)):
        assert gradient.isfinite().all()


def test_merge_keeps_the_dtype():
    outs = [torch.randn(4, 8).bfloat16() for _ in range(3)]
    out, lse = sa.merge(outs, [torch.randn(4) for _ in range(3)])
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


def longnet_by_definition(q, k, v, segments, dilations, causal):
    """All levels' softmax weights added up, then divided by the sum of all denominators."""
    heads, n = q.shape[1:3]
    k, v = (x.repeat_interleave(heads // k.shape[1], 1) for x in (k, v))
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    times = torch.zeros(heads, n, n, dtype=q.dtype)
    for segment, dilation in zip(segments, dilations):
        for head in range(heads):
            kept = [x % segment % dilation == head % dilation for x in (i, j)]
            times[head] += (i // segment == j // segment) & kept[0] & kept[1] & ((j <= i) | (not causal))
    weights = times * torch.exp(q @ k.mT * q.shape[3] ** -0.5)
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1) @ v, total.squeeze(-1).log()


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [64, 45, 5])
@pytest.mark.parametrize("segments, dilations", [((8, 16), (1, 2)), ((16,), (8,)), ([8, 32, 128], [1, 4, 16])])
def test_longnet(heads, kv_heads, causal, n, segments, dilations):
    q, k, v = (x.double().requires_grad_() for x in tensors((2, heads, n, 8), (2, kv_heads, n, 8)))
    expected, expected_lse = longnet_by_definition(q, k, v, segments, dilations, causal)
    gradients = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for impl in ("auto", "gather"):
        out, lse = sa.longnet(q, k, v, segments, dilations, causal=causal, impl=impl, return_lse=True)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(lse, expected_lse)
        for a, b in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), gradients):
            torch.testing.assert_close(a, b)
