"""Every engine against the float64 oracle: out, LSE and gradients, row by row. The rule is in tests/oracle.py."""

from __future__ import annotations

import itertools
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attention import (
    BigBird,
    BlockSparse,
    Causal,
    Dense,
    Dilated,
    LogSparse,
    MultiScale,
    Predicate,
    Sinks,
    SlidingWindow,
)
from tests.calls import DTYPES, IMPLS, SPARSE, STRIDES, restride, run
from tests.cases import CASES, block_mask
from tests.oracle import check, expected, inputs
from tests.strategies import calls


def check_engines(x, pattern, impls=SPARSE):
    want = expected(x)
    for impl in impls:
        check(run(x, pattern, impl), want)


@lru_cache(maxsize=2)
def problem(number, dtype):
    """Case `number` with a head_dim, a sharing of keys, strides and a peakedness of its own."""
    case = CASES[number]
    head_dim = 8 * (number * 7 % 32 + 1)
    x = inputs(
        case.make().mask(case.q_len, case.kv_len, case.heads),
        batch=1 + number % 2,
        kv_heads=1 if number % 3 == 0 else case.heads,
        head_dim=min(head_dim, 64) if dtype == torch.float64 else head_dim,
        dtype=dtype,
        amplitude=1 + number % 3,
        seed=number,
    )
    kinds = list(STRIDES)
    x = restride(x, *(kinds[(number + n) % len(kinds)] for n in range(4)))
    return x, expected(x)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.id for case in CASES])
def test_pattern(number, dtype, impl):
    x, want = problem(number, dtype)
    # What SDPA computes is PyTorch's own error; here it is about masks, groups, scales and empty rows.
    check(run(x, CASES[number].make(), impl), want, roundings=300 if impl == "dense" else None)


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_head_dim(head_dim):
    pattern = SlidingWindow(70, causal=False)
    for dtype in (torch.float32, torch.bfloat16):
        x = inputs(pattern.mask(70, 150, 2), kv_heads=1, head_dim=head_dim, dtype=dtype, seed=head_dim)
        check_engines(x, pattern)


@pytest.mark.parametrize("q_len", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 193])
def test_lengths(q_len):
    for kv_len in (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 193):
        for pattern in (Dense(), SlidingWindow(20, causal=False) | Sinks(3)):
            check_engines(inputs(pattern.mask(q_len, kv_len, 2), kv_heads=1, head_dim=16, seed=kv_len), pattern)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 4), (4, 2), (6, 2), (6, 3), (8, 1)])
def test_shared_keys(heads, kv_heads):
    per_head = tuple(1 + h % 3 for h in range(heads))
    for pattern in (Causal(), Dilated(30, per_head), BlockSparse(block_mask(heads, 6, 6), 32), BigBird(16, seed=3)):
        for dtype in (torch.float32, torch.float16):
            x = inputs(pattern.mask(180, 180, heads), batch=2, kv_heads=kv_heads, head_dim=24, dtype=dtype)
            check_engines(x, pattern)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", STRIDES)
def test_strides(kind, impl):
    pattern = Dilated(20, (3, 1)) | Sinks(2)
    for dtype in (torch.float32, torch.bfloat16):
        plain = inputs(pattern.mask(130, 150, 2), batch=2, kv_heads=1, head_dim=40, dtype=dtype)
        moved = restride(plain, kind, kind, kind, kind)
        check(run(moved, pattern, impl), expected(plain), roundings=300 if impl == "dense" else None)


@pytest.mark.parametrize("impl", IMPLS)
def test_expanded_tensors(impl):
    """Stride 0: one key head, one batch entry or one row that stands for many, and rows that overlap."""
    pattern = SlidingWindow(40)
    x = inputs(pattern.mask(100, 100, 4), batch=3, head_dim=16)
    one_row = x.q[:, :, :1].expand_as(x.q)
    overlapping = torch.randn(3 * 4 * 200 + 16).as_strided((3, 4, 100, 16), (800, 200, 1, 1))
    few_overlapping = torch.randn(100).as_strided((1, 2, 3, 8), (20, 10, 1, 1))
    for x in (
        x._replace(k=x.k[:, :1].expand_as(x.k), v=x.v[:, 1:2].expand_as(x.v)),
        x._replace(k=x.k[:1].expand_as(x.k), v=x.v[1:2].expand_as(x.v)),
        x._replace(q=one_row, dout=x.dout[:, :, :1].expand_as(x.dout), dlse=x.dlse[:1].expand_as(x.dlse)),
        x._replace(q=overlapping, k=overlapping + 1, v=overlapping),
    ):
        check(run(x, pattern, impl), expected(x), roundings=300 if impl == "dense" else None)
    x = inputs(pattern.mask(3, 3, 2), head_dim=8)._replace(q=few_overlapping)
    check(run(x, pattern, impl), expected(x), roundings=300 if impl == "dense" else None)


@pytest.mark.parametrize("scale", [-0.3, -2.0, 0.0, 1e-12, 1e-3, 0.125, 1.0, 3.0, 1e10])
def test_scale(scale):
    """Any finite scale, on both sides of those that the tile engine folds into q."""
    for pattern in (SlidingWindow(50), Dilated(10, 3) | Sinks(2)):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            amplitude = min(1.0, abs(scale) ** -0.5) if scale else 1.0
            x = inputs(pattern.mask(100, 130, 2), head_dim=16, dtype=dtype, scale=scale, amplitude=amplitude)
            check_engines(x, pattern, ("tile", "gather", "reference"))


