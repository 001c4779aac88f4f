"""The steps of the small model's generation, unpatched: what EAGLE's utils.py computes, by the same formulas and under the same names."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor


def prepare_logits_processor(temperature: float = 0.0, top_p: float = 0.0, top_k: float = 0) -> Callable[[Tensor | None, Tensor], Tensor]:
    """process(input_ids, logits [n, V]): logits divided by the temperature, minus infinity outside top-p and top-k."""

    def process(input_ids: Tensor | None, logits: Tensor) -> Tensor:
        logits = logits / temperature
        if 1e-8 <= top_p < 1.0:
            ranked, order = logits.sort(dim=-1)
            drop = ranked.softmax(-1).cumsum(-1) <= 1 - top_p
            drop[..., -1] = False
            logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
        if top_k > 0:
            logits = logits.masked_fill(logits < logits.topk(min(int(top_k), logits.shape[-1])).values[..., -1:], -torch.inf)
        return logits

    return process


def reset_tree_mode(model) -> None:
    model.base_model.model.tree_mask = None


def initialize_tree(input_ids, model, past_key_values, logits_processor):
    """Runs the base on the prompt, takes a token, and drafts the first tree."""
    outputs, orig, hidden_states = model(input_ids, past_key_values=past_key_values, output_orig=True)
    if logits_processor is not None:
        token = torch.multinomial(logits_processor(None, orig[:, -1]).softmax(-1), 1)
    else:
        token = orig[:, -1].argmax()[None, None]
    if model.use_eagle3:
        hidden_states = torch.cat(outputs["hidden_states"], -1)
    drafted = model.ea_layer.topK_genrate(
        hidden_states, torch.cat([input_ids, token], 1), model.base_model.lm_head, logits_processor
    )
    return *drafted, orig, hidden_states, token


def tree_decoding(model, tree_candidates, past_key_values, tree_position_ids, input_ids, retrieve_indices):
    """(logits [leaves, W, V], hidden states [1, N, .], outputs) of the base at the tree's nodes."""
    position_ids = (tree_position_ids + input_ids.shape[1])[None]
    outputs, tree_logits, hidden_state = model(
        tree_candidates, output_orig=True, past_key_values=past_key_values, position_ids=position_ids
    )
    if model.use_eagle3:
        hidden_state = torch.cat(outputs["hidden_states"], -1)
    return tree_logits[0, retrieve_indices], hidden_state, outputs


def evaluate_posterior(logits, candidates, logits_processor):
    """(best row, accepted draft tokens, logits or probabilities of the next token [V])."""
    if logits_processor is None:
        match = (candidates[:, 1:].to(logits.device) == logits[:, :-1].argmax(-1)).int()
        lengths = match.cumprod(1).sum(1)
        accept_length = lengths.max()
        best = lengths.argmax() if accept_length > 0 else torch.zeros((), dtype=torch.long, device=candidates.device)
        return best, accept_length, logits[best, accept_length]
    length, best, rejected = 1, 0, False
    accepted = candidates[0, :1]
    for i in range(1, candidates.shape[1]):
        if i != length:
            break
        rejected = False
        same = (candidates[:, :length] == accepted).all(1)
        first = same.nonzero()[0, 0]
        p = logits_processor(None, logits[first, i - 1][None])[0].softmax(0)
        tried = []
        for j in range(len(candidates)):
            token = int(candidates[j, i])
            if not same[j] or token == -1 or token in tried:
                continue
            tried.append(token)
            if random.random() <= p[token]:
                accepted = torch.cat([accepted, candidates[j, i : i + 1]])
                length, best = length + 1, j
                break
            p[token] = 0
            p = p / p.sum()
            rejected = True
    if not rejected or length == candidates.shape[1]:
        p = logits_processor(None, logits[best, length - 1][None])[0].softmax(0)
    return torch.tensor(best), length - 1, p


@torch.no_grad()
def update_inference_inputs(
    input_ids,
    candidates,
    best_candidate,
    accept_length,
    retrieve_indices,
    logits_processor,
    new_token,
    past_key_values_data_list,
    current_length_data,
    model,
    hidden_state_new,
    sample_p,
):
    """Moves the accepted rows, takes the next token and drafts the next tree."""
    length = input_ids.shape[1]
    rows = retrieve_indices[best_candidate, : accept_length + 1] + length
    input_ids = torch.cat([input_ids, candidates[None, best_candidate, : accept_length + 1].to(input_ids.device)], -1)
    for data in past_key_values_data_list:
        moved = data[..., rows.to(data.device), :]
        data[..., length : length + moved.shape[-2], :].copy_(moved)
    current_length_data.fill_(length + len(rows))
    accepted_hidden = hidden_state_new[:, retrieve_indices][:, best_candidate, : accept_length + 1]
    if logits_processor is not None:
        token = torch.multinomial(sample_p, 1)[None]
    else:
        token = sample_p.argmax()[None, None]
    drafted = model.ea_layer.topK_genrate(
        accepted_hidden,
        input_ids=torch.cat([input_ids, token.to(input_ids.device)], 1),
        head=model.base_model.lm_head,
        logits_processor=logits_processor,
    )
    return input_ids, *drafted, new_token + accept_length + 1, None, token
