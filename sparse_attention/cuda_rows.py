"""Row lists as the CUDA gather engine reads them: long rows cut into pieces, on the device. csrc/cuda/gather/gather.h says what they mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from sparse_attention import _build_cuda
from sparse_attention.cost import count, scattered
from sparse_attention.patterns.base import Pattern, Tile
from sparse_attention.rows import Rows
from sparse_attention.rows import rows as rows_of

if TYPE_CHECKING:
    from sparse_attention.dispatch import Sizes

PAIRS = 1 << 27  # in the lists of all distinct heads: 512 MiB on the device
SHORTEST = 256  # keys of a piece: joining costs about what so many keys do
WARPS = 16  # that a multiprocessor holds
SHORT = 48  # keys a row on average, up to which the rows of a warp may wait for the longest of them
SHARES = 4  # a row longer than so small a part of one warp's share of all pairs is cut, or it would outlast the others


class Tables(NamedTuple):
    """row_start, columns, head_variant: as in Rows. The others are struct Piece, struct Split and three fields of struct Forward."""

    row_start: torch.Tensor
    columns: torch.Tensor
    head_variant: torch.Tensor
    pieces: torch.Tensor
    splits: torch.Tensor
    longest: int
    together: int
    apart: bool


def obstacle(pattern: Pattern, q_len: int, kv_len: int, heads: int) -> str | None:
    """Why the gather engine on CUDA cannot run a pattern at these sizes, or None."""
    listed, _ = pairs(pattern, q_len, kv_len, heads)
    if listed > PAIRS:
        return f"its lists would hold {listed:,} keys and the gather engine on CUDA takes up to {PAIRS:,} (512 MiB)"
    return None


def pairs(pattern: Pattern, q_len: int, kv_len: int, heads: int) -> tuple[int, int]:
    """Pairs in the lists of all distinct heads, and pairs of all heads."""
    if scattered(pattern):
        found = rows_of(pattern, q_len, kv_len, heads)
        counts = np.diff(found.row_start.numpy()[::q_len])
        return int(counts.sum()), int(counts[found.head_variant.numpy()].sum())
    variants = [pattern.for_head(head) for head in range(heads)]
    counts = {variant: count(variant, q_len, kv_len, 1)[0] for variant in variants}
    return sum(counts.values()), sum(counts[variant] for variant in variants)


def touched(pattern: Pattern, q_len: int, kv_len: int, heads: int, tile: Tile) -> int:
    """Tiles of all heads that hold a pair of a scattered pattern: what its layout would count, without making it."""
    found = rows_of(pattern, q_len, kv_len, heads)
    start, q_tiles, kv_tiles = found.row_start.numpy(), -(-q_len // tile.q), -(-kv_len // tile.k)
    row = np.arange(start.size - 1)
    row = np.repeat(row // q_len * q_tiles + row % q_len // tile.q, np.diff(start))
    tiles = np.unique(row * kv_tiles + found.columns.numpy() // tile.k)
    return int(np.bincount(found.head_variant.numpy())[tiles // (q_tiles * kv_tiles)].sum())


def forward(rows: Rows, sizes: Sizes, device: torch.device) -> tuple[Callable, int]:
    """(q, k, v, scale) -> (out, lse), and how many bytes it keeps."""
    native = _build_cuda.kernels(torch.cuda.get_device_capability(device))
    made = tables(rows, sizes, device, torch.cuda.get_device_properties(device).multi_processor_count)
    table, launch = native.Rows(*made, sizes.q_len, sizes.kv_len), native.gather_forward

    def run(q, k, v, scale):
        return launch(q, k, v, table, scale)

    return run, 2 * rows.nbytes


def tables(rows: Rows, sizes: Sizes, device: torch.device, processors: int) -> Tables:
    """The tables of a device with so many multiprocessors, for a call of these sizes."""
    head_variant = rows.head_variant.numpy()
    together = heads_together(head_variant, sizes.kv_heads, most_together(sizes))
    counts = np.diff(rows.row_start.numpy()).reshape(-1, rows.q_len)
    firsts = head_variant[::together]
    share = sizes.batch * int(counts.sum(axis=1)[firsts].sum()) // (processors * WARPS * SHARES)
    longest = max(SHORTEST, share)
    pieces, splits = cut(counts, firsts, together, longest)

    def moved(x):
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int32)).to(device)

    apart = not len(pieces) and bool(counts[firsts].mean() <= SHORT)
    listed = rows.row_start.to(device), rows.columns.to(device), rows.head_variant.to(device)
    return Tables(*listed, moved(pieces), moved(splits), longest, together, apart)


def most_together(sizes: Sizes) -> int:
    """How many heads there are kernels for: as many as a lane's registers hold, see launch.cuh."""
    if sizes.dtype == torch.float64:
        return 1
    return 2 if sizes.dtype == torch.float32 and sizes.head_dim > 64 else 4


def heads_together(head_variant: np.ndarray, kv_heads: int, most: int = 4) -> int:
    """How many neighbouring heads one warp can take: they share their keys, their values and their lists."""
    group = len(head_variant) // kv_heads
    for together in (4, 2):
        if together <= most and group % together == 0 and (head_variant.reshape(-1, together) == head_variant[::together, None]).all():
            return together
    return 1


def cut(counts: np.ndarray, firsts: np.ndarray, together: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces `[n, 4]` and splits `[m, 4]` of the rows with more than `longest` keys, for every `together` heads.

    counts: keys of each row, `[variants, q_len]`. firsts: the variant of each `together` heads.
    """
    variant, row = np.nonzero(counts > longest)
    long = counts[variant, row]
    parts = -(-long // longest)
    pieces, splits, total = [np.zeros((0, 4), np.int64)], [np.zeros((0, 4), np.int64)], 0
    for number, head_variant in enumerate(firsts):
        here = variant == head_variant
        n, keys, head = parts[here], long[here], np.full(here.sum(), number * together)
        before = np.cumsum(n) - n
        splits.append(np.stack([head, row[here], total + before, n], axis=1))
        at = np.repeat(np.arange(len(n)), n)
        which = np.arange(n.sum()) - before[at]
        start, stop = keys[at] * which // n[at], keys[at] * (which + 1) // n[at]
        pieces.append(np.stack([head[at], row[here][at], start, stop - start], axis=1))
        total += int(n.sum())
    return np.concatenate(pieces), np.concatenate(splits)
