"""A layout as the CUDA engines read it: work items, runs and masks, on the device. csrc/cuda/tile.h says what they mean."""

from __future__ import annotations

from heapq import heapify, heapreplace
from typing import NamedTuple

import numpy as np
import torch

from sparse_attention.layout import Layout, LayoutPart

QUERIES = 128  # rows of a query tile
WIDE, NARROW = 128, 64  # keys of a tile
SECTION = 4  # heads whose keys and values should stay in the L2 cache together
LONG = 4  # rows so many times as long as the mean go first, whatever their head: they may last as long as all others together
BETWEEN = 1.5  # what a query tile costs beside its key tiles, in key tiles
DEAD, FULL = 1 << 29, (1 << 29) - 1  # marks of a run: see kDead and kFull
SAME = 1 << 30  # beside an item's number in an order: see kSame
ALONE, FIRST, MIDDLE, LAST = range(4)  # see enum Merge


class Part(NamedTuple):
    """One launch: the items of one part of a layout whose sequences have one stride and whose heads merge alike. On the device.

    merge: ALONE, FIRST, MIDDLE or LAST of its heads' parts. has_dead: whether some mark has DEAD.
    """

    stride: int
    merge: int
    has_dead: bool
    work: torch.Tensor  # int32 [tiles of queries, 16]: each processor's first, then the others of each in the order in which it takes them
    starts: torch.Tensor  # int32 [processors + 1]: processor p takes work[p], where there is one, then work[starts[p] : starts[p + 1]]
    runs: torch.Tensor  # int32 [n_runs, 3]
    masks: torch.Tensor
    dead: torch.Tensor  # int64 [n_masks, keys / 64]: keys that no query of the tile sees
    marks: torch.Tensor  # int32 [3, masks of the layout + 1]: what marks become under a block mask; empty without `halves`


def tables(found: Layout, device: torch.device, processors: int, halves: bool = False) -> list[Part]:
    """The launches of a layout on a device that takes so many blocks at a time; `halves` for one that a block mask will filter."""
    merges = merges_of_heads(found)
    parts = []
    for part, merge_of_head in zip(found.parts, merges):
        shared = _shared_tables(found, part, halves)
        items = items_of(found, part)
        if not halves:  # a filter brings its own order
            items, length = _long_first(found, part, items)
        kinds = launches_of(items, merge_of_head)
        for kind in np.unique(kinds):
            mine, (stride, merge) = kinds == kind, divmod(kind, 4)
            work, starts = items[mine], np.zeros(processors + 1, np.int32)
            if not halves:
                work, starts = _shared_out(work, length[mine], processors)
            moved = (torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in (_with_runs(work, part, shared[1]), starts, *shared[1:]))
            parts.append(Part(int(stride), int(merge), shared[0], *moved))
    return parts


def merges_of_heads(found: Layout) -> np.ndarray:
    """Which of a head's parts each part is: int [parts, heads]."""
    has = np.stack([np.diff(part.variant_views.numpy())[part.head_variant.numpy()] > 0 for part in found.parts])
    place, count = has.cumsum(axis=0), has.sum(axis=0)
    later = np.where(place == count, LAST, MIDDLE)
    return np.where(count == 1, ALONE, np.where(place == 1, FIRST, later))


def launches_of(items: np.ndarray, merge_of_head: np.ndarray) -> np.ndarray:
    """Which launch of a part each item is of: four times its stride, and how it merges."""
    return items[:, 8] * np.int64(4) + merge_of_head[items[:, 0]]


def tiles_of_items(part: LayoutPart, items: np.ndarray) -> np.ndarray:
    """How many key tiles each item has."""
    tiles = np.concatenate([[0], np.cumsum(part.runs.numpy()[:, 1])])[part.row_start.numpy()]
    return np.diff(tiles)[items[:, 1]]


