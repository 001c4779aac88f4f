"""From parents and ancestors to the rows of paths, the leaves and the links: vectorised, and as EAGLE's loop."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Paths(NamedTuple):
    """The fields of a DraftTree that follow from its parents."""

    depths: Tensor
    retrieve_indices: Tensor
    leaf_count: Tensor
    width: Tensor
    first_child: Tensor
    next_sibling: Tensor
    orphans: Tensor


def vectorised(parents: Tensor, sees: Tensor, columns: int, row_order: str) -> Paths:
    """parents [B, N], sees [B, N, N]; retrieve_indices gets `columns` columns. No wait for the device."""
    batch, nodes = parents.shape
    index = torch.arange(nodes, device=parents.device)
    depths = sees.sum(2) - 1
    rooted = sees[:, :, 0]
    leaf = rooted & ~_has_child(parents)
    # Path of every node: ancestor a goes to column depths[a]; one more column takes what is no ancestor or too deep.
    column = torch.where(sees, depths[:, None, :], columns).clamp(max=columns)
    path = torch.full((batch, nodes, columns + 1), -1, dtype=torch.int64, device=parents.device)
    path.scatter_(2, column, index.expand(batch, nodes, nodes))
    path = path[:, :, :columns]
    order = _rows_in_order(path, leaf, row_order)
    rows = path.gather(1, order[:, :, None].expand(-1, -1, columns))
    leaf_count = leaf.sum(1)
    rows = torch.where((index < leaf_count[:, None])[:, :, None], rows, -1)
    width = torch.where(rooted, depths, 0).amax(1) + 1
    first_child, next_sibling = links(parents)
    return Paths(depths, rows, leaf_count, width, first_child, next_sibling, (parents[:, 1:] < 0).sum(1))


def links(parents: Tensor) -> tuple[Tensor, Tensor]:
    """first_child and next_sibling [B, N] of parents [B, N]; siblings ascend."""
    nodes = parents.shape[1]
    index = torch.arange(nodes, device=parents.device)
    child = parents[:, None, :] == index[:, None]  # [B, parent, child]
    first_child = torch.where(child, index, nodes).amin(2)
    later = (parents[:, :, None] == parents[:, None, :]) & (index[None, :] > index[:, None]) & (parents >= 0)[:, :, None]
    next_sibling = torch.where(later, index, nodes).amin(2)
    return torch.where(first_child == nodes, -1, first_child), torch.where(next_sibling == nodes, -1, next_sibling)


def looped(parents: Tensor, sees: Tensor, columns: int, row_order: str) -> Paths:
    """The same through Python lists, the rows built leaf by leaf as EAGLE builds them (cnets.py, B1.9)."""
    listed = parents.tolist()
    depths = sees.sum(2) - 1
    rooted = sees[:, :, 0].tolist()
    tables, counts, widths = [], [], []
    for tree, has_root in zip(listed, rooted):
        inner = set(tree)
        rows = []
        for leaf in range(len(tree)):
            if leaf in inner or not has_root[leaf]:
                continue
            path, node = [], leaf
            while node >= 0:
                path.append(node)
                node = tree[node]
            rows.append(path[::-1])
        widths.append(max(map(len, rows)))
        if row_order == "sorted":
            rows.sort()  # no path is the beginning of another leaf's, so what stands for the padding does not matter
        counts.append(len(rows))
        rows = [(row + [-1] * columns)[:columns] for row in rows]
        tables.append(rows + [[-1] * columns] * (len(tree) - len(rows)))

    def tensor(values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=parents.device)

    return Paths(depths, tensor(tables), tensor(counts), tensor(widths), *links(parents), (parents[:, 1:] < 0).sum(1))


def trim_retrieve_indices(retrieve_indices: Tensor, leaf_count: Tensor, width: Tensor) -> Tensor:
    """EAGLE's ragged [leaves, width] from one request's [N, W] and its two counts. Waits for the device."""
    return retrieve_indices[: int(leaf_count), : int(width)]


def _has_child(parents: Tensor) -> Tensor:
    nodes = parents.shape[1]
    marks = torch.zeros(parents.shape[0], nodes + 1, dtype=torch.bool, device=parents.device)
    return marks.scatter_(1, torch.where(parents < 0, nodes, parents), True)[:, :nodes]


def _rows_in_order(path: Tensor, leaf: Tensor, row_order: str) -> Tensor:
    """[B, N] int64: the leaves in the order of the rows, then the other nodes."""
    batch, nodes, columns = path.shape
    order = torch.arange(nodes, device=path.device).repeat(batch, 1)
    keys = [path[:, :, column] for column in reversed(range(columns))] if row_order == "sorted" else []
    for key in [*keys, (~leaf).to(torch.int64)]:  # stable sorts, the most significant key last
        order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
    return order
