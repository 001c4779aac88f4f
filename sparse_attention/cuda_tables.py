"""A layout as the CUDA engines read it: work items, runs and masks, on the device. csrc/cuda/sm90/forward.cuh says what they mean."""

from __future__ import annotations

from heapq import heapify, heapreplace
from typing import NamedTuple

import numpy as np
import torch

from sparse_attention.layout import Layout, LayoutPart, layout
from sparse_attention.patterns.base import Pattern, Tile

QUERIES = 128  # rows of a query tile
WIDE, NARROW = 128, 64  # keys of a tile
NARROW_COST = 1.15  # a pair of a narrow tile costs so much more than one of a wide tile
SECTION = 4  # heads whose keys and values should stay in the L2 cache together
LONG = 4  # rows so many times as long as the mean go first, whatever their head: they may last as long as all others together
BETWEEN = 1.5  # what a query tile costs beside its key tiles, in key tiles
DEAD, FULL = 1 << 29, (1 << 29) - 1  # marks of a run: see kDead and kFull


class Part(NamedTuple):
    """One part of a layout. stride: of its sequences. has_dead: whether some run holds keys that no query sees."""

    stride: int
    has_dead: bool
    work: torch.Tensor  # int32 [tiles of queries, 12], in the order in which they are taken, processor by processor
    starts: torch.Tensor  # int32 [processors + 1]: processor p takes work[starts[p] : starts[p + 1]]
    row_start: torch.Tensor
    runs: torch.Tensor  # int32 [n_runs, 3]
    masks: torch.Tensor
    dead: torch.Tensor  # int64 [n_masks, keys / 64]: keys that no query of the tile sees


def obstacle(pattern: Pattern, q_len: int, kv_len: int, heads: int) -> str | None:
    """Why the tile engine on CUDA cannot run a pattern, or None."""
    found = layout(pattern, q_len, kv_len, heads, Tile(QUERIES, NARROW))
    if any(len(torch.unique(part.views[:, 2])) > 1 for part in found.parts):
        return "its heads have different strides, which the CUDA engine cannot run in one part"
    return None


def best_layout(pattern: Pattern, q_len: int, kv_len: int, heads: int, head_dim: int) -> Layout:
    """The layout with the keys a tile that should take less time."""
    narrow = layout(pattern, q_len, kv_len, heads, Tile(QUERIES, NARROW))
    if head_dim > 128:
        return narrow
    wide = layout(pattern, q_len, kv_len, heads, Tile(QUERIES, WIDE))
    saves = NARROW_COST * NARROW * narrow.counts.visited < WIDE * wide.counts.visited
    return narrow if saves else wide


def tables(found: Layout, device: torch.device, processors: int) -> list[Part]:
    """The parts of a layout on a device with so many multiprocessors."""
    return [_part(found, part, device, processors) for part in found.parts]


def _part(found: Layout, part: LayoutPart, device: torch.device, processors: int) -> Part:
    runs = part.runs.numpy().copy()
    seen = _columns(part, found.tile_k // 64)
    dead = _dead_masks(found, part, seen)
    masked = runs[:, 2] >= 0
    runs[masked, 2] |= np.where(dead[runs[masked, 2]], DEAD, 0).astype(np.int32)
    runs[~masked, 2] = FULL
    work, starts = _shared_out(*_work(found, part), processors)

    def moved(x):
        return torch.from_numpy(np.ascontiguousarray(x)).to(device)

    row_start, masks = part.row_start.to(device), part.masks.to(device)
    return Part(int(part.views[0, 2]), bool(dead.any()), moved(work), moved(starts), row_start, moved(runs), masks, moved(~seen))


def _work(found: Layout, part: LayoutPart) -> tuple[np.ndarray, np.ndarray]:
    """One row for each tile of queries of each head, as struct Work, and its number of key tiles: long ones first, a few heads at
    a time.
    """
    views, bounds = part.views.numpy(), part.variant_views.numpy()
    items = []
    for head, variant in enumerate(part.head_variant.numpy()):
        for q_first, k_first, stride, q_count, _, row_base in views[bounds[variant] : bounds[variant + 1]]:
            tile = np.arange(-(-q_count // found.tile_q), dtype=np.int32)
            columns = [
                head, row_base + tile, tile, q_first % stride, q_first // stride, k_first % stride, k_first // stride,
                q_first, stride, q_count, q_first % stride < found.q_len % stride, k_first % stride < found.kv_len % stride,
            ]
            items.append(np.stack([np.broadcast_to(column, tile.shape) for column in columns], axis=1))
    work = np.concatenate(items).astype(np.int32)
    tiles = np.concatenate([[0], np.cumsum(part.runs.numpy()[:, 1])])[part.row_start.numpy()]
    length = np.diff(tiles)[work[:, 1]]
    order = np.lexsort((-length, work[:, 0] // SECTION, length <= LONG * length.mean()))
    return work[order], length[order]


def _shared_out(work: np.ndarray, length: np.ndarray, processors: int) -> tuple[np.ndarray, np.ndarray]:
    """The work in turn to whichever processor is free first, and where each processor's begins."""
    free = [(0.0, p) for p in range(processors)]
    heapify(free)
    taker = np.empty(len(work), np.int64)
    for n, cost in enumerate((length + BETWEEN).tolist()):
        until, p = free[0]
        taker[n] = p
        heapreplace(free, (until + cost, p))
    starts = np.concatenate([[0], np.cumsum(np.bincount(taker, minlength=processors))])
    return work[np.argsort(taker, kind="stable")], starts.astype(np.int32)


def _columns(part: LayoutPart, words: int) -> np.ndarray:
    """int64 [n_masks, words]: the keys of each mask that some query sees."""
    masks = part.masks.numpy()
    return np.bitwise_or.reduce(masks, axis=1) if len(masks) else np.zeros((0, words), np.int64)


def _dead_masks(found: Layout, part: LayoutPart, seen: np.ndarray) -> np.ndarray:
    """bool [n_masks]: whether a mask hides keys that no query of its sequence sees; what is there may be NaN."""
    dead = np.zeros(len(seen), dtype=bool)
    everything = np.append(seen, np.full((1, seen.shape[1]), -1, np.int64), axis=0)  # the last for full tiles
    runs, row_start = part.runs.numpy(), part.row_start.numpy()
    for _, _, _, q_count, k_count, row_base in part.views.numpy():
        mine = runs[row_start[row_base] : row_start[row_base + -(-q_count // found.tile_q)]]
        first = np.cumsum(mine[:, 1]) - mine[:, 1]
        at = np.repeat(mine[:, 0] - first, mine[:, 1]) + np.arange(mine[:, 1].sum())
        mask = np.repeat(mine[:, 2], mine[:, 1])
        past_the_end = np.arange(-(-k_count // found.tile_k) * found.tile_k) >= k_count  # read as 0
        covered = np.packbits(past_the_end, bitorder="little").view(np.int64).reshape(-1, seen.shape[1])
        tile, one = np.unique(np.stack([at, mask]), axis=1)
        np.bitwise_or.at(covered, tile, everything[one])
        hides = (~covered[tile] & ~everything[one]).any(axis=1)
        dead[one[hides & (one >= 0)]] = True
    return dead
