"""Inputs on a CUDA device, what their attention is in float64, and the tiers of the tile engine."""

from __future__ import annotations

import pytest
import torch

from sparse_attention import _build_cuda, cuda_layout


@pytest.fixture(params=_build_cuda.TIERS, autouse=True)
def tier(request, monkeypatch):
    """Every test of a file that imports this runs once for each tier of the tile engine."""
    possible = _build_cuda.tiers(torch.cuda.get_device_capability())
    if request.param not in possible:
        pytest.skip(f"the tier {request.param} is not for this device, which runs {', '.join(possible)}")
    monkeypatch.setenv("SPARSE_ATTENTION_CUDA", request.param)
    monkeypatch.setattr("sparse_attention.engines._engines", {})
    return request.param


@pytest.fixture
def apart(monkeypatch):
    """The parts of a union are launched one after the other, even where one launch is quicker."""
    monkeypatch.setattr(cuda_layout, "LAUNCH", -1e9)


def tensors(batch, heads, kv_heads, q_len, kv_len, head_dim, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    return [torch.randn(batch, *shape, head_dim, device="cuda", generator=generator).to(dtype) for shape in shapes]


def exact(q, k, v, mask, scale=None):
    """(out, lse) in float64. mask: bool [heads, q_len, kv_len]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = (q.double() @ k.mT) * (q.shape[3] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v, scores.logsumexp(-1)


def assert_accurate(q, k, v, pattern, out, lse, clean=None):
    """Row by row at most twice the error that PyTorch makes in this dtype, with a floor of two units in the last place."""
    mask = pattern.mask(q.shape[2], k.shape[2], q.shape[1]).cuda()
    k, v = clean or (k, v)
    right, right_lse = exact(q, k, v, mask)
    group = q.shape[1] // k.shape[1]
    k_all, v_all = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k_all, v_all, attn_mask=mask.unsqueeze(0)).nan_to_num(0.0)
    error, allowed = ((x.double() - right).abs().amax(-1) for x in (out, theirs))
    floor = 2 * torch.finfo(q.dtype).eps * right.abs().amax(-1)
    late = error > 2 * allowed + floor
    assert not late.any(), f"{int(late.sum())} rows, the worst off by {float(error.max()):.2e} where PyTorch is by {float(allowed.max()):.2e}"
    assert torch.equal(lse == -torch.inf, right_lse == -torch.inf)
    assert (lse.double() - right_lse).nan_to_num(0.0, 0.0, 0.0).abs().max() < 1e-3
