"""Which nodes are ancestors of which, from parents: three ways in PyTorch. The fourth, fused, is csrc/cpu/eagle_tree.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attention.eagle.profile import Profile, section


def doubling(parents: Tensor) -> Tensor:
    """[B, N, N] bool: row n holds n and its ancestors. log2 N steps over all nodes at once, no wait for the device.

    After step t a row holds its 2^t nearest: the row of the ancestor 2^t above is joined to it.
    """
    batch, nodes = parents.shape
    # A row of zeros, at index N, stands for "above a root".
    sees = torch.eye(nodes + 1, dtype=torch.bool, device=parents.device)
    sees[nodes].zero_()
    sees = sees.expand(batch, -1, -1)
    above = torch.full((batch, nodes + 1), nodes, dtype=torch.int64, device=parents.device)
    above[:, :nodes] = torch.where(parents < 0, nodes, parents)
    for _ in range(max(nodes - 1, 1).bit_length()):
        sees = sees | sees.gather(1, above[:, :, None].expand(-1, -1, nodes + 1))
        above = above.gather(1, above)
    return sees[:, :nodes, :nodes].contiguous()


def incremental(parents: Tensor) -> Tensor:
    """The same, level by level: a level's rows are its parents' finished rows and the diagonal. Waits for the device once a level."""
    batch, nodes = parents.shape
    rows = torch.eye(nodes, dtype=torch.bool, device=parents.device).repeat(batch, 1)  # of all requests, one under the other
    index = torch.arange(batch * nodes, device=parents.device)
    root = (parents < 0).flatten()
    above = torch.where(root, index, parents.flatten() + index - index % nodes)
    level = root
    while True:
        level = level.index_select(0, above) & ~root
        now = level.nonzero().squeeze(1)
        if len(now) == 0:
            return rows.view(batch, nodes, nodes)
        rows.index_copy_(0, now, rows.index_select(0, above.index_select(0, now)))
        rows.view(-1).index_fill_(0, now * nodes + now % nodes, True)


def rebuild(parents: Tensor, profile: Profile | None = None) -> Tensor:
    """The same as EAGLE does it: parents go to the host, and row after row of a CPU tensor takes in its parent's (cnets.py, B1.8)."""
    with section(profile, "tolist", parents.device):
        listed = parents.tolist()
    batch, nodes = parents.shape
    with section(profile, "preallocation", parents.device):
        sees = torch.eye(nodes, dtype=torch.bool).repeat(batch, 1, 1)
    with section(profile, "mask", parents.device):
        for tree, row_parents in zip(sees, listed):
            for n, parent in enumerate(row_parents):
                if parent >= 0:
                    tree[n].logical_or_(tree[parent])
        return sees.to(parents.device)
