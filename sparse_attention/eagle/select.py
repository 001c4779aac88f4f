"""Which drafted nodes a tree keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attention.eagle.checks import FLOATS, at, check_integer, check_out, check_tensor, first, wants_check
from sparse_attention.eagle.native import engine


def select_tree(scores: Tensor, total_tokens: int, *, impl: str = "auto", check: bool | None = None, out: Tensor | None = None) -> Tensor:
    """Flat indices of the `total_tokens` best candidates of each request, ascending: [B, total_tokens] int64.

    scores: [B, F] float32, float64, bfloat16 or float16, cumulative log-probabilities. Order: score descending, then flat index
    ascending. A child's score is at most its parent's and its flat index is higher, so the selection holds every ancestor of what it
    holds. Equal to EAGLE's `topk` and `sort` unless the scores at the cut are equal, where `torch.topk` leaves the choice open.

    A NaN score is a ValueError; with check=False (the default on CUDA) it counts as minus infinity. impl: "auto", "native" or
    "reference". out: [B, total_tokens] int64, contiguous.
    """
    check_tensor("scores", scores, (None, None), FLOATS)
    total_tokens = check_integer("total_tokens", total_tokens, 1, scores.shape[1])
    native = engine("select", scores.device, impl)
    if out is None:
        out = scores.new_empty(scores.shape[0], total_tokens, dtype=torch.int64)
    else:
        check_out("out", out, (scores.shape[0], total_tokens), scores.device)
    checked = wants_check(check, scores.device)
    if native is None:
        if checked:
            refuse_nan(scores)
        return out.copy_(select_reference(scores, total_tokens))
    if checked and scores.device.type != "cpu":
        refuse_nan(scores)
    if native(scores.contiguous(), out) and checked:
        refuse_nan(scores)
    return out


def select_reference(scores: Tensor, total_tokens: int) -> Tensor:
    """`select_tree` as two sorts."""
    ranked = torch.where(scores.isnan(), -torch.inf, scores) + 0.0  # -0.0 becomes 0.0: a radix sort would tell them apart
    best = ranked.argsort(dim=1, descending=True, stable=True)[:, :total_tokens]
    return best.sort(dim=1).values


def refuse_nan(scores: Tensor) -> None:
    """ValueError if a score is NaN."""
    found = first(scores.isnan())
    if found is not None:
        raise ValueError(f"{at('scores', found)} is nan; expected a number or minus infinity")
