"""The engines on a CUDA device: accuracy, layouts in memory, NaN where nobody looks, graphs, streams. Skipped without one."""

from __future__ import annotations

import pytest
import torch

import sparse_attention as sa
from sparse_attention import cuda_layout, cuda_tables, dispatch, engines
from tests.cases import CASES
from tests.cuda_calls import apart, assert_accurate, exact, tensors, tier  # noqa: F401

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if torch.cuda.get_device_capability() < (8, 0):
    pytest.skip(f"needs compute capability 8.0 or later, this is {torch.cuda.get_device_capability()}", allow_module_level=True)

pytestmark = pytest.mark.cuda
DTYPES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_every_pattern(case, dtype):
    q, k, v = tensors(2, case.heads, case.heads, case.q_len, case.kv_len, 64, dtype)
    pattern = case.make()
    assert_accurate(q, k, v, pattern, *sa.attention(q, k, v, pattern, impl="tile", return_lse=True))


@pytest.mark.parametrize("case", [case for case in CASES if "dil" in case.id or "multi" in case.id or "per-head" in case.id], ids=lambda c: c.id)
def test_parts_apart(case, apart):  # noqa: F811
    q, k, v = tensors(2, case.heads, case.heads, case.q_len, case.kv_len, 64)
    assert_accurate(q, k, v, case.make(), *sa.attention(q, k, v, case.make(), impl="tile", return_lse=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 96, 128, 136, 192, 200, 256])
@pytest.mark.parametrize("pattern", [sa.SlidingWindow(300), sa.BigBird(64), sa.MultiScale(40), sa.Dilated(30, 7)], ids=lambda p: type(p).__name__)
def test_head_dim(head_dim, dtype, pattern, apart):  # noqa: F811
    q, k, v = tensors(1, 4, 2, 1003, 1003, head_dim, dtype)
    assert_accurate(q, k, v, pattern, *sa.attention(q, k, v, pattern, impl="tile", return_lse=True))


@pytest.mark.parametrize("lengths", [(1, 1), (1, 5000), (63, 64), (129, 4097), (500, 300), (2048, 2048)], ids=str)
def test_lengths(lengths):
    q, k, v = tensors(3, 2, 1, *lengths, 128)
    for pattern in (sa.SlidingWindow(200) | sa.Sinks(4), sa.Causal(), sa.Dense(), sa.LogSparse(3)):
        assert_accurate(q, k, v, pattern, *sa.attention(q, k, v, pattern, impl="tile", return_lse=True))


@pytest.mark.parametrize("keys", (cuda_tables.NARROW, cuda_tables.WIDE))
@pytest.mark.parametrize("head_dim", (64, 128))
def test_both_widths_of_tiles(keys, head_dim, monkeypatch):
    monkeypatch.setattr(cuda_layout, "NARROW_COST", 0.0 if keys == cuda_tables.NARROW else 1e9)
    monkeypatch.setattr("sparse_attention.engines._engines", {})
    q, k, v = tensors(1, 2, 2, 1500, 1500, head_dim)
    for pattern in (sa.BigBird(64), sa.SlidingWindow(250), sa.Longformer(70, 3)):
        assert_accurate(q, k, v, pattern, *sa.attention(q, k, v, pattern, impl="tile", return_lse=True))


@pytest.mark.parametrize("pattern", [sa.SlidingWindow(100) | sa.Sinks(3), sa.LogSparse(), sa.Dilated(20, 4)], ids=lambda p: type(p).__name__)
def test_nan_where_nobody_looks(pattern):
    q, k, v = tensors(1, 2, 2, 130, 1500, 64)
    unseen = ~pattern.mask(130, 1500, 2).any(1).cuda()[None, :, :, None]
    assert unseen.any()
    clean = [x.masked_fill(unseen, 0.0) for x in (k, v)]
    bad = [x.masked_fill(unseen, torch.nan) for x in (k, v)]
    assert_accurate(q, *bad, pattern, *sa.attention(q, *bad, pattern, impl="tile", return_lse=True), clean=clean)


