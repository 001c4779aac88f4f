"""The tiles of one sequence: from a pattern's promises to runs and masks, without visiting n^2 pairs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sparse_attention.masks import pack, popcount
from sparse_attention.patterns.base import Lengths, Pattern, Rects, Spans, Tile

# Pairs evaluated at once: their int64 temporaries stay in a second-level cache.
BATCH_PAIRS = 1 << 18


@dataclass(frozen=True, eq=False)
class Grid:
    """Tiles of one sequence. `runs` (first tile, count, mask) are grouped by query tile; -1 marks a full run."""

    row_counts: np.ndarray  # int64 [rows]: runs of each query tile
    runs: np.ndarray  # int64 [n_runs, 3]
    masks: np.ndarray  # int64 [n_masks, tile.q, tile.k // 64]
    counts: np.ndarray  # int64 [3]: full tiles, partial tiles, allowed pairs

    @property
    def rows(self) -> int:
        return len(self.row_counts)

    def runs_with(self, number: np.ndarray) -> np.ndarray:
        """The runs as int32, mask m called number[m]."""
        runs = self.runs.astype(np.int32)
        runs[:, 2] = np.concatenate([number, [-1]])[self.runs[:, 2]]
        return runs


def grid_of(pattern: Pattern, lengths: Lengths, tile: Tile) -> Grid:
    """The grid of one sequence that follows `pattern`, which must be that of a single head."""
    rows = -(-lengths.q_len // tile.q)
    row, first, stop = _tile_ranges(pattern, lengths, tile, rows)
    full, mixed = _divide(pattern, lengths, tile, row, first, stop)
    partial_row, partial_tile, number, masks = _evaluate(pattern, lengths, tile, *mixed)
    row = np.concatenate([full[0], partial_row])
    first = np.concatenate([full[1], partial_tile])
    stop = np.concatenate([full[2], partial_tile + 1])
    mask = np.concatenate([np.full(len(full[0]), -1), number])
    heights = np.minimum(lengths.q_len - row * tile.q, tile.q)
    is_full = mask < 0
    tiles = stop - first
    bits = np.append(popcount(masks), 0)[mask]
    counts = np.array(
        [
            tiles[is_full].sum(),
            tiles[~is_full].sum(),
            (tiles * heights * tile.k)[is_full].sum() + bits[~is_full].sum(),
        ],
        dtype=np.int64,
    )
    row, runs = _runs(row, first, stop, mask)
    return Grid(np.bincount(row, minlength=rows), runs, masks, counts)


def tiles_at_most(pattern: Pattern, lengths: Lengths, tile: Tile) -> np.ndarray:
    """int64 [query tiles]: how many key tiles of the pattern of a single head each visits at most, by its spans."""
    rows = -(-lengths.q_len // tile.q)
    row, first, stop = _tile_ranges(pattern, lengths, tile, rows)
    return np.bincount(row, weights=stop - first, minlength=rows).astype(np.int64)


def _tile_ranges(pattern, lengths, tile, rows):
    """Ascending ranges of key tiles [first, stop) of each query tile that hold all that it sees."""
    i0 = np.arange(rows, dtype=np.int64) * tile.q + lengths.offset
    i1 = np.minimum(i0 + tile.q, lengths.kv_len)
    spans = pattern.spans(i0, i1 - 1, lengths)
    start, stop = np.maximum(spans.start, 0), np.minimum(spans.stop, lengths.kv_len)
    keep = start < stop
    row, first, stop = Spans(spans.group, start // tile.k, -(-stop // tile.k)).pick(keep).merged()
    # A last key tile that is not whole is never full: it stands alone.
    whole = lengths.kv_len // tile.k
    cut = (first < whole) & (stop > whole)
    row = np.concatenate([row, row[cut]])
    first = np.concatenate([first, np.full(cut.sum(), whole)])
    stop = np.concatenate([np.where(cut, whole, stop), stop[cut]])
    return row, first, stop


def _divide(pattern, lengths, tile, row, first, stop):
    """Split ranges until each is full, empty (dropped) or one mixed tile; windows are mixed at their ends only."""
    whole = lengths.kv_len // tile.k
    full, mixed = [], []
    step = 0
    while row.size:
        rects = _rects(lengths, tile, row, first, stop)
        keep = ~pattern.empty(rects, lengths)
        surely = pattern.full(rects, lengths) & (stop <= whole) & keep
        single = (stop - first == 1) & keep & ~surely
        full.append((row[surely], first[surely], stop[surely]))
        mixed.append((row[single], first[single]))
        rest = keep & ~surely & ~single
        row, first, stop = row[rest], first[rest], stop[rest]
        middle = (first + stop) // 2
        cuts = (first, first + 1, stop - 1, stop) if step == 0 else (first, middle, stop)
        row = np.concatenate([row] * (len(cuts) - 1))
        first, stop = np.concatenate(cuts[:-1]), np.concatenate(cuts[1:])
        some = first < stop
        row, first, stop = row[some], first[some], stop[some]
        step += 1
    none = np.zeros(0, dtype=np.int64)
    return (
        tuple(map(np.concatenate, zip(*full))) if full else (none, none, none),
        tuple(map(np.concatenate, zip(*mixed))) if mixed else (none, none),
    )


def _rects(lengths, tile, row, first, stop):
    i0 = row * tile.q + lengths.offset
    return Rects(i0, np.minimum(i0 + tile.q, lengths.kv_len), first * tile.k, np.minimum(stop * tile.k, lengths.kv_len))


def _evaluate(pattern, lengths, tile, row, column):
    """Bits of the mixed tiles, once for each signature. Returns row, key tile, mask number (-1: full) and the masks."""
    rects = _rects(lengths, tile, row, column, column + 1)
    height, width = rects.i1 - rects.i0, rects.j1 - rects.j0
    size = height * (tile.k + 1) + width
    kind = np.unique(pattern.signature(rects, lengths), return_inverse=True)[1].reshape(-1)
    kind = kind * ((tile.q + 1) * (tile.k + 1)) + size
    _, example, kind = np.unique(kind, return_index=True, return_inverse=True)
    kind = kind.reshape(-1)
    masks, some, every = _bits(pattern, lengths, tile, Rects(*(side[example] for side in rects)))
    masks, (number,) = unique_masks([masks[some & ~every]], tile)
    names = np.full(len(example), -1, dtype=np.int64)
    names[some & ~every] = number
    keep = some[kind]
    return row[keep], column[keep], names[kind][keep], masks


def _bits(pattern, lengths, tile, rects):
    """Masks of tiles, whether any pair is allowed, and whether every pair of a whole tile (or of its rows) is."""
    n = rects.i0.size
    masks = np.empty((n, tile.q, tile.k // 64), dtype=np.int64)
    batch = max(1, BATCH_PAIRS // (tile.q * tile.k))
    down, right = np.arange(tile.q), np.arange(tile.k)
    for at in range(0, n, batch):
        some = Rects(*(side[at : at + batch] for side in rects))
        bits = pattern.bits(some, tile, lengths)
        height, width = some.i1 - some.i0, some.j1 - some.j0
        if np.any(height < tile.q) or np.any(width < tile.k):
            bits = bits & (down < height[:, None])[:, :, None] & (right < width[:, None])[:, None, :]
        masks[at : at + batch] = pack(bits)
    some = masks.any(axis=(1, 2))
    past = down[None, :] >= (rects.i1 - rects.i0)[:, None]
    every = ((masks == -1).all(axis=2) | past).all(axis=1)
    return masks, some, every


def unique_masks(tables: list[np.ndarray], tile: Tile) -> tuple[np.ndarray, list[np.ndarray]]:
    """The distinct masks of several tables, and for each table the number of each of its masks."""
    masks = np.concatenate(tables)
    flat = masks.reshape(len(masks), tile.q * tile.k // 64)
    hashes = (flat.view(np.uint64) * _weights(flat.shape[1])).sum(axis=1, dtype=np.uint64)
    _, example, number = np.unique(hashes, return_index=True, return_inverse=True)
    number = number.reshape(-1)
    if not np.array_equal(flat[example[number]], flat):
        _, example, number = np.unique(flat, axis=0, return_index=True, return_inverse=True)
        number = number.reshape(-1)
    return masks[example], np.split(number, np.cumsum([len(table) for table in tables])[:-1])


@lru_cache
def _weights(words: int) -> np.ndarray:
    """Random odd factors that turn the words of a mask into one hash."""
    return np.random.default_rng(0).integers(1, 2**63, words, dtype=np.uint64) | np.uint64(1)


def _runs(row, first, stop, mask):
    """Sort by row and key tile; neighbours with one mask become one run."""
    order = np.argsort(row * (int(stop.max(initial=0)) + 1) + first, kind="stable")
    row, first, stop, mask = row[order], first[order], stop[order], mask[order]
    joins = (row[1:] == row[:-1]) & (mask[1:] == mask[:-1]) & (first[1:] == stop[:-1])
    opens = np.nonzero(np.concatenate([[True], ~joins]))[0][: row.size]
    last = np.append(opens[1:] - 1, row.size - 1)[: opens.size]
    return row[opens], np.stack([first[opens], stop[last] - first[opens], mask[opens]], axis=1)
