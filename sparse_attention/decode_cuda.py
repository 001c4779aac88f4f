"""`decode` on a CUDA device: what its kernels take, and the call."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sparse_attention import _build_cuda

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_BLOCKS = 65535  # along an axis of a grid: requests, and tiles of 16 rows or more of each; csrc/cuda/decode/plan.h knows them
modules: dict = {}  # the compiled module, by the number of each device that it has run on


def obstacle(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> str | None:
    """Why the compiled kernels cannot run a call whose arguments were checked, or None."""
    if q.dtype not in DTYPES:
        return f"q has dtype {q.dtype} and the CUDA kernels take bfloat16, float16 and float32"
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not aligned(cache):
            return f"{name} has strides {cache.stride()}, which are no multiples of 16 bytes at an address that is one"
    return device_obstacle(torch.cuda.get_device_capability(q.device))


device_obstacle = functools.cache(_build_cuda.obstacle)  # it looks for nvcc, which is not for every call


def aligned(x: Tensor) -> bool:
    """Whether the kernels read it where it lies: rows of a contiguous last dimension at multiples of 16 bytes."""
    return x.data_ptr() % 16 == 0 and not any(s * x.element_size() % 16 or s <= 0 for s, n in zip(x.stride()[:3], x.shape) if n > 1)


def forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | int,
    ancestors: Tensor | None,
    window: int,
    sinks: int,
    block_table: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out, lse), as `decode` has them."""
    native = _build_cuda.kernels(torch.cuda.get_device_capability(q.device))
    modules[q.device.index] = native
    if scale <= 0:  # the softmax looks for the largest product
        q, scale = (q * 0, 1.0) if scale == 0 else (-q, -scale)
    table = None if block_table is None else block_table.int().contiguous()
    words = None if ancestors is None else ancestors.contiguous()
    one = isinstance(lengths, int)
    given = (None, lengths) if one else (lengths.contiguous(), 0)
    return native.decode_forward(q, k_cache, v_cache, *given, words, window, sinks, table, scale)
