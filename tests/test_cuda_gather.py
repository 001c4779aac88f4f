"""The gather engine on a CUDA device: every pattern and dtype, strides, long rows, NaN where nobody looks, equal bits. Skipped without one."""

from __future__ import annotations

import pytest
import torch

import sparse_attention as sa
from sparse_attention import cuda_rows
from tests.cases import CASES, csr
from tests.cuda_calls import assert_accurate, exact, tensors
from tests.oracle import Results, check, expected, inputs

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if torch.cuda.get_device_capability() < (8, 0):
    pytest.skip(f"needs compute capability 8.0, this is {torch.cuda.get_device_capability()}", allow_module_level=True)

pytestmark = pytest.mark.cuda
HALVES = (torch.bfloat16, torch.float16)


def gather(q, k, v, pattern, **options):
    return sa.attention(q, k, v, pattern, impl="gather", return_lse=True, **options)


def pytorch(q, k, v, mask, scale):
    """(out, lse) in the dtype of q, the LSE in float32."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    weights = ((q @ k.mT) * scale).masked_fill(~mask, -torch.inf).softmax(-1)
    scores = ((q.float() @ k.float().mT) * scale).masked_fill(~mask, -torch.inf)
    return weights.nan_to_num(0.0) @ v, scores.logsumexp(-1)


def assert_within_twice(mine, theirs, right, what):
    """Errors of all rows together (root mean square) at most twice PyTorch's, or half a unit in the last place; each row's at most twice
    PyTorch's in that row or, where PyTorch is lucky, in its worst row."""
    assert torch.equal(mine.isinf(), right.isinf()) and mine.isfinite().sum() == right.isfinite().sum(), what
    unit = torch.finfo(mine.dtype).eps * right.nan_to_num(0.0, 0.0, 0.0).abs()
    error, allowed = ((x.double() - right).nan_to_num(0.0, 0.0, 0.0).abs() for x in (mine, theirs))
    assert error.square().mean().sqrt() <= max(2 * allowed.square().mean().sqrt(), unit.square().mean().sqrt() / 2), what
    if right.ndim == 4:
        error, allowed, unit = (x.amax(-1) for x in (error, allowed, unit))
    worst = (2 * allowed + unit).max() if mine.dtype == torch.float32 else 2 * allowed + 2 * unit
    assert (error <= worst).all(), f"{what}: off by {float(error.max()):.2e} where PyTorch is by {float(allowed.max()):.2e}"


