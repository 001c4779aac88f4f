"""What no query may see must not matter, and no output may come from memory that nobody wrote."""

import pytest
import torch

from sparse_attention import attention
from tests.cases import CASES

IDS = [case.id for case in CASES]


def tensors(case, dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(case.id))
    q = torch.randn(1, case.heads, case.q_len, 24, generator=generator).to(dtype)
    k, v = (torch.randn(1, case.heads, case.kv_len, 24, generator=generator).to(dtype) for _ in range(2))
    return q, k, v


@pytest.mark.parametrize("poison", (float("nan"), float("inf")))
@pytest.mark.parametrize("impl", ("tile", "gather"))
@pytest.mark.parametrize("number", range(len(CASES)), ids=IDS)
def test_unseen_keys_and_values_do_not_matter(number, impl, poison):
    case = CASES[number]
    pattern = case.make()
    q, k, v = tensors(case)
    unseen = ~pattern.mask(case.q_len, case.kv_len, case.heads).any(dim=1)  # [heads, kv_len]
    dout = torch.randn_like(q)

    def everything(k, v):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = attention(*leaves, pattern, impl=impl, return_lse=True)
        return out, lse, *torch.autograd.grad(out, leaves, dout)

    clean = everything(k, v)
    poisoned = everything(*(x.masked_fill(unseen[None, :, :, None], poison) for x in (k, v)))
    for before, after in zip(clean, poisoned):
        assert torch.equal(before, after)


@pytest.mark.parametrize("impl", ("tile", "gather"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("number", range(0, len(CASES), 2), ids=lambda n: CASES[n].id)
def test_outputs_start_as_nan(number, dtype, impl):
    case = CASES[number]
    q, k, v = tensors(case, dtype)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    assert torch.isnan(torch.empty(8)).all()
    try:
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, lse = attention(*leaves, case.make(), impl=impl, return_lse=True)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    finally:
        torch.use_deterministic_algorithms(False)
    for x in (out, lse, *grads):
        assert not torch.isnan(x).any()


@pytest.mark.parametrize("impl", ("tile", "gather"))
def test_neighbours_in_memory_are_not_read_or_written(impl):
    from sparse_attention import SlidingWindow

    memory = torch.full((3, 2, 200, 64), torch.nan)
    q, k, v = (memory[n, None, :, 50:150, 16:48] for n in range(3))
    for x in (q, k, v):
        x.copy_(torch.randn(x.shape))
    before = memory.clone()
    out = attention(q, k, v, SlidingWindow(30), impl=impl)
    assert torch.isfinite(out).all()
    assert torch.equal(torch.nan_to_num(memory, nan=7.0), torch.nan_to_num(before, nan=7.0))
