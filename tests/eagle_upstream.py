"""EAGLE's formulas written out again (SafeAILab/EAGLE main, cnets.py and utils.py), for one request, as lists where that is plainer."""

from __future__ import annotations

import torch
from torch import Tensor


def draft_candidates(depth: int, top_k: int, seed: int, vocab: int = 200, dtype=torch.float32, peak: float = 1.0):
    """(scores [F], tokens [F], parents [P]) as the loop of topK_genrate makes them, from a random draft model."""
    rng = torch.Generator().manual_seed(seed)

    def expand(rows):
        logits = torch.randn(rows, vocab, generator=rng) * 3 * peak
        return torch.topk(torch.log_softmax(logits.to(dtype), dim=-1), top_k, dim=-1)

    first = expand(1)
    scores = first.values[0]
    score_rows, token_rows, parents = [first.values[0]], [first.indices[0]], [torch.zeros(1, dtype=torch.int64)]
    expanded = torch.arange(top_k)
    for i in range(depth):
        bias = 1 + top_k**2 * max(0, i - 1) + (top_k if i > 0 else 0)
        parents.append(expanded + bias)
        step = expand(top_k)
        cumulative = step.values + scores[:, None]
        best = torch.topk(cumulative.flatten(), top_k)
        expanded, scores = best.indices, best.values
        score_rows.append(cumulative.flatten())
        token_rows.append(step.indices.flatten())
    return torch.cat(score_rows), torch.cat(token_rows), torch.cat(parents)


def select(scores: Tensor, total_tokens: int) -> Tensor:
    return torch.sort(torch.topk(scores, total_tokens).indices).values


def build(selected: Tensor, tokens: Tensor, parents: Tensor, root_token: int, top_k: int, sort_rows: bool):
    """(draft_tokens [1, N], retrieve_indices [leaves, W], tree_mask [1, 1, N, N], tree_position_ids [N], parents of nodes 1.. [N - 1])."""
    total_tokens = len(selected)
    draft_tokens = torch.cat([torch.tensor([root_token]), tokens[selected]])[None]
    draft_parents = parents[selected // top_k]
    mask_index = torch.searchsorted(selected, draft_parents - 1, right=False)
    mask_index[draft_parents == 0] = -1
    above = (mask_index + 1).tolist()
    mask = torch.eye(total_tokens + 1).bool()
    mask[:, 0] = True
    for i in range(total_tokens):
        mask[i + 1] |= mask[above[i]]
    positions = mask.int().sum(1) - 1
    width = int(positions.max()) + 1
    inner = set(above)
    rows = []
    for node in range(total_tokens + 1):
        if node in inner:
            continue
        path, at = [], node
        for _ in range(int(positions[node]) + 1):
            path.append(at)
            at = above[at - 1]
        rows.append(path[::-1] + [-1] * (width - len(path)))
    if sort_rows:
        rows.sort(key=lambda row: [total_tokens + 5 if x < 0 else x for x in row])
    return draft_tokens, torch.tensor(rows), mask.float()[None, None], positions.long(), above


def evaluate_greedy(logits: Tensor, draft_tokens: Tensor, retrieve: Tensor):
    """(best_candidate, accept_length, sample_p) from the gathered [leaves, W, V]."""
    gathered = logits[retrieve]
    candidates = torch.cat([draft_tokens.flatten(), torch.tensor([-1])])[retrieve]
    match = (candidates[:, 1:] == gathered[:, :-1].argmax(-1)).int()
    lengths = match.cumprod(1).sum(1)
    longest = int(lengths.max())
    best = 0 if longest == 0 else int(lengths.argmax())
    return best, longest, gathered[best, longest]


def evaluate_sampling(probs: Tensor, draft_tokens: Tensor, retrieve: Tensor, coins: list[float]):
    """(best_candidate, accepted draft tokens, sample_p, coins used); probs [N, V] are already softmaxed."""
    gathered = probs[retrieve]
    candidates = torch.cat([draft_tokens.flatten(), torch.tensor([-1])])[retrieve]
    coins = iter(coins)
    used, length, best = 0, 1, 0
    accepted = candidates[0, :1]
    rejected_last = False
    for i in range(1, candidates.shape[1]):
        if i != length:
            break
        rejected_last = False
        same = (candidates[:, :length] == accepted).all(dim=1)
        p = gathered[same.nonzero()[0, 0], i - 1].clone()
        tried = []
        for j in range(len(candidates)):
            token = int(candidates[j, i])
            if not same[j] or token in tried or token == -1:
                continue
            tried.append(token)
            used += 1
            if next(coins) <= p[token]:
                accepted = torch.cat([accepted, candidates[j, i : i + 1]])
                length += 1
                best = j
                break
            p[token] = 0
            p = p / p.sum()
            rejected_last = True
    if rejected_last and length != candidates.shape[1]:
        return best, length - 1, p, used
    return best, length - 1, gathered[best, length - 1], used