def assert_right(pattern, q_len, kv_len, heads=1, kv_heads=None, batch=1, head_dim=64, dtype=torch.float32, scale=None, amplitude=1.0):
    q, k, v = tensors(batch, heads, kv_heads or heads, q_len, kv_len, head_dim, dtype)
    q, k, scale = q * amplitude, k * amplitude, head_dim**-0.5 if scale is None else scale
    mask = pattern.mask(q_len, kv_len, heads).cuda()
    out, lse = gather(q, k, v, pattern, scale=scale)
    right, right_lse = exact(q, k, v, mask, scale)
    theirs, their_lse = pytorch(q, k, v, mask, scale)
    assert_within_twice(out, theirs, right, "out")
    assert_within_twice(lse, their_lse, right_lse, "lse")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_every_pattern(case):
    pattern = case.make()
    for dtype, head_dim in ((torch.float32, 64), (torch.bfloat16, 64), (torch.float16, 32)):
        assert_right(pattern, case.q_len, case.kv_len, case.heads, batch=2, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("head_dim", [8, 24, 40, 64, 72, 96, 128, 136, 192, 200, 256])
def test_head_dim(head_dim):
    pattern = sa.SlidingWindow(50, causal=False) | sa.LogSparse() | sa.Sinks(2)
    for dtype in (torch.float32, *HALVES):
        for heads, kv_heads in ((2, 2), (4, 2), (4, 1)):
            assert_right(pattern, 130, 170, heads, kv_heads, head_dim=head_dim, dtype=dtype)


def test_float64():
    for head_dim in (40, 64, 104, 256):
        q, k, v = tensors(2, 4, 2, 90, 333, head_dim, torch.float64)
        for pattern in (sa.LogSparse(40), csr(90, 333), sa.Dense()):
            out, lse = gather(q, k, v, pattern)
            right, right_lse = exact(q, k, v, pattern.mask(90, 333, 4).cuda())
            assert (out - right).abs().max() < 1e-14 * head_dim
            assert (lse - right_lse).nan_to_num(0.0, 0.0, 0.0).abs().max() < 1e-14 * head_dim and lse.dtype == torch.float64


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_grouped_heads_together(kv_heads):
    """Four heads a warp, two, one, and heads of a group with lists of their own."""
    for pattern in (csr(150, 200), sa.Longformer(20, 3), sa.Dilated(20, (1, 1, 2, 2, 3, 3, 4, 4)), sa.Dilated(20, (1, 2, 3, 4, 5, 6, 7, 8))):
        for dtype in (torch.float32, torch.bfloat16):
            assert_right(pattern, 150, 200, 8, kv_heads=kv_heads, head_dim=128, dtype=dtype)


def test_odd_groups():
    for heads, kv_heads in ((6, 1), (6, 2), (5, 1), (10, 1)):
        assert_right(sa.LogSparse(), 70, 70, heads, kv_heads=kv_heads, head_dim=64, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_long_rows_are_split_and_joined(dtype, monkeypatch):
    pattern = sa.Longformer(30, 5) | csr(900, 900, density=0.02)
    for shortest in (256, 32, 1 << 20):
        monkeypatch.setattr(cuda_rows, "SHORTEST", shortest)
        monkeypatch.setattr("sparse_attention.engines._engines", {})
        for heads, kv_heads in ((2, 2), (4, 1)):
            q, k, v = tensors(2, heads, kv_heads, 900, 900, 128, dtype)
            assert_accurate(q, k, v, pattern, *gather(q, k, v, pattern))


@pytest.mark.parametrize("short", [0, 1 << 20])
def test_rows_of_a_warp_and_rows_of_a_group(short, monkeypatch):
    monkeypatch.setattr(cuda_rows, "SHORT", short)
    monkeypatch.setattr("sparse_attention.engines._engines", {})
    thin = csr(203, 300, density=0.04)
    for pattern, heads, kv_heads in ((sa.LogSparse(), 2, 2), (thin, 2, 1), (sa.Strided(9), 4, 1), (sa.Dilated(9, (1, 2, 3, 4)), 4, 2)):
        for head_dim in (40, 128, 192):
            for dtype in (torch.float32, *HALVES):
                assert_right(pattern, 203, 300, heads, kv_heads, batch=2, head_dim=head_dim, dtype=dtype)


def test_few_queries_over_many_keys():
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = tensors(2, 8, 2, 3, 40000, 64, dtype)
        for pattern in (sa.Dense(), sa.Causal(), sa.Sinks(3)):
            assert_accurate(q, k, v, pattern, *gather(q, k, v, pattern))


def test_accuracy_of_float32_over_many_keys():
    """PyTorch sums in blocks; one running sum over a row would lose several times as much. As tests/oracle.py counts it."""
    pattern = sa.SlidingWindow(3000)
    x = inputs(pattern.mask(40, 4000, 1), head_dim=128)
    out, lse = gather(x.q.cuda(), x.k.cuda(), x.v.cuda(), pattern)
    want = expected(x)
    gradients = (torch.from_numpy(right) for right in want.exact[2:])  # it has none yet
    check(Results(out.cpu(), lse.cpu(), *gradients), want)


@pytest.mark.parametrize("amplitude", [4.0, 12.0])
def test_peaked_softmax(amplitude):
    for dtype in (torch.float32, *HALVES):
        assert_right(sa.SlidingWindow(70) | sa.LogSparse(), 200, 300, 2, head_dim=64, dtype=dtype, amplitude=amplitude)


@pytest.mark.parametrize("scale", [0.3, 0.0, -0.2])
def test_scale(scale):
    for dtype in (torch.float32, torch.bfloat16):
        assert_right(csr(120, 140), 120, 140, 2, head_dim=64, dtype=dtype, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_strides(dtype, kv_heads):
    pattern = sa.LogSparse(5)
    base = torch.randn(2, 300, 3, 4, 64, device="cuda", dtype=dtype)  # [batch, length, (q, k, v), heads, head_dim]
    packed = [base[:, :, n].transpose(1, 2) for n in range(3)]
    odd = [torch.randn(2, h, 300, 67, device="cuda", dtype=dtype)[..., 1:65] for h in (4, kv_heads, kv_heads)]
    one = [odd[0], *(torch.randn(1, 1, 300, 64, device="cuda", dtype=dtype).expand(2, 4, 300, 64) for _ in "kv")]
    for q, k, v in (packed, odd, one):
        if k.shape[1] != kv_heads:
            k, v = k[:, :kv_heads], v[:, :kv_heads]
        out, lse = gather(q, k, v, pattern)
        same, same_lse = gather(q.contiguous(), k.contiguous(), v.contiguous(), pattern)
        close = dict(rtol=0, atol=20 * torch.finfo(dtype).eps)
        torch.testing.assert_close(out, same, **close), torch.testing.assert_close(lse, same_lse, **close)
        if dtype != torch.float64:
            assert_accurate(*(x.contiguous() for x in (q, k, v)), pattern, out, lse)


@pytest.mark.parametrize("make", [lambda: sa.SlidingWindow(100) | sa.Sinks(3), lambda: sa.LogSparse(), lambda: csr(130, 1500)])
def test_nan_where_nobody_looks(make):
    pattern = make()
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = tensors(1, 2, 2, 130, 1500, 64, dtype)
        mask = pattern.mask(130, 1500, 2).cuda()
        out, lse = gather(q, k, v, pattern)
        for bad in (torch.nan, torch.inf):
            victim = int(mask[0].any(0).nonzero()[0])
            k_bad, v_bad = k.clone(), v.clone()
            k_bad[:, :, victim], v_bad[:, :, victim] = bad, bad
            unseen = ~mask.any(1)[None, :, :, None]
            k_bad, v_bad = k_bad.masked_fill(unseen, bad), v_bad.masked_fill(unseen, bad)
            spoilt, spoilt_lse = gather(q, k_bad, v_bad, pattern)
            seen = mask[:, :, victim].expand(1, 2, 130)
            assert torch.equal(spoilt[~seen], out[~seen]) and torch.equal(spoilt_lse[~seen], lse[~seen])
            assert spoilt[seen].isnan().any(-1).all() or bad == torch.inf


def test_repeats_are_bit_equal_and_streams_do_not_mix():
    q, k, v = tensors(1, 4, 4, 2000, 2000, 128)
    patterns = [sa.LogSparse(), csr(2000, 2000, density=0.03), sa.Longformer(50, 3)]
    first = [gather(q, k, v, p) for p in patterns]
    streams = [torch.cuda.Stream() for _ in patterns]
    torch.cuda.synchronize()
    equal = torch.ones((), dtype=torch.bool, device="cuda")
    for _ in range(1000):
        found = []
        for stream, pattern in zip(streams, patterns):
            with torch.cuda.stream(stream):
                found.append(gather(q, k, v, pattern))
        torch.cuda.synchronize()
        for (out, lse), (right, right_lse) in zip(found, first):
            equal &= (out == right).all() & (lse == right_lse).all()
    assert equal


def test_a_graph_replays():
    q, k, v = tensors(1, 4, 2, 900, 900, 64)
    pattern = sa.Longformer(30, 2)
    gather(q, k, v, pattern)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = gather(q, k, v, pattern)
    for x, new in zip((q, k, v), tensors(1, 4, 2, 900, 900, 64, seed=1)):
        x.copy_(new)
    graph.replay()
    assert torch.equal(out, gather(q, k, v, pattern)[0])


def test_no_launch_but_the_kernel_after_the_first_call():
    q, k, v = tensors(1, 2, 2, 900, 900, 64)
    gather(q, k, v, sa.LogSparse())
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        gather(q, k, v, sa.LogSparse())
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1 and "gather" in kernels[0], kernels


def test_what_it_does_not_do_is_said(monkeypatch):
    q, k, v = (x.requires_grad_() for x in tensors(1, 2, 2, 100, 100, 64))
    with pytest.raises(NotImplementedError, match="impl='dense'"):
        sa.attention(q, k, v, sa.LogSparse(), impl="gather").sum().backward()
    monkeypatch.setattr(cuda_rows, "PAIRS", 100)
    with pytest.raises(ValueError, match="its lists would hold .* keys and the gather engine on CUDA takes up to 100"):
        sa.attention(q, k, v, sa.LogSparse(2), impl="gather")


def test_auto_takes_it_where_it_wins():
    q, k, v = tensors(1, 16, 16, 16384, 16384, 64, torch.float32)
    window = sa.SlidingWindow(256)
    assert sa.plan(q, k, v, window).impl == "gather"
    thin = torch.arange(0, 16385 * 8, 8), torch.randint(16384, (16384 * 8,))
    assert sa.plan(*(x.bfloat16() for x in (q, k, v)), sa.Csr(*thin)).impl == "gather"
    assert sa.plan(*(x.bfloat16() for x in (q, k, v)), window).impl == "tile"


def test_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free memory on the device")
    q, k, v = (torch.randn(1, 18, 1 << 20, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out, _ = gather(q, k, v, sa.SlidingWindow(20))
    last = slice((1 << 20) - 300, None)
    right, _ = exact(q[:, -1:, last], k[:, -1:, last], v[:, -1:, last], sa.SlidingWindow(20).mask(300, 300, 1).cuda())
    assert (out[:, -1:, last][:, :, 20:].double() - right[:, :, 20:]).norm() < 6e-3 * right.norm()
