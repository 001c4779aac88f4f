"""A verification as EAGLE and as the engines say it."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attention.eagle.checks import check_integer
from sparse_attention.eagle.outputs import Verified


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