def _shared_tables(found: Layout, part: LayoutPart, halves: bool) -> tuple:
    """has_dead, runs, masks, dead and marks of a part."""
    masks, runs = part.masks.numpy(), part.runs.numpy().copy()
    masked, count = runs[:, 2] >= 0, len(masks)
    marks = np.zeros((3, 0), np.int32)
    if halves:
        upper = np.zeros((1, QUERIES, found.tile_k // 64), np.int64)
        upper[:, :64] = -1
        masks = np.concatenate([masks, masks & upper, upper, masks & ~upper, ~upper])
        marks = np.array([[*range(count), FULL], range(count, 2 * count + 1), range(2 * count + 1, 3 * count + 2)], np.int32)
    seen = np.bitwise_or.reduce(masks, axis=1) if len(masks) else np.zeros((0, found.tile_k // 64), np.int64)
    if halves:  # others who would see a hidden key may be kept from it by the block mask
        tiles = [_dead_masks(found, part, seen[variants], alone=True) for variants in marks[:, :count]]
        marks[:, :count] |= np.where(tiles, DEAD, 0).astype(np.int32)
        has_dead = bool(np.any(tiles))
    else:
        dead = _dead_masks(found, part, seen, alone=False)
        runs[masked, 2] |= np.where(dead[runs[masked, 2]], DEAD, 0).astype(np.int32)
        has_dead = bool(dead.any())
    runs[~masked, 2] = FULL
    return has_dead, runs, masks, ~seen, marks


def items_of(found: Layout, part: LayoutPart) -> np.ndarray:
    """One row for each tile of queries of each head: struct Work, with the row of the layout in place of its runs, and q_long, k_long."""
    views, bounds = part.views.numpy(), part.variant_views.numpy()
    of_variant = []  # items of head 0
    for first, stop in zip(bounds, bounds[1:]):
        mine = [np.zeros((0, 12), np.int32)]
        for q_first, k_first, stride, q_count, _, row_base in views[first:stop]:
            tile = np.arange(-(-q_count // found.tile_q), dtype=np.int32)
            columns = [
                0, row_base + tile, tile, q_first % stride, q_first // stride, k_first % stride, k_first // stride,
                q_first, stride, q_count, q_first % stride < found.q_len % stride, k_first % stride < found.kv_len % stride,
            ]
            mine.append(np.stack([np.broadcast_to(column, tile.shape) for column in columns], axis=1).astype(np.int32))
        of_variant.append(np.concatenate(mine))
    work = np.concatenate([of_variant[variant] for variant in part.head_variant.numpy()])
    work[:, 0] = np.repeat(np.arange(found.heads), [len(of_variant[variant]) for variant in part.head_variant.numpy()])
    return work


def _with_runs(work: np.ndarray, part: LayoutPart, runs: np.ndarray) -> np.ndarray:
    """The items as struct Work: int32 [items, 16]."""
    row_start = part.row_start.numpy().astype(np.int32)
    first, end = row_start[work[:, 1]], row_start[work[:, 1] + 1]
    first_run = np.append(runs, [[0, 0, 0]], axis=0)[np.where(first < end, first, -1)]
    columns = [work[:, 0], first, end, *work[:, 2:10].T, work[:, 10] + 2 * work[:, 11], *first_run.T, np.zeros_like(first)]
    return np.stack(columns, axis=1).astype(np.int32)


def _long_first(found: Layout, part: LayoutPart, work: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The work and how many key tiles each item has: long ones first, a few heads at a time."""
    length = tiles_of_items(part, work)
    order = np.lexsort((-length, work[:, 0] // SECTION, length <= LONG * length.mean()))
    return work[order], length[order]


def _shared_out(work: np.ndarray, length: np.ndarray, processors: int) -> tuple[np.ndarray, np.ndarray]:
    """The work in turn to whichever processor is free first: each one's first item, then the others of each, and where these begin."""
    free = [(0.0, p) for p in range(processors)]
    heapify(free)
    taker = np.empty(len(work), np.int64)
    for n, cost in enumerate((length + BETWEEN).tolist()):
        until, p = free[0]
        taker[n] = p
        heapreplace(free, (until + cost, p))
    first = min(processors, len(work))  # the first items go to one processor each, in its turn
    starts = first + np.concatenate([[0], np.cumsum(np.bincount(taker[first:], minlength=processors))])
    return np.concatenate([work[:first], work[first:][np.argsort(taker[first:], kind="stable")]]), starts.astype(np.int32)


def _dead_masks(found: Layout, part: LayoutPart, seen: np.ndarray, alone: bool) -> np.ndarray:
    """bool [n_masks]: whether a mask hides keys that no query of its sequence sees, or of its own tile if `alone`; what is there may
    be NaN. seen: int64 [n_masks, keys / 64], the keys that some query of the tile sees.
    """
    dead = np.zeros(len(seen), dtype=bool)
    runs, row_start = part.runs.numpy(), part.row_start.numpy()
    for _, _, _, q_count, k_count, row_base in part.views.numpy():
        mine = runs[row_start[row_base] : row_start[row_base + -(-q_count // found.tile_q)]]
        masked, full = mine[mine[:, 2] >= 0], mine[mine[:, 2] < 0]
        first = np.cumsum(masked[:, 1]) - masked[:, 1]
        at = np.repeat(masked[:, 0] - first, masked[:, 1]) + np.arange(masked[:, 1].sum())
        tile, one = np.divmod(np.unique(at * np.int64(len(seen)) + np.repeat(masked[:, 2], masked[:, 1])), max(1, len(seen)))
        tiles = -(-k_count // found.tile_k)
        past_the_end = np.arange(tiles * found.tile_k) >= k_count  # read as 0
        covered = np.packbits(past_the_end, bitorder="little").view(np.int64).reshape(-1, seen.shape[1])
        if not alone:
            np.bitwise_or.at(covered, tile, seen[one])
            whole = np.zeros(tiles + 1, np.int64)  # how many runs of full tiles hold a tile, after summing
            np.add.at(whole, full[:, 0], 1)
            np.add.at(whole, full[:, 0] + full[:, 1], -1)
            covered[whole.cumsum()[:-1] > 0] = -1
        dead[one[(~covered[tile] & ~seen[one]).any(axis=1)]] = True
    return dead
