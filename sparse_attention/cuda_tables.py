"""A layout as the CUDA engines read it: work items, runs and masks, on the device. csrc/cuda/tile.h says what they mean."""

from __future__ import annotations

from heapq import heapify, heapreplace
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch

from sparse_attention.grid import tiles_at_most
from sparse_attention.layout import Layout, LayoutPart, layout
from sparse_attention.patterns.base import Lengths, Pattern, Tile, quotient_lengths
from sparse_attention.patterns.grouping import ALL, grouped_parts

QUERIES = 128  # rows of a query tile
WIDE, NARROW = 128, 64  # keys of a tile
NARROW_COST = 1.15  # a pair of a narrow tile costs so much more than one of a wide tile
SECTION = 4  # heads whose keys and values should stay in the L2 cache together
LONG = 4  # rows so many times as long as the mean go first, whatever their head: they may last as long as all others together
BETWEEN = 1.5  # what a query tile costs beside its key tiles, in key tiles
# In keys of a wide tile, of which an H100 takes 76 a us on each multiprocessor: what a launch costs, and to read or write once the float32
# outputs of a query tile between two launches.
LAUNCH, PARTIAL = 256, 256
HOPE = 1.3  # spans of a union count twice what two of its members see: layouts may be done so much sooner than these say
DEAD, FULL = 1 << 29, (1 << 29) - 1  # marks of a run: see kDead and kFull
ALONE, FIRST, MIDDLE, LAST = range(4)  # see enum Merge
PASSES = 0, 1, 2, 1  # of each of them over the outputs between launches


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


def best_layout(
    pattern: Pattern, q_len: int, kv_len: int, heads: int, head_dim: int, batch: int = 1, processors: int = 132, wide: bool = True
) -> Layout:
    """The layout with which so many processors should be done first. wide: whether the tier gains by wide tiles."""

    def best(together):
        keys = [NARROW, WIDE] if wide and head_dim <= 128 else [NARROW]
        found = [layout(pattern, q_len, kv_len, heads, Tile(QUERIES, n), together) for n in keys]
        return min(((finishing_time(one, batch, processors), one) for one in found), key=itemgetter(0))

    chosen = best(1)
    strides = [part.stride for part in chosen[1].parts]
    for together in (2, ALL) if strides != [1] else ():
        if time_at_most(pattern, q_len, kv_len, heads, batch, processors, together) < HOPE * chosen[0]:
            chosen = min(chosen, best(together), key=itemgetter(0))
    return chosen[1]


def finishing_time(found: Layout, batch: int, processors: int) -> float:
    """About when so many processors are done, in keys of a wide tile: launches follow each other, and none ends before its longest item."""
    each, time = found.tile_k * (NARROW_COST if found.tile_k == NARROW else 1.0), 0.0
    for part, merge_of_head in zip(found.parts, _merges(found)):
        items = _work(found, part)
        kinds, passes = _kinds(items, merge_of_head), np.array(PASSES)[merge_of_head[items[:, 0]]]
        keys = _lengths(part, items) * each + passes * PARTIAL
        time += sum(_launch_time(keys[kinds == kind], batch, processors) for kind in np.unique(kinds))
    return time


def _launch_time(keys: np.ndarray, batch: int, processors: int) -> float:
    cost = keys + BETWEEN * WIDE
    return float(LAUNCH + max(cost.max(), batch * cost.sum() / processors))


def time_at_most(pattern: Pattern, q_len: int, kv_len: int, heads: int, batch: int, processors: int, together: int) -> float:
    """What `finishing_time` of a grouping hardly exceeds, by the spans of its parts and without its layout."""
    of_head, lengths = [pattern.for_head(h) for h in range(heads)], Lengths(q_len, kv_len)
    keys = {head: _keys_at_most(head, lengths, together) for head in set(of_head)}
    launches = max(map(len, keys.values()))
    return sum(_launch_time(np.concatenate([keys[h][n] for h in of_head if n < len(keys[h])]), batch, processors) for n in range(launches))


def _keys_at_most(pattern: Pattern, lengths: Lengths, together: int) -> list[np.ndarray]:
    """For each part, what each tile of its queries costs: keys, and passes over the outputs between launches."""
    parts, found = grouped_parts(pattern, lengths, together), []
    for number, part in enumerate(parts):
        inner = [(part.of_residue(c), quotient_lengths(lengths, part.stride, c)) for c in range(part.stride)]
        tiles = {key: tiles_at_most(*key, Tile(QUERIES, WIDE)) for key in set(inner) if key[1].q_len}
        passes = (number > 0) + (number < len(parts) - 1)
        found.append(WIDE * np.concatenate([tiles[key] for key in inner if key in tiles]) + passes * PARTIAL)
    return found


def _kinds(items: np.ndarray, merge_of_head: np.ndarray) -> np.ndarray:
    """Which launch of a part each item is of: four times its stride, and how it merges."""
    return items[:, 8] * np.int64(4) + merge_of_head[items[:, 0]]


def _lengths(part: LayoutPart, items: np.ndarray) -> np.ndarray:
    """How many key tiles each item has."""
    tiles = np.concatenate([[0], np.cumsum(part.runs.numpy()[:, 1])])[part.row_start.numpy()]
    return np.diff(tiles)[items[:, 1]]


def tables(found: Layout, device: torch.device, processors: int, halves: bool = False) -> list[Part]:
    """The launches of a layout on a device that takes so many blocks at a time; `halves` for one that a block mask will filter."""
    merges = _merges(found)
    parts = []
    for part, merge_of_head in zip(found.parts, merges):
        shared = _shared_tables(found, part, halves)
        items = _work(found, part)
        if not halves:  # a filter brings its own order
            items, length = _long_first(found, part, items)
        kinds = _kinds(items, merge_of_head)
        for kind in np.unique(kinds):
            mine, (stride, merge) = kinds == kind, divmod(kind, 4)
            work, starts = items[mine], np.zeros(processors + 1, np.int32)
            if not halves:
                work, starts = _shared_out(work, length[mine], processors)
            moved = (torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in (_with_runs(work, part, shared[1]), starts, *shared[1:]))
            parts.append(Part(int(stride), int(merge), shared[0], *moved))
    return parts


def _merges(found: Layout) -> np.ndarray:
    """Which of a head's parts each part is: int [parts, heads]."""
    has = np.stack([np.diff(part.variant_views.numpy())[part.head_variant.numpy()] > 0 for part in found.parts])
    place, count = has.cumsum(axis=0), has.sum(axis=0)
    later = np.where(place == count, LAST, MIDDLE)
    return np.where(count == 1, ALONE, np.where(place == 1, FIRST, later))


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


def _work(found: Layout, part: LayoutPart) -> np.ndarray:
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
    length = _lengths(part, work)
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
