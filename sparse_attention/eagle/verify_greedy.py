"""Greedy verification: walk from the root to the child that holds the target's best token, as far as there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparse_attention.eagle.checks import FLOATS, INT64, at, check_integer, check_tensor, first, wants_check
from sparse_attention.eagle.native import engine
from sparse_attention.eagle.outputs import DraftTree, Verified


def verify_greedy(
    tree: DraftTree,
    logits: Tensor | None = None,
    *,
    target_tokens: Tensor | None = None,
    width: int | None = None,
    return_sample_p: bool = False,
    impl: str = "auto",
    check: bool | None = None,
) -> Verified:
    """The longest path whose every token is the target's best after the path so far.

    logits: [B, N, V] float32, float64, bfloat16 or float16, the target's at every node; or target_tokens: [B, N] int64, its best
    tokens. Of equal logits the lowest token is best, and a NaN never is. tree: its draft_tokens, first_child and next_sibling; its
    retrieve_indices, if there, for best_candidate. width: S, rows of accept_index (default: W of retrieve_indices, else N); at most
    S - 1 tokens are accepted. return_sample_p: also the logits [B, V] at the path's last node.

    The native CPU engine reads logits of the visited nodes only; none makes [leaves, W, V]. Of siblings with one token the first counts.
    Same results as EAGLE's evaluate_posterior (utils.py, B4) and SGLang's verify_tree_greedy: see `upstream_view`, `engines_view`.

    Links that leave the tree or meet a node twice are a ValueError; with check=False (the default on CUDA) a link out of range is the
    end of its list and a walk ends after N steps.
    """
    batch, nodes, columns = check_tree(tree, width)
    draft = tree.draft_tokens
    if (logits is None) == (target_tokens is None):
        raise ValueError(f"logits and target_tokens are {'both' if logits is not None else 'neither'} given; expected one of them")
    if logits is not None:
        check_tensor("logits", logits, (batch, nodes, None), FLOATS, draft, "tree")
        logits = logits.contiguous()
    else:
        target_tokens = check_tensor("target_tokens", target_tokens, (batch, nodes), INT64, draft, "tree").contiguous()
        if return_sample_p:
            raise ValueError("return_sample_p is True; expected False with target_tokens, which hold no logits")
    native = engine("verify_greedy", draft.device, impl)
    checked = wants_check(check, draft.device)
    if checked and (native is None or draft.device.type != "cpu"):
        refuse_links(tree)
    if native is None:
        return _reference(tree, columns, logits, target_tokens, return_sample_p)
    result = empty_verified(tree, columns, logits if return_sample_p else None)
    if native(*links_of(tree), logits, target_tokens, *result) and checked:
        refuse_links(tree)
    return result


def _reference(tree: DraftTree, columns: int, logits: Tensor | None, target_tokens: Tensor | None, return_sample_p: bool) -> Verified:
    if target_tokens is None:
        target_tokens = torch.where(logits.isnan(), -torch.inf, logits).argmax(2)
    targets = target_tokens.tolist()
    tokens = tree.draft_tokens.tolist()
    walks = Walks(tree, columns)
    for b in range(len(targets)):
        path = walks.walk(b, lambda node, children, b=b: next((c for c in children if tokens[b][c] == targets[b][node]), None))
        walks.finish(b, path, targets[b][path[-1]])
    sample_p = walks.rows_at_end(logits) if return_sample_p else None
    return walks.verified(sample_p)


class Walks:
    """Walks down the links of every tree on the host, and collects what a Verified holds."""

    def __init__(self, tree: DraftTree, columns: int):
        self.tree, self.columns = tree, columns
        self.first_child, self.next_sibling = tree.first_child.tolist(), tree.next_sibling.tolist()
        self.tokens = tree.draft_tokens.tolist()
        self.rows = None if tree.retrieve_indices is None else tree.retrieve_indices.tolist()
        self.paths: list[list[int]] = []
        self.predicts: list[list[int]] = []

    def walk(self, b: int, choose: Callable[[int, Iterator[int]], int | None]) -> list[int]:
        """The path from the root on which choose(node, children) gives the next node, until it gives None."""
        nodes = len(self.tokens[b])
        path, steps = [0], 0

        def children(child: int) -> Iterator[int]:
            nonlocal steps
            while 0 <= child < nodes and steps < nodes:
                steps += 1
                yield child
                child = self.next_sibling[b][child]

        while len(path) < self.columns:
            chosen = choose(path[-1], children(self.first_child[b][path[-1]]))
            if chosen is None:
                break
            path.append(chosen)
        return path

    def finish(self, b: int, path: list[int], next_token: int) -> None:
        """Keeps request b's path."""
        predicts = [-1] * len(self.tokens[b])
        for node, child in zip(path, path[1:]):
            predicts[node] = self.tokens[b][child]
        predicts[path[-1]] = next_token
        self.paths.append(path)
        self.predicts.append(predicts)

    def rows_at_end(self, x: Tensor) -> Tensor:
        """[B, V]: x [B, N, V] at the last node of each path."""
        return torch.stack([x[b, path[-1]] for b, path in enumerate(self.paths)])

    def verified(self, sample_p: Tensor | None) -> Verified:
        """The results as tensors."""

        def tensor(values: list) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=self.tree.draft_tokens.device)

        best = None
        if self.rows is not None:
            best = tensor([_row_with(rows, path) for rows, path in zip(self.rows, self.paths)])
        return Verified(
            accept_index=tensor([path + [-1] * (self.columns - len(path)) for path in self.paths]),
            accept_length=tensor([len(path) - 1 for path in self.paths]),
            predicts=tensor(self.predicts),
            next_token=tensor([predicts[path[-1]] for predicts, path in zip(self.predicts, self.paths)]),
            best_candidate=best,
            sample_p=sample_p,
        )


