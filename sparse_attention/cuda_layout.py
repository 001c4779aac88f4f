"""Which layout of a pattern a CUDA device is done with first: how wide its tiles are, and how many parts a union has."""

from __future__ import annotations

from operator import itemgetter

import numpy as np

from sparse_attention.cuda_tables import BETWEEN, NARROW, QUERIES, WIDE, items_of, launches_of, merges_of_heads, tiles_of_items
from sparse_attention.grid import tiles_at_most
from sparse_attention.layout import Layout, layout
from sparse_attention.patterns.base import Lengths, Pattern, Tile, quotient_lengths
from sparse_attention.patterns.grouping import ALL, grouped_parts

NARROW_COST = 1.15  # a pair of a narrow tile costs so much more than one of a wide tile
# In keys of a wide tile, of which an H100 takes 76 a us on each multiprocessor: what a launch costs, and to read or write once the float32
# outputs of a query tile between two launches.
LAUNCH, PARTIAL = 256, 256
HOPE = 1.3  # spans of a union count twice what two of its members see: layouts may be done so much sooner than these say
PASSES = np.array([0, 1, 2, 1])  # over those outputs, of ALONE, FIRST, MIDDLE and LAST


def best_layout(
    pattern: Pattern, q_len: int, kv_len: int, heads: int, head_dim: int, batch: int = 1, processors: int = 132, wide: bool = True
) -> Layout:
    """The layout with which so many processors should be done first. wide: whether the tier gains by wide tiles."""
    pattern = pattern.frozen()

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
    for part, merge_of_head in zip(found.parts, merges_of_heads(found)):
        items = items_of(found, part)
        kinds, passes = launches_of(items, merge_of_head), PASSES[merge_of_head[items[:, 0]]]
        keys = tiles_of_items(part, items) * each + passes * PARTIAL
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
