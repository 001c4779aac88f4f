"""Trains the small model's draft on the base's own greedy output, unrolled over the steps of a draft as EAGLE-3 trains."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparse_attention.eagle.small_model import EaModel
from sparse_attention.eagle.small_model_layers import Config


def small_model(
    use_eagle3: bool = True,
    *,
    config: Config = Config(),
    total_token: int = 60,
    depth: int = 5,
    top_k: int = 10,
    prompts: int = 6,
    prompt_length: int = 12,
    new_tokens: int = 48,
    steps: int = 120,
    unroll: int = 4,
    seed: int = 0,
) -> tuple[EaModel, list[Tensor]]:
    """(model, prompts [1, prompt_length]): a random base and a draft overfitted on its greedy answers to these prompts.

    Float32 on the CPU; the same seed gives the same weights on the same machine, and the caller's random state is left alone. EAGLE-3's
    draft knows only the draft_vocab_size most used tokens. steps: of Adam; unroll: draft steps trained for each position.
    """
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        model = EaModel(config, use_eagle3, total_token, depth, top_k).eval()
        _initialise(model)
        starts = torch.randint(config.vocab_size, (prompts, prompt_length))
        tokens = _continue(model, starts, new_tokens)
        if use_eagle3:
            used = torch.bincount(tokens.flatten(), minlength=config.vocab_size)
            known = used.argsort(descending=True, stable=True)[: config.draft_vocab_size].sort().values
            model.ea_layer.d2t.copy_(known - torch.arange(config.draft_vocab_size))
        _train(model, tokens, steps, unroll)
    return model, [row[None] for row in starts]


@contextmanager
def _one_thread():
    """The matrices are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _initialise(model: EaModel) -> None:
    """Weights large enough that greedy output does not repeat itself."""
    for name, p in model.base_model.named_parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=1.0 if "embed" in name else 1.6 * p.shape[1] ** -0.5)
    model.ea_layer.embed_tokens.weight.data.copy_(model.base_model.model.embed_tokens.weight.data)


@torch.no_grad()
def _continue(model: EaModel, starts: Tensor, new_tokens: int) -> Tensor:
    """[prompts, prompt_length + new_tokens], greedy."""
    tokens = starts
    for _ in range(new_tokens):
        last = model.base_model.model(tokens)[0][:, -1:]
        tokens = torch.cat([tokens, model.base_model.lm_head(last).argmax(-1)], 1)
    return tokens


def _train(model: EaModel, tokens: Tensor, steps: int, unroll: int) -> None:
    """Draft step j of the position t reads token t + 1 + j and the hidden state of step j - 1, and foretells token t + 2 + j."""
    layer, head = model.ea_layer, model.base_model.lm_head
    with torch.no_grad():
        outputs = model.base_model.model(tokens)
    features = torch.cat(outputs["hidden_states"], -1) if model.use_eagle3 else outputs[0]
    rows = tokens.shape[1] - 1 - unroll
    targets = tokens
    if model.use_eagle3:
        lookup = torch.full((model.config.vocab_size,), -100)
        lookup[layer.d2t + torch.arange(len(layer.d2t))] = torch.arange(len(layer.d2t))
        targets = lookup[tokens]  # -100, which the loss leaves out, where the draft does not know the token
    own = torch.eye(rows)[None, None]
    causal = torch.ones(rows, rows).tril()[None, None]
    parameters = [p for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    for _ in range(steps):
        hidden, past, loss = features[:, :rows], None, 0.0
        for j in range(unroll):
            layer.tree_mask = torch.cat([causal, *[own] * j], 3)  # a step sees the steps before it at its own position only
            positions = torch.arange(rows) + j
            hidden, past = layer(hidden, tokens[:, 1 + j : 1 + j + rows], past_key_values=past, position_ids=positions, use_cache=True)
            logits = layer.logits(hidden, head)
            loss = loss + nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 2 + j : 2 + j + rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    layer.reset()
    layer.zero_grad()
