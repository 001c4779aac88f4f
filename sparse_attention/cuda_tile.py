"""The tile engine on a CUDA device, made callable: tables there, then one launch a part."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparse_attention import _build_cuda, cuda_blocks, cuda_tables
from sparse_attention.dispatch import Sizes
from sparse_attention.patterns.base import Pattern


def forward(pattern: Pattern, sizes: Sizes, device: torch.device) -> tuple[Callable, int]:
    """(q, k, v, scale) -> (out, lse), and how many bytes it keeps."""
    native = _build_cuda.kernels(torch.cuda.get_device_capability(device))
    lengths = sizes.q_len, sizes.kv_len, sizes.heads
    blocks = cuda_blocks.split(pattern, *lengths)
    if blocks is None:
        found = cuda_tables.best_layout(pattern, *lengths, sizes.head_dim, wide=_tier(device) == "sm90")
        table = _table(native, found, device, sizes, halves=False)
        return _call(native, table), 2 * found.nbytes
    found = blocks.layout(*lengths, sizes.head_dim)
    table = _table(native, found, device, sizes, halves=True)
    made = native.filter(table, cuda_blocks.mask_of(blocks.blocked, *lengths, device), blocks.blocked.block)
    return _call(native, table, made), 2 * found.nbytes + made.bits.nbytes + made.order.nbytes


def live_forward(blocks: cuda_blocks.Blocks, sizes: Sizes, device: torch.device) -> tuple[Callable, int]:
    """The same for live blocks: (q, k, v, scale, block_mask) -> (out, lse); the mask is read by each call."""
    native = _build_cuda.kernels(torch.cuda.get_device_capability(device))
    found, block = blocks.layout(sizes.q_len, sizes.kv_len, sizes.heads, sizes.head_dim), blocks.blocked.block
    table = _table(native, found, device, sizes, halves=True)

    def run(q, k, v, scale, block_mask):
        mask = block_mask if block_mask.ndim == 3 else block_mask.unsqueeze(0)
        return _call(native, table, native.filter(table, mask, block))(q, k, v, scale)

    return run, 2 * found.nbytes


def filtered(blocks: cuda_blocks.Blocks, sizes: Sizes, device: torch.device) -> tuple:
    """The filter of a block pattern, made anew, and the items that it orders: int32 [items, 12]."""
    native = _build_cuda.kernels(torch.cuda.get_device_capability(device))
    lengths = sizes.q_len, sizes.kv_len, sizes.heads
    found = blocks.layout(*lengths, sizes.head_dim)
    (part,) = cuda_tables.tables(found, device, _processors(native, device, sizes), halves=True)
    table = native.Layout([native.Part(*part)], sizes.heads, sizes.q_len, sizes.kv_len, found.tile_k, int(_tier(device)[2:]))
    return native.filter(table, cuda_blocks.mask_of(blocks.blocked, *lengths, device), blocks.blocked.block), part.work


def backward(*_):
    raise NotImplementedError("the sparse engines have no gradient on CUDA yet; use impl='dense'")


def _table(native, found, device, sizes, halves):
    parts = [native.Part(*part) for part in cuda_tables.tables(found, device, _processors(native, device, sizes), halves)]
    return native.Layout(parts, sizes.heads, sizes.q_len, sizes.kv_len, found.tile_k, int(_tier(device)[2:]))


def _tier(device: torch.device) -> str:
    return _build_cuda.tier(torch.cuda.get_device_capability(device))


def _processors(native, device: torch.device, sizes: Sizes) -> int:
    """How many blocks the device holds at a time."""
    each = 1
    if _tier(device) == "sm80":
        with torch.cuda.device(device):
            each = max(1, native.sm80_resident_blocks(sizes.head_dim))
    return each * torch.cuda.get_device_properties(device).multi_processor_count


def _call(native, table, filter=None):
    launch = native.tile_forward

    def run(q, k, v, scale):
        if scale <= 0:  # the softmax looks for the largest product
            q, scale = (q * 0, 1.0) if scale == 0 else (-q, -scale)
        return launch(q, k, v, table, scale, filter)

    return run
