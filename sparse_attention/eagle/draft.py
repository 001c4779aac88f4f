"""One step of drafting: the best tokens of each row, then the best nodes of all rows."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attention.eagle.checks import FLOATS, INT64, at, check_integer, check_tensor, first, wants_check
from sparse_attention.eagle.native import engine
from sparse_attention.eagle.outputs import Frontier, TopK


def logsoftmax_topk(logits: Tensor, k: int, *, d2t: Tensor | None = None, impl: str = "auto", check: bool | None = None) -> TopK:
    """The k largest log-probabilities of each row, best first, and their tokens: each [..., k].

    logits: [..., V] float32, float64, bfloat16 or float16. The log-softmax is computed in float32 (float64 for float64) and rounded to the
    dtype of the logits once, as PyTorch does on CUDA. Order: logit descending, then token ascending; PyTorch's topk leaves equal values
    open. d2t: [V] int64, EAGLE-3's offsets from draft tokens to the target's: tokens are then t + d2t[t].

    NaN or plus infinity among the logits is a ValueError; with check=False (the default on CUDA) both count as minus infinity, whose
    log-probability is minus infinity even where nothing else is in the row.
    """
    if not isinstance(logits, Tensor) or logits.dim() < 1:
        raise ValueError(f"logits is {logits!r:.80}; expected a tensor [..., V]")
    check_tensor("logits", logits, (None,) * logits.dim(), FLOATS)
    vocab = logits.shape[-1]
    k = check_integer("k", k, 1, vocab)
    if d2t is not None:
        d2t = check_tensor("d2t", d2t, (vocab,), INT64, logits, "logits").contiguous()
    native = engine("logsoftmax_topk", logits.device, impl)
    checked = wants_check(check, logits.device)
    if checked and (native is None or logits.device.type != "cpu"):
        _refuse_logits(logits)
    shape = (*logits.shape[:-1], k)
    if native is not None:
        values, tokens = logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)
        if native(logits.contiguous(), values, tokens, d2t) and checked:
            _refuse_logits(logits)
        return TopK(values, tokens)
    ranked = torch.where(logits.isnan() | (logits == torch.inf), -torch.inf, logits)
    tokens = (ranked + 0.0).argsort(dim=-1, descending=True, stable=True)[..., :k]
    wide = ranked if ranked.dtype == torch.float64 else ranked.float()
    values = wide.log_softmax(-1).gather(-1, tokens)
    values = torch.where(values.isnan(), -torch.inf, values).to(logits.dtype)
    return TopK(values, tokens if d2t is None else tokens + d2t[tokens])


def cumulative_topk(
    log_probs: Tensor,
    scores: Tensor,
    k: int,
    *,
    tokens: Tensor | None = None,
    level: int | None = None,
    impl: str = "auto",
    check: bool | None = None,
) -> Frontier:
    """The k best continuations of all rows: log_probs + scores, and its largest. See `Frontier` for what comes back.

    log_probs: [B, R, K] float, of K continuations of each of R nodes, best first; scores: [B, R] of the same dtype, of the nodes. The sum
    is rounded to their dtype. Order: score descending, then flat index ascending. tokens: [B, R, K] int64, of the continuations.
    level: i of EAGLE's loop (B1.4), where R = K: with it `parents` are what the next level's rows have as parents,
    1 + index + K + i * K^2.

    A NaN is a ValueError; with check=False (the default on CUDA) a sum that is NaN counts as minus infinity.
    """
    check_tensor("log_probs", log_probs, (None, None, None), FLOATS)
    batch, rows, width = log_probs.shape
    check_tensor("scores", scores, (batch, rows), (log_probs.dtype,), log_probs, "log_probs")
    k = check_integer("k", k, 1, rows * width)
    if tokens is not None:
        tokens = check_tensor("tokens", tokens, (batch, rows, width), INT64, log_probs, "log_probs").contiguous()
    if level is not None:
        level = check_integer("level", level, 0)
    native = engine("cumulative_topk", log_probs.device, impl)
    checked = wants_check(check, log_probs.device)
    if checked and (native is None or log_probs.device.type != "cpu"):
        _refuse_sums(log_probs, scores)
    first_parent = None if level is None else 1 + width + level * width * width
    if native is not None:
        best, index = log_probs.new_empty(batch, k), log_probs.new_empty(batch, k, dtype=torch.int64)
        chosen = None if tokens is None else torch.empty_like(index)
        parents = None if level is None else torch.empty_like(index)
        made = Frontier(log_probs.new_empty(batch, rows, width), best, index, torch.empty_like(index), chosen, parents)
        if native(log_probs.contiguous(), scores.contiguous(), tokens, first_parent or 0, *made) and checked:
            _refuse_sums(log_probs, scores)
        return made
    cumulative = log_probs + scores[:, :, None]
    cumulative = torch.where(cumulative.isnan(), -torch.inf, cumulative)
    flat = cumulative.flatten(1)
    index = (flat + 0.0).argsort(dim=1, descending=True, stable=True)[:, :k]
    chosen = None if tokens is None else tokens.flatten(1).gather(1, index)
    parents = None if level is None else index + first_parent
    return Frontier(cumulative, flat.gather(1, index), index, index // width, chosen, parents)


def _refuse_logits(logits: Tensor) -> None:
    found = first(logits.isnan() | (logits == torch.inf))
    if found is not None:
        raise ValueError(f"{at('logits', found)} is {float(logits[found])}; expected a finite number or minus infinity")


def _refuse_sums(log_probs: Tensor, scores: Tensor) -> None:
    for name, x in (("log_probs", log_probs), ("scores", scores), ("log_probs + scores", log_probs + scores[:, :, None])):
        found = first(x.isnan())
        if found is not None:
            raise ValueError(f"{at(name, found)} is nan; expected a number or minus infinity")
