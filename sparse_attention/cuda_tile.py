"""The tile engine on a CUDA device, made callable: tables there, then one launch a part."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from sparse_attention import _build_cuda, cuda_blocks, cuda_layout, cuda_tables
from sparse_attention.dispatch import Sizes
from sparse_attention.layout import Layout
from sparse_attention.layout import layout as tiles_of
from sparse_attention.patterns.base import Pattern, Tile


LISTED = 2048  # up to so many keys blocks are tiles of lists too: few tiles of 128 are seen by nobody, and wide ones are quicker


class Ready(NamedTuple):
    """forward: (q, k, v, scale) -> (out, lse), or with a `block_mask` to read. layout, filter: what it launches. nbytes: of its tables."""

    forward: Callable
    layout: object
    filter: object
    nbytes: int


def ready(pattern: Pattern, sizes: Sizes, device: torch.device) -> Ready:
    """The tables of a pattern on the device, and their call."""
    native = _build_cuda.kernels(torch.cuda.get_device_capability(device))
    lengths = sizes.q_len, sizes.kv_len, sizes.heads
    blocks = cuda_blocks.split(pattern, *lengths) if sizes.kv_len > LISTED else None
    if blocks is None:
        wide, processors = _tier(device) == "sm90", _processors(native, device, sizes)
        found = cuda_layout.best_layout(pattern, *lengths, sizes.head_dim, sizes.batch, processors, wide)
        layout, made = _layout(native, found, device, sizes), None
        nbytes = 2 * found.nbytes
    else:
        native, layout = base_of(blocks, sizes, device)
        made = native.filter(layout, cuda_blocks.mask_of(blocks.blocked, *lengths, device), blocks.blocked.block)
        torch.cuda.current_stream(device).synchronize()  # it is kept, and the next call may come on another stream
        nbytes = made.bits.nbytes + made.order.nbytes
    return Ready(_call(native, layout, made), layout, made, nbytes)


def live(blocks: cuda_blocks.Blocks, sizes: Sizes, device: torch.device) -> Ready:
    """The same for live blocks: each call reads its block mask."""
    native, layout = base_of(blocks, sizes, device)
    block = blocks.blocked.block

    def run(q, k, v, scale, block_mask):
        mask = block_mask if block_mask.ndim == 3 else block_mask.unsqueeze(0)
        return _call(native, layout, native.filter(layout, mask, block))(q, k, v, scale)

    return Ready(run, layout, None, 0)


def backward(*_):
    raise NotImplementedError("the sparse engines have no gradient on CUDA yet; use impl='dense'")


def base_of(blocks: cuda_blocks.Blocks, sizes: Sizes, device: torch.device) -> tuple:
    """The compiled module, and the layout of the tiles that a block mask filters."""
    lengths = sizes.q_len, sizes.kv_len, sizes.heads
    layout = _base(blocks.base, blocks.keys(sizes.head_dim), *lengths, sizes.head_dim, device, _tier(device))
    return _build_cuda.kernels(torch.cuda.get_device_capability(device)), layout


@lru_cache(maxsize=32)
def _base(base: Pattern, keys: int, q_len: int, kv_len: int, heads: int, head_dim: int, device: torch.device, tier: str):
    """What block masks filter; `tier` because it may change while the process runs."""
    sizes = Sizes(1, heads, heads, q_len, kv_len, head_dim, torch.bfloat16, "cuda")
    native = _build_cuda.kernels(torch.cuda.get_device_capability(device))
    found = tiles_of(base, q_len, kv_len, heads, Tile(cuda_tables.QUERIES, keys))
    return _layout(native, found, device, sizes, halves=True)


def _layout(native, found: Layout, device: torch.device, sizes: Sizes, halves: bool = False):
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


def _call(native, layout, filter=None):
    launch = native.tile_forward

    def run(q, k, v, scale):
        if scale <= 0:  # the softmax looks for the largest product
            q, scale = (q * 0, 1.0) if scale == 0 else (-q, -scale)
        return launch(q, k, v, layout, scale, filter)

    return run
