"""Static trees, EAGLE-1's: the same tree at every step, given as the paths to its nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_attention.eagle.checks import check_integer, short
from sparse_attention.eagle.mask import tree_mask
from sparse_attention.eagle.paths import links, looped

# The default tree of EAGLE-1 for 7B models (choices.py, mc_sim_7b_63): 26 nodes with the root, 92 of 676 pairs.
EAGLE1_MC_SIM_7B_63 = (
    (0,), (1,), (2,), (3,),
    (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0),
    (0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1), (1, 0, 0),
    (0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2),
    (0, 0, 0, 0, 0), (0, 0, 0, 0, 1),
)  # fmt: skip


class TreeBuffers(NamedTuple):
    """A static tree of N nodes, W on its longest path, without a batch dimension."""

    tree_attn_mask: Tensor  # [1, 1, N, N] float32, 1 where a node sees
    tree_indices: Tensor  # [N] int64, each node's place in (root, top-k of expansion 0, top-k of expansion 1, ...)
    tree_position_ids: Tensor  # [N] int64, depths
    retrieve_indices: Tensor  # [leaves, W] int64, sorted, -1 at the end of a short path
    parents: Tensor  # [N] int64, -1 for the root
    first_child: Tensor  # [N] int64
    next_sibling: Tensor  # [N] int64


def generate_tree_buffers(choices: Sequence[Sequence[int]], *, top_k: int = 10, device: torch.device | str = "cpu") -> TreeBuffers:
    """The buffers of a static tree, equal to EAGLE-1's generate_tree_buffers (utils.py, B7), made on the host once.

    choices: for every node but the root the path to it, each step the rank of a token among its parent's top_k. Nodes are ordered by
    depth, then by path. ValueError if a path is empty, repeated or without its parent's, or if a rank is not from 0 to top_k - 1.
    """
    top_k = check_integer("top_k", top_k, 1)
    paths = sorted((tuple(path) for path in choices), key=lambda path: (len(path), path))
    node_of: dict[tuple[int, ...], int] = {(): 0}
    parents, indices, expansions = [-1], [0], -1
    expanded = None
    for path in paths:
        if not path or any(isinstance(r, bool) or not isinstance(r, int) or not 0 <= r < top_k for r in path):
            raise ValueError(f"choices has {short(path)}; expected a path of ranks from 0 to {top_k - 1}")
        if path in node_of:
            raise ValueError(f"choices has {path} twice; expected each path once")
        if path[:-1] not in node_of:
            raise ValueError(f"choices has {path} and not {path[:-1]}; expected the path to the parent of every node")
        if path[:-1] != expanded:
            expanded, expansions = path[:-1], expansions + 1
        node_of[path] = len(parents)
        parents.append(node_of[path[:-1]])
        indices.append(1 + expansions * top_k + path[-1])
    table = torch.tensor([parents])
    visible = tree_mask(table, impl="reference")
    made = looped(table, visible, len(parents), "sorted")
    first_child, next_sibling = links(table)
    buffers = TreeBuffers(
        tree_attn_mask=visible[:, None].float(),
        tree_indices=torch.tensor(indices),
        tree_position_ids=made.depths[0],
        retrieve_indices=made.retrieve_indices[0, : int(made.leaf_count), : int(made.width)].contiguous(),
        parents=table[0],
        first_child=first_child[0],
        next_sibling=next_sibling[0],
    )
    return TreeBuffers(*(x.to(device) for x in buffers))
