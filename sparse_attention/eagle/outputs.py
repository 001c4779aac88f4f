"""What the tree operations return. B requests, N nodes with the root, W nodes of the longest path, V tokens, S rows of a walk."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MASK_FORMS = ("bool", "float", "additive", "bits", "bits32", "full", "none")
ROW_ORDERS = ("leaf", "sorted")


class DraftTree(NamedTuple):
    """B trees of N nodes. Node 0 is the root; every index is int64 and -1 says "none".

    A tree that was not made by `build` may leave out (None) what an operation does not read: `verify_greedy` and
    `verify_sampling` need draft_tokens, first_child and next_sibling, and retrieve_indices for best_candidate only.
    """

    draft_tokens: Tensor  # [B, N]
    parents: Tensor | None = None  # [B, N], -1 for the root and for an orphan
    depths: Tensor | None = None  # [B, N], ancestors of each node: upstream's tree_position_ids
    tree_mask: Tensor | None = None  # as the form asked for says
    retrieve_indices: Tensor | None = None  # [B, N, W], a path from the root in each of the first leaf_count rows, then -1
    leaf_count: Tensor | None = None  # [B]
    width: Tensor | None = None  # [B], nodes of the longest path: upstream's retrieve_indices has this many columns
    first_child: Tensor | None = None  # [B, N]
    next_sibling: Tensor | None = None  # [B, N], siblings ascend
    orphans: Tensor | None = None  # [B], nodes other than the root that have no parent; 0 when the tree is well formed


class Verified(NamedTuple):
    """What a verification accepted: a path from the root, and the token that follows it. Integers are int64."""

    accept_index: Tensor  # [B, S], nodes of the path, the root first, then -1
    accept_length: Tensor  # [B], accepted draft tokens: nodes of the path less the root
    predicts: Tensor  # [B, N], at each node of the path the token that follows it, elsewhere -1
    next_token: Tensor  # [B], the token after the path: predicts at its last node
    best_candidate: Tensor | None = None  # [B], first row of retrieve_indices that holds the path
    sample_p: Tensor | None = None  # [B, V], what next_token was taken from


class Committed(NamedTuple):
    """What `commit` leaves beside the cache it has changed."""

    lengths: Tensor  # [B] int64, rows in the cache of each request
    hidden: Tensor | None  # [B, S, hidden size], the accepted rows, then 0


class TopK(NamedTuple):
    """The k best log-probabilities of each row, best first; of equal ones the lower token first."""

    values: Tensor  # [..., k], dtype of the logits
    tokens: Tensor  # [..., k] int64


class Frontier(NamedTuple):
    """The nodes that one draft step chose to expand."""

    cumulative: Tensor  # [B, R, K], score of every candidate
    scores: Tensor  # [B, k], the best of them, best first
    index: Tensor  # [B, k] int64, in the flattened [R * K] candidates; of equal scores the lower one first
    rows: Tensor  # [B, k] int64, index // K: the row whose hidden state and mask the node continues
    tokens: Tensor | None  # [B, k] int64
    parents: Tensor | None  # [B, k] int64, what `parents` of the next level holds: 1 + flat index among all candidates


def empty_tree(
    batch: int,
    nodes: int,
    width: int,
    *,
    mask: str = "bool",
    mask_dtype: torch.dtype = torch.float32,
    full_size: int = 0,
    device: torch.device | str = "cpu",
) -> DraftTree:
    """Uninitialised tensors for `out=` of `build` and `build_tree`. full_size: elements of a "full" mask, N * (prefix + N) summed."""

    draft_tokens = torch.empty((batch, nodes), dtype=torch.int64, device=device)
    integers = draft_tokens.new_empty
    return DraftTree(
        draft_tokens=draft_tokens,
        parents=integers(batch, nodes),
        depths=integers(batch, nodes),
        tree_mask=empty_mask(batch, nodes, mask, mask_dtype, full_size, device),
        retrieve_indices=integers(batch, nodes, width),
        leaf_count=integers(batch),
        width=integers(batch),
        first_child=integers(batch, nodes),
        next_sibling=integers(batch, nodes),
        orphans=integers(batch),
    )


def empty_mask(batch: int, nodes: int, form: str, dtype: torch.dtype, full_size: int, device: torch.device | str) -> Tensor | None:
    """An uninitialised mask of this form."""
    if form == "none":
        return None
    shape, dtype = mask_layout(batch, nodes, form, dtype, full_size)
    return torch.empty(shape, dtype=dtype, device=device)


def mask_layout(batch: int, nodes: int, form: str, dtype: torch.dtype, full_size: int) -> tuple[tuple[int, ...], torch.dtype]:
    """(shape, dtype) of a mask of this form; `dtype` matters to "additive" only."""
    if form == "bool":
        return (batch, nodes, nodes), torch.bool
    if form == "full":
        return (full_size,), torch.bool
    if form == "bits":
        return (batch, nodes, (nodes + 63) // 64), torch.int64
    if form == "bits32":
        return (batch, nodes, (nodes + 31) // 32), torch.int32
    return (batch, 1, nodes, nodes), torch.float32 if form == "float" else dtype
