"""How much the tile engine computes: of a masked tile, it skips the keys outside each lane group's own range."""

from __future__ import annotations

import numpy as np

from sparse_attention.cost import scattered
from sparse_attention.layout import Layout, LayoutPart, layout
from sparse_attention.patterns.base import Pattern
from sparse_attention.rows import Rows, rows

LANES = 16  # query rows that the engine handles at once; a group with fewer pays for all


def lane_pairs(pattern: Pattern, q_len: int, kv_len: int, heads: int) -> int:
    """(query lane, key) pairs that the forward computes, summed over heads; from whichever table is the smaller one."""
    if scattered(pattern):
        return of_rows(rows(pattern, q_len, kv_len, heads))
    return of_layout(layout(pattern, q_len, kv_len, heads))


def of_layout(table: Layout) -> int:
    uses = np.bincount(table.parts[0].head_variant.numpy())
    return sum(_of_part(part, uses) for part in table.parts)


def of_rows(table: Rows) -> int:
    """As if the lists were one layout part of stride 1."""
    start, columns = table.row_start.numpy(), table.columns.numpy().astype(np.int64)
    if columns.size == 0:
        return 0
    n = np.arange(start.size - 1)
    groups = -(-table.q_len // LANES)
    group = n // table.q_len * groups + n % table.q_len // LANES
    tiles = -(-table.kv_len // 64)
    key = np.repeat(group, np.diff(start)) * tiles + columns // 64
    order = np.argsort(key, kind="stable")
    key, columns = key[order], columns[order]
    first = np.nonzero(np.append(True, key[1:] != key[:-1]))[0]
    keys = np.maximum.reduceat(columns, first) - np.minimum.reduceat(columns, first) + 1
    uses = np.bincount(table.head_variant.numpy())
    return int((LANES * keys * uses[key[first] // tiles // groups]).sum())


def _of_part(part: LayoutPart, uses: np.ndarray) -> int:
    views, variant_views = part.views.numpy(), part.variant_views.numpy()
    view_uses = np.repeat(uses, np.diff(variant_views))
    q_count, row_base = views[:, 3], views[:, 5]
    row_start = part.row_start.numpy()
    rows = row_start.size - 1
    view = np.searchsorted(row_base, np.arange(rows), side="right") - 1
    tile = np.arange(rows) - row_base[view]
    groups = -(-np.minimum(64, q_count[view] - 64 * tile) // LANES)
    row = np.repeat(np.arange(rows), np.diff(row_start))
    _, count, mask = part.runs.numpy().astype(np.int64).T
    ranges = _ranges(part.masks.numpy())[mask]  # mask -1, a full tile, is the last row
    computed = np.where(np.arange(4) < groups[row][:, None], ranges, 0).sum(axis=1)
    return int((LANES * computed * count * view_uses[view[row]]).sum())


def _ranges(masks: np.ndarray) -> np.ndarray:
    """int64 [n_masks + 1, 4]: keys from the first to the last that each group of lanes of a mask sees; of a full tile at the end."""
    words = np.bitwise_or.reduce(masks[:, :, 0].reshape(-1, 4, LANES), axis=2)
    bits = np.unpackbits(words.astype("<i8")[..., None].view(np.uint8), axis=-1, bitorder="little").astype(bool)
    last = 64 - np.argmax(bits[..., ::-1], axis=-1)
    keys = np.where(bits.any(axis=-1), last - np.argmax(bits, axis=-1), 0)
    return np.concatenate([keys, np.full((1, 4), 64)])
