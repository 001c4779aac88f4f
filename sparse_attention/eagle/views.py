"""A verification as EAGLE and as the engines say it, and as the host reads it."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attention.eagle.checks import check_integer
from sparse_attention.eagle.outputs import DraftTree, Verified


def upstream_view(verified: Verified, request: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(best_candidate, accept_length, sample_p) of one request, as EAGLE's evaluate_posterior returns them: 0-dim int64, 0-dim int64
    and [V]. The verification must have had retrieve_indices and return_sample_p=True."""
    for name in ("best_candidate", "sample_p"):
        if getattr(verified, name) is None:
            raise ValueError(f"verified.{name} is None; expected a verification of a tree with retrieve_indices and return_sample_p=True")
    request = check_integer("request", request, 0, len(verified.accept_length) - 1)
    return verified.best_candidate[request], verified.accept_length[request], verified.sample_p[request]


def engines_view(verified: Verified) -> tuple[Tensor, Tensor, Tensor]:
    """(predicts [B * N], accept_index [B, S], accept_token_num [B]), int32, as SGLang's verify_tree_greedy fills them: node n of request b
    is b * N + n, and -1 stands where nothing is."""
    batch, nodes = verified.predicts.shape
    start = torch.arange(batch, device=verified.predicts.device)[:, None] * nodes
    index = torch.where(verified.accept_index < 0, -1, verified.accept_index + start)
    return verified.predicts.flatten().int(), index.int(), verified.accept_length.int()


def accepted_tokens(tree: DraftTree, verified: Verified) -> list[list[int]]:
    """For each request the tokens of its path, the root's first, then the token that follows it: accept_length + 2 numbers.

    This is where the host waits for the device, in one copy: what a step's caller must know to go on. Build, verify and commit wait for
    nothing, so they are launched before it. verified needs accept_index, accept_length and next_token.
    """
    path = tree.draft_tokens.gather(1, verified.accept_index.clamp(min=0))
    rows = torch.cat([verified.accept_length[:, None], verified.next_token[:, None], path], 1).tolist()
    return [[*tokens[: length + 1], following] for length, following, *tokens in rows]
