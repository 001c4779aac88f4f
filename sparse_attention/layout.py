"""Layouts: which key tiles each query tile visits. docs/design.md describes the tensors, csrc/params.h how C++ reads them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from sparse_attention.cache import cached_by_bytes
from sparse_attention.grid import Grid, grid_of, unique_masks
from sparse_attention.masks import transpose_masks
from sparse_attention.patterns.base import Lengths, Pattern, Tile, check_sizes, quotient_lengths
from sparse_attention.patterns.grouping import grouped_parts
from sparse_attention.rows import Rows, rows

__all__ = ["Counts", "Layout", "LayoutPart", "Rows", "Tile", "build", "count_pairs", "layout", "rows"]


class Counts(NamedTuple):
    """Tiles, and allowed pairs in them, summed over the heads of a layout."""

    full: int
    partial: int
    pairs: int

    @property
    def visited(self) -> int:
        return self.full + self.partial


@dataclass(frozen=True, eq=False)
class LayoutPart:
    """Sequences that run side by side; every query row belongs to exactly one of each head's. CPU tensors.

    stride: that of its views, or 0 where heads differ. The other fields: docs/design.md.
    """

    stride: int
    views: torch.Tensor
    variant_views: torch.Tensor
    head_variant: torch.Tensor
    row_start: torch.Tensor
    runs: torch.Tensor
    masks: torch.Tensor
    masks_t: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The seven tensors in the order of `LayoutParams` in csrc/params.h."""
        return self.views, self.variant_views, self.head_variant, self.row_start, self.runs, self.masks, self.masks_t


@dataclass(frozen=True, eq=False)
class Layout:
    """What the tile engine visits for one pattern and one pair of lengths.

    `transposed` layouts have key tiles for rows and query tiles in their runs; `masks` and `masks_t` keep their meaning.
    """

    tile: Tile
    q_len: int
    kv_len: int
    heads: int
    parts: tuple[LayoutPart, ...]
    counts: Counts
    transposed: bool = False

    @property
    def tile_q(self) -> int:
        return self.tile.q

    @property
    def tile_k(self) -> int:
        return self.tile.k

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for part in self.parts for t in part.tensors())

    def transpose(self) -> "Layout":
        """The same tiles by key tile, for the backward. Made once."""
        return self._transpose

    @cached_property
    def _transpose(self) -> "Layout":
        from sparse_attention.transpose import transpose_layout

        return transpose_layout(self)


def layout(pattern: Pattern, q_len: int, kv_len: int, heads: int = 1, tile: Tile = Tile(64, 64), together: int = 1) -> Layout:
    """The layout of `pattern`; a second call with equal arguments returns the same object. together: see `grouped_parts`."""
    return _cached(pattern.frozen(), q_len, kv_len, heads, tile, together)


def build(pattern: Pattern, q_len: int, kv_len: int, heads: int = 1, tile: Tile = Tile(64, 64), together: int = 1) -> Layout:
    """Make the layout anew. Sizes that the pattern cannot apply to raise ValueError."""
    tile = Tile(*tile)
    if tile.q < 64 or tile.k < 64 or tile.q % 64 or tile.k % 64:
        raise ValueError(f"tile is {tile}; expected positive multiples of 64")
    check_sizes(pattern, q_len, kv_len, heads)
    lengths = Lengths(q_len, kv_len)
    variants: dict[Pattern, int] = {}
    head_variant = [variants.setdefault(pattern.for_head(h), len(variants)) for h in range(heads)]
    split = [grouped_parts(variant, lengths, together) for variant in variants]
    grids: dict[tuple[Pattern, Lengths], Grid] = {}
    parts, counts = [], np.zeros(3, dtype=np.int64)
    uses = np.bincount(head_variant)
    for number in range(max(map(len, split))):
        members = [parts_of[number] if number < len(parts_of) else None for parts_of in split]
        part, part_counts = _assemble(members, head_variant, uses, lengths, tile, grids)
        parts.append(part)
        counts += part_counts
    return Layout(tile, q_len, kv_len, heads, tuple(parts), Counts(*counts.tolist()))


_cached = cached_by_bytes(1 << 30)(build)


def count_pairs(pattern: Pattern, lengths: Lengths) -> int:
    """Exact number of pairs of a pattern of one head: full tiles by area, partial ones by popcount."""
    return layout(pattern, *lengths, 1).counts.pairs


def _assemble(members, head_variant, uses, lengths, tile, grids):
    """One part of every variant, side by side."""
    views, chosen, variant_views, counts = [], [], [0], np.zeros(3, dtype=np.int64)
    row_base = 0
    for part, heads in zip(members, uses):
        for residue in range(part.stride if part else 0):
            inner = quotient_lengths(lengths, part.stride, residue)
            if inner.q_len == 0:
                continue
            key = part.of_residue(residue), inner
            if key not in grids:
                grids[key] = grid_of(*key, tile)
            q_first = residue + (inner.kv_len - inner.q_len) * part.stride - lengths.offset
            views.append((q_first, residue, part.stride, inner.q_len, inner.kv_len, row_base))
            chosen.append(grids[key])
            row_base += grids[key].rows
            counts += heads * grids[key].counts
        variant_views.append(len(views))
    strides = {part.stride for part in members if part}
    kinds = list(dict.fromkeys(chosen))
    masks, numbers = unique_masks([grid.masks for grid in kinds], tile)
    runs = {grid: grid.runs_with(number) for grid, number in zip(kinds, numbers)}
    row_counts = np.concatenate([grid.row_counts for grid in chosen])
    part = LayoutPart(
        stride=strides.pop() if len(strides) == 1 else 0,
        views=torch.from_numpy(np.array(views, dtype=np.int32)),
        variant_views=torch.from_numpy(np.array(variant_views, dtype=np.int32)),
        head_variant=torch.from_numpy(np.array(head_variant, dtype=np.int32)),
        row_start=torch.from_numpy(np.concatenate([[0], np.cumsum(row_counts)]).astype(np.int32)),
        runs=torch.from_numpy(np.concatenate([runs[grid] for grid in chosen])),
        masks=torch.from_numpy(masks),
        masks_t=torch.from_numpy(transpose_masks(masks)),
    )
    return part, counts