def _row_with(rows: list[list[int]], path: list[int]) -> int:
    """The first row that has the path's last node in the path's last column; 0 if none has."""
    column = len(path) - 1
    return next((r for r, row in enumerate(rows) if column < len(row) and row[column] == path[-1]), 0)


def check_tree(tree: object, width: int | None) -> tuple[int, int, int]:
    """(B, N, S) of a tree that a verification can walk."""
    if not isinstance(tree, DraftTree):
        raise ValueError(f"tree is {type(tree).__name__}; expected a DraftTree, such as build_tree makes")
    draft = check_tensor("tree.draft_tokens", tree.draft_tokens, (None, None), INT64)
    shape = tuple(draft.shape)
    for name in ("first_child", "next_sibling"):
        check_tensor(f"tree.{name}", getattr(tree, name), shape, INT64, draft, "tree.draft_tokens")
    columns = shape[1]
    if tree.retrieve_indices is not None:
        rows = check_tensor("tree.retrieve_indices", tree.retrieve_indices, (shape[0], None, None), INT64, draft, "tree.draft_tokens")
        columns = rows.shape[2]
    return *shape, columns if width is None else check_integer("width", width, 1, shape[1])


def links_of(tree: DraftTree) -> tuple[Tensor | None, ...]:
    """What a compiled walk reads, contiguous."""
    rows = tree.retrieve_indices
    links = (tree.draft_tokens, tree.first_child, tree.next_sibling)
    return *(x.contiguous() for x in links), rows if rows is None else rows.contiguous()


def empty_verified(tree: DraftTree, columns: int, rows: Tensor | None) -> Verified:
    """Uninitialised results; sample_p is like `rows` [B, N, V] at one node, or None."""
    batch, nodes = tree.draft_tokens.shape
    new = tree.draft_tokens.new_empty
    best = None if tree.retrieve_indices is None else new(batch)
    sample_p = None if rows is None else rows.new_empty(batch, rows.shape[2])
    return Verified(new(batch, columns), new(batch), new(batch, nodes), new(batch), best, sample_p)


def refuse_links(tree: DraftTree) -> None:
    """ValueError unless every link is -1 or a node, and no node is linked twice, nor the root at all."""
    batch, nodes = tree.draft_tokens.shape
    met = torch.zeros(batch, nodes, dtype=torch.int64, device=tree.draft_tokens.device)
    for name in ("first_child", "next_sibling"):
        link = getattr(tree, name)
        found = first((link < -1) | (link >= nodes))
        if found is not None:
            raise ValueError(f"{at('tree.' + name, found)} is {int(link[found])}; expected -1 or a node from 1 to {nodes - 1}")
        met.scatter_add_(1, link.clamp(min=0), (link >= 0).to(torch.int64))
    met[:, 0] += 1
    found = first(met > 1)
    if found is not None:
        b, node = found
        raise ValueError(
            f"tree.first_child and tree.next_sibling of request {b} lead to node {node} {int(met[found]) - (node == 0)} times; expected "
            f"{'none, it is the root' if node == 0 else 'one way to it'}"
        )
