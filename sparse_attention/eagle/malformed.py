"""What is wrong with a tree's inputs, said in words. Each waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attention.eagle.checks import at, first
from sparse_attention.eagle.outputs import DraftTree


def refuse_selection(selected: Tensor, tokens: Tensor, parents: Tensor) -> None:
    """ValueError unless `selected` ascends, is in range and holds every parent of what it holds."""
    candidates = tokens.shape[1]
    found = first((selected < 0) | (selected >= candidates))
    if found is not None:
        raise ValueError(f"{at('selected', found)} is {int(selected[found])}; expected a candidate from 0 to {candidates - 1}")
    found = first(selected[:, 1:] <= selected[:, :-1])
    if found is not None:
        b, n = found
        pair = int(selected[b, n]), int(selected[b, n + 1])
        raise ValueError(f"{at('selected', (b, n + 1))} is {pair[1]}; expected more than {pair[0]}, the one before it")
    row = selected // (candidates // parents.shape[1])
    above = parents.gather(1, row)
    found = first((above < 0) | (above > selected))
    if found is not None:
        b, n = found
        place = at("parents", (b, int(row[found])))
        raise ValueError(
            f"{place} is {int(above[found])}; expected 0 for the root, or 1 + the index of a candidate before {int(selected[found])}: "
            "parents precede their children"
        )
    held = torch.zeros(selected.shape[0], candidates + 1, dtype=torch.bool, device=selected.device)
    held.scatter_(1, selected + 1, True)
    held[:, 0] = True
    found = first(~held.gather(1, above))
    if found is not None:
        child = f"{int(selected[found])}, a child of candidate {int(above[found]) - 1}"
        raise ValueError(f"{at('selected', found)} is {child}; expected that candidate to be selected too")


def refuse_depth(tree: DraftTree, columns: int) -> None:
    """ValueError if a node is deeper than the columns of retrieve_indices show."""
    deepest = int(tree.width.max()) - 1
    if deepest >= columns:
        raise ValueError(f"max_depth is {columns - 1}; expected at least {deepest}, the depth of the deepest node")
