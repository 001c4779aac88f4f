"""`decode` on a CUDA device: what its kernel takes, and the call."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sparse_attention import _build_cuda


def obstacle(q: Tensor, k_cache: Tensor, v_cache: Tensor, ancestors: Tensor | None, window: int) -> str | None:
    """Why the compiled kernel cannot run a call whose arguments were checked, or None."""
    capability = torch.cuda.get_device_capability(q.device)
    if "sm90" not in _build_cuda.tiers(capability):
        return f"the device has compute capability {capability[0]}.{capability[1]} and the kernel is written for 9.0"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"q has dtype {q.dtype} and the CUDA kernel takes bfloat16 and float16"
    if ancestors is not None and 0 <= window < q.shape[2]:
        return f"window is {window}, less than the {q.shape[2]} nodes of a tree"
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.data_ptr() % 16 or any(s % 8 for s, n in zip(cache.stride()[:3], cache.shape) if n > 1):
            return f"{name} has strides {cache.stride()}, which are no multiples of 8 elements at an address that is one of 16 bytes"
    return _device_obstacle(capability)


_device_obstacle = functools.cache(_build_cuda.obstacle)  # it looks for nvcc, which is not for every call


def forward(q, k_cache, v_cache, lengths, ancestors, window, sinks, block_table, scale) -> tuple[Tensor, Tensor]:
    """(out, lse), as `decode` has them."""
    native = _build_cuda.kernels(torch.cuda.get_device_capability(q.device))
    if scale <= 0:  # the softmax looks for the largest product
        q, scale = (q * 0, 1.0) if scale == 0 else (-q, -scale)
    table = None if block_table is None else block_table.int().contiguous()
    words = None if ancestors is None else ancestors.contiguous()
    return native.decode_forward(q, k_cache, v_cache, lengths.contiguous(), words, window, sinks, table, scale)

