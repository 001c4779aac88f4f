"""The backward's view of a layout: rows are key tiles, runs are ranges of query tiles."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch


def transpose_layout(layout):
    """Rows are key tiles, and the row_base of a view counts those."""
    parts = tuple(_transpose_part(part, layout.tile) for part in layout.parts)
    return replace(layout, parts=parts, transposed=True)


def _transpose_part(part, tile):
    views = part.views.numpy().astype(np.int64)
    q_rows, k_rows = -(-views[:, 3] // tile.q), -(-views[:, 4] // tile.k)
    base = np.concatenate([[0], np.cumsum(k_rows)])
    view_of_row = np.repeat(np.arange(len(views)), q_rows)
    row = np.repeat(np.arange(len(view_of_row)), np.diff(part.row_start.numpy()))
    view = view_of_row[row]
    first, count, mask = part.runs.numpy().astype(np.int64).T
    key_row, first, count, mask = _by_key(row + view, first + base[view], count, mask)
    view = np.searchsorted(base, key_row, side="right") - 1
    runs = np.stack([first - view - views[view, 5], count, mask], axis=1)
    views[:, 5] = base[:-1]
    row_start = np.concatenate([[0], np.cumsum(np.bincount(key_row, minlength=base[-1]))])
    return replace(
        part,
        views=torch.from_numpy(views.astype(np.int32)),
        row_start=torch.from_numpy(row_start.astype(np.int32)),
        runs=torch.from_numpy(runs.astype(np.int32)),
    )


def _by_key(row, first, count, mask):
    """Runs of rows -> runs of columns, at a cost of the runs that come out.

    A column's run opens at a row that visits the column with a mask and whose upper neighbour does not. So each run adds
    +1 to its columns in its own row and -1 in the next: where the sum is 1 a column's run opens, where it is -1 one ends.
    """
    columns = int((first + count).max(initial=0)) + 1
    rows = int(row.max(initial=0)) + 2
    line = (mask + 1) * rows + row
    here, there = line * columns + first, (line + 1) * columns + first
    place = np.concatenate([here, here + count, there, there + count])
    sign = np.repeat([1, -1, -1, 1], len(row))
    order = np.argsort(place, kind="stable")
    place, delta = place[order], np.cumsum(sign[order])
    last = np.append(place[1:] != place[:-1], True)[: place.size]
    place, delta = place[last], delta[last]
    opened = _cells(place, delta, 1, columns, rows)
    ended = _cells(place, delta, -1, columns, rows)
    start, column, mask = opened
    order = np.lexsort((start, column))
    return column[order], start[order], (ended[0] - start)[order], mask[order]


def _cells(place, delta, value, columns, rows):
    """(row, column, mask) of every cell where the sum is `value`, by mask, column and row."""
    begin = np.nonzero(delta == value)[0]
    length = place[begin + 1] - place[begin]
    within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    cell = np.repeat(place[begin], length) + within
    line, column = cell // columns, cell % columns
    mask, row = line // rows - 1, line % rows
    order = np.lexsort((row, column, mask))
    return row[order], column[order], mask[order]