def test_heads_of_different_strides(apart):  # noqa: F811
    q, k, v = tensors(2, 4, 2, 700, 900, 64)
    for pattern in (sa.Dilated(40, (1, 2, 4, 8)), sa.Dilated(40, (1, 2, 3, 8)) | sa.Sinks(5)):
        assert_accurate(q, k, v, pattern, *sa.attention(q, k, v, pattern, impl="tile", return_lse=True))


def test_strides_are_read_in_place_or_copied():
    base = torch.randn(2, 700, 3, 2, 64, device="cuda", dtype=torch.bfloat16)  # [batch, length, (q, k, v), heads, head_dim]
    q, k, v = (base[:, :, n].transpose(1, 2) for n in range(3))
    out, lse = sa.attention(q, k, v, sa.SlidingWindow(90), impl="tile", return_lse=True)
    assert_accurate(q, k, v, sa.SlidingWindow(90), out, lse)
    assert out.stride() == torch.empty_like(q).stride(), "the heads of a position lie together, as in q"
    odd = torch.randn(1, 2, 300, 67, device="cuda", dtype=torch.bfloat16)[..., :64]  # rows that the copy engine cannot read
    one = torch.randn(1, 1, 300, 64, device="cuda", dtype=torch.bfloat16).expand(1, 2, 300, 64)
    assert_accurate(odd, one, one, sa.Causal(), *sa.attention(odd, one, one, sa.Causal(), impl="tile", return_lse=True))


def test_an_address_that_is_no_multiple_of_16_bytes():
    for q_len, pattern, impl in ((300, sa.SlidingWindow(90), "tile"), (300, sa.SlidingWindow(90), "gather"), (4, sa.Causal(), "auto")):
        q, k, v = (torch.randn(1 + 2 * n * 64, device="cuda", dtype=torch.bfloat16)[1:].view(1, 2, n, 64) for n in (q_len, 300, 300))
        assert_accurate(q, k, v, pattern, *sa.attention(q, k, v, pattern, impl=impl, return_lse=True))


@pytest.mark.parametrize("scale", (0.3, 0.0, -0.2))
def test_scale(scale):
    q, k, v = tensors(1, 2, 2, 300, 300, 64)
    pattern = sa.SlidingWindow(70)
    out = sa.attention(q, k, v, pattern, scale=scale, impl="tile")
    right, _ = exact(q, k, v, pattern.mask(300, 300, 2).cuda(), scale)
    assert (out.double() - right).norm() < 6e-3 * right.norm()


def test_repeats_are_bit_equal_and_streams_do_not_mix(apart):  # noqa: F811
    q, k, v = tensors(1, 4, 4, 3000, 3000, 128)
    patterns = [sa.SlidingWindow(500), sa.MultiScale(100), sa.BigBird(64)]
    first = [sa.attention(q, k, v, p, impl="tile") for p in patterns]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for turn in range(60):
        outs = []
        for stream, pattern in zip(streams, patterns):
            with torch.cuda.stream(stream):
                outs.append(sa.attention(q, k, v, pattern, impl="tile"))
        torch.cuda.synchronize()
        assert all(torch.equal(one, other) for one, other in zip(outs, first)), turn


def test_a_graph_replays(apart):  # noqa: F811
    q, k, v = tensors(1, 2, 2, 900, 900, 64)
    pattern = sa.MultiScale(50)
    sa.attention(q, k, v, pattern, impl="tile")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sa.attention(q, k, v, pattern, impl="tile")
    for seed in (1, 2):
        for x, new in zip((q, k, v), tensors(1, 2, 2, 900, 900, 64, seed=seed)):
            x.copy_(new)
        graph.replay()
        assert torch.equal(out, sa.attention(q, k, v, pattern, impl="tile"))