@pytest.mark.parametrize("impl", SPARSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_large_logits(dtype, impl):
    """Scores up to 1e4 in magnitude stay finite, and where they are whole numbers the softmax is exact."""
    pattern = SlidingWindow(30) | Sinks(40)
    mask = pattern.mask(150, 150, 2)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randint(-24, 25, (1, 2, 150, 16), generator=generator) for _ in range(2))
    k[:, :, ::5] = k[:, :, 1::5]  # ties
    x = inputs(mask, head_dim=16, dtype=dtype, scale=1.0)._replace(q=q.to(dtype), k=k.to(dtype))
    scores = (q @ k.mT).masked_fill(~mask, -(10**9))
    assert scores.max() > 3000 and scores[mask.unsqueeze(0)].min() < -3000
    got = run(x, pattern, impl)
    assert all(part.isfinite().all() for part in got)
    check(got, expected(x))
    best = scores.max(-1)
    gap = best.values - scores.scatter(-1, best.indices.unsqueeze(-1), -(10**9)).amax(-1)
    alone = gap > 100  # e^-100 is nothing beside 1
    assert alone.sum() > 100
    assert torch.equal(got.lse[alone], best.values[alone].to(got.lse.dtype))
    chosen = x.v.gather(2, best.indices.unsqueeze(-1).expand_as(x.v))
    assert torch.equal(got.out[alone], chosen[alone])


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("impl", SPARSE)
def test_all_scores_large(impl, sign):
    """All scores of a row near +1e4, or near -1e4: what is far from 0 is no reason to lose the row."""
    pattern = SlidingWindow(30)
    x = inputs(pattern.mask(150, 150, 2), head_dim=16, scale=1.0)
    x = x._replace(q=x.q + 25, k=x.k * 0.1 + sign * 25)
    got = run(x, pattern, impl)
    assert all(part.isfinite().all() for part in got)
    assert got.lse.min() > 9000 if sign > 0 else got.lse.max() < -9000
    check(got, expected(x))


LONG = [
    (SlidingWindow(1000), 300, 4096, torch.float32),
    (SlidingWindow(1000), 300, 4096, torch.bfloat16),
    (MultiScale(300), 300, 4000, torch.float32),
    (BigBird(random=3), 500, 4096, torch.float32),
    (LogSparse(), 1000, 4096, torch.float32),
    (Causal(), 200, 3000, torch.float16),
    (SlidingWindow(100), 2100, 2100, torch.float32),
    (Dilated(40, 16), 2500, 2500, torch.float32),
]


@pytest.mark.parametrize("pattern, q_len, kv_len, dtype", LONG, ids=lambda x: str(x).replace("torch.", ""))
def test_long(pattern, q_len, kv_len, dtype):
    x = inputs(pattern.mask(q_len, kv_len, 2), kv_heads=1, head_dim=64, dtype=dtype)
    check_engines(x, pattern)


def test_queries_without_keys():
    """Out 0, LSE -inf and no gradient, whatever the gradients of their results are; the other rows do not notice."""
    pattern = Predicate(lambda i, j: (i % 3 > 0) & (i - j < 70) & (j % 5 > 0))
    for dtype, impl in itertools.product((torch.float32, torch.bfloat16), IMPLS):
        x = inputs(pattern.mask(150, 150, 2), head_dim=16, dtype=dtype)
        clean = run(x, pattern, impl)
        assert (clean.out[:, :, ::3] == 0).all() and (clean.lse[:, :, ::3] == -torch.inf).all()
        assert (clean.dq[:, :, ::3] == 0).all() and (clean.dk[:, :, ::5] == 0).all() and (clean.dv[:, :, ::5] == 0).all()
        for bad in (torch.nan, torch.inf):
            dout, dlse = x.dout.clone(), x.dlse.clone()
            dout[:, :, ::3], dlse[:, :, ::3] = bad, bad
            dirty = run(x._replace(dout=dout, dlse=dlse), pattern, impl)
            for name, a, b in zip(clean._fields, clean, dirty):
                assert torch.equal(a, b), (impl, name)


@settings(max_examples=120, deadline=None)
@given(
    call=calls(), batch=st.integers(1, 2), head_dim=st.integers(1, 12).map(lambda n: 8 * n), group=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES), kinds=st.tuples(*[st.sampled_from(sorted(STRIDES))] * 4),
    scale=st.one_of(st.none(), st.sampled_from([0.0, -1.0, 0.5]), st.floats(-1, 1, width=16)),
    amplitude=st.sampled_from([0.1, 1.0, 3.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_anything(call, batch, head_dim, group, dtype, kinds, scale, amplitude, seed):
    pattern, q_len, kv_len, heads = call
    head_dim = min(head_dim, 32) if dtype == torch.float64 else head_dim
    x = inputs(
        pattern.mask(q_len, kv_len, heads), batch=batch, kv_heads=heads // group if heads % group == 0 else 1, head_dim=head_dim,
        dtype=dtype, scale=scale, amplitude=amplitude, seed=seed,
    )  # fmt: skip
    check_engines(restride(x, *kinds), pattern)
