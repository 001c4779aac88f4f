"""Random trees, and oracles on Python lists and sets that no engine shares code with."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from sparse_attention.eagle import DraftTree, assemble_tree


@st.composite
def parent_lists(draw, most: int = 70, forest: bool = False):
    """Parents of a tree: node 0 is the root, every other parent a lower node; bushy, deep, or anything between."""
    nodes = draw(st.integers(1, most))
    reach = draw(st.sampled_from([1, 2, 3, 8, most]))  # 1: a chain; most: any lower node
    lowest = -1 if forest else 0
    return [-1] + [draw(st.integers(max(lowest, n - reach), n - 1)) for n in range(1, nodes)]


def path(parents: list[int], node: int) -> list[int]:
    """From the root to the node."""
    nodes = []
    while node >= 0:
        nodes.append(node)
        node = parents[node]
    return nodes[::-1]


def leaf_paths(parents: list[int], row_order: str) -> list[list[int]]:
    paths = [path(parents, node) for node in range(len(parents)) if node not in parents]
    paths = [p for p in paths if p[0] == 0]
    return sorted(paths) if row_order == "sorted" else paths


def random_tree(nodes: int, seed: int, vocab: int = 40, reach: int = 6, batch: int = 1, row_order: str = "sorted") -> DraftTree:
    """Trees whose siblings hold distinct tokens."""
    rng = torch.Generator().manual_seed(seed)
    all_parents, all_tokens = [], []
    for _ in range(batch):
        parents = [-1] + [int(torch.randint(max(0, n - reach), n, (), generator=rng)) for n in range(1, nodes)]
        tokens = torch.randint(0, vocab, (nodes,), generator=rng).tolist()
        for n in range(1, nodes):
            taken = {tokens[m] for m in range(1, n) if parents[m] == parents[n]}
            while tokens[n] in taken:
                tokens[n] = (tokens[n] + 1) % vocab
        all_parents.append(parents)
        all_tokens.append(tokens)
    return assemble_tree(torch.tensor(all_tokens), torch.tensor(all_parents), row_order=row_order, impl="reference")


def likely_logits(tree: DraftTree, vocab: int, seed: int, favour: float = 6.0) -> torch.Tensor:
    """[B, N, vocab] at random, but about two of three drafted tokens are likely after their parents."""
    rng = torch.Generator().manual_seed(seed)
    batch, nodes = tree.draft_tokens.shape
    logits = torch.randn(batch, nodes, vocab, generator=rng)
    for b in range(batch):
        for n in range(1, nodes):
            if torch.rand((), generator=rng) < 0.66:
                logits[b, tree.parents[b, n], tree.draft_tokens[b, n]] += favour
    return logits