def test_no_launch_but_the_kernel_after_the_first_call(tier):  # noqa: F811
    q, k, v = tensors(1, 2, 2, 900, 900, 64)
    pattern = sa.SlidingWindow(50)
    sa.attention(q, k, v, pattern, impl="tile")
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        sa.attention(q, k, v, pattern, impl="tile")
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1 and tier in kernels[0], kernels


def test_what_cuda_does_not_do_is_said():
    q, k, v = (x.requires_grad_() for x in tensors(1, 2, 2, 100, 100, 64))
    with pytest.raises(NotImplementedError, match="impl='dense'"):
        sa.attention(q, k, v, sa.SlidingWindow(9), impl="tile").sum().backward()
    with pytest.raises(ValueError, match="float32 and the tile engine on CUDA takes bfloat16"):
        sa.attention(q.float(), k.float(), v.float(), sa.SlidingWindow(9), impl="tile")


def test_a_known_call_is_the_same_call():
    """The short way of calls made before: equal outputs, other shapes, dtypes, strides, gradients and modes as if it were not there."""
    pattern = sa.SlidingWindow(60)
    q, k, v = tensors(1, 4, 2, 300, 300, 64)
    first = sa.attention(q, k, v, pattern)
    assert engines.quick(pattern) is not None
    others = tensors(1, 4, 2, 300, 300, 64, seed=1)
    for x in ((q, k, v), others, [y.transpose(1, 2).contiguous().transpose(1, 2) for y in others], [y.half() for y in others]):
        assert torch.equal(sa.attention(*x, pattern), sa.attention(*x, pattern, return_lse=True)[0])
    assert torch.equal(sa.attention(q, k, v, pattern), first)
    q, k, v = tensors(2, 4, 4, 200, 333, 128)
    assert_accurate(q, k, v, pattern, sa.attention(q, k, v, pattern), sa.attention(q, k, v, pattern, return_lse=True)[1])
    with torch.autocast("cuda", dtype=torch.float16):
        assert sa.attention(q, k, v, pattern).dtype == torch.float16
    with pytest.raises(NotImplementedError, match="impl='dense'"):
        sa.attention(q.requires_grad_(), k, v, pattern, impl="tile").sum().backward()
    with pytest.raises(ValueError, match="contiguous last dimension"):
        sa.attention(q.detach(), k.mT.contiguous().mT, v, pattern)
    mapped = torch.vmap(lambda q, k, v: sa.attention(q, k, v, pattern, impl="tile"))
    stacked = [torch.stack([x, x.flip(2)]).detach() for x in (q, k, v)]
    assert torch.equal(mapped(*stacked)[0], sa.attention(*(x[0] for x in stacked), pattern, impl="tile"))


def test_auto_takes_the_sparse_engine_where_it_wins():
    q, k, v = tensors(1, 16, 16, 16384, 16384, 128)
    assert sa.plan(q, k, v, sa.SlidingWindow(1024)).impl == "tile"
    assert "expected" in sa.explain(q, k, v, sa.SlidingWindow(1024))
    assert dispatch.Sizes.of(q, k).device == "cuda"


def test_compiled():
    q, k, v = tensors(1, 2, 2, 600, 600, 64)
    pattern = sa.SlidingWindow(64)
    compiled = torch.compile(lambda q, k, v: sa.attention(q, k, v, pattern, impl="tile") * 2, fullgraph=True)
    assert torch.equal(compiled(q, k, v), sa.attention(q, k, v, pattern, impl="tile") * 2)


def test_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free memory on the device")
    q, k, v = (torch.randn(1, 18, 1 << 20, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out = sa.attention(q, k, v, sa.SlidingWindow(128), impl="tile")
    last = slice((1 << 20) - 300, None)
    right, _ = exact(q[:, -1:, last], k[:, -1:, last], v[:, -1:, last], sa.SlidingWindow(128).mask(300, 300, 1).cuda())
    assert (out[:, -1:, last][:, :, 128:].double() - right[:, :, 128:]).norm() < 6e-3 * right.norm()
