"""Builder of the end-to-end case of EAGLE: a small model that trains itself, as EAGLE runs it against patched by optimize_eagle."""

from __future__ import annotations

import copy

from perf.decode_workloads import _device
from sparse_attention.breakeven import Workload
from sparse_attention.eagle import optimize_eagle
from sparse_attention.eagle.small_model_layers import Config
from sparse_attention.eagle.small_model_training import small_model


def generate(vocab: int, tokens: int = 50) -> Workload:
    """Greedy generation of at least `tokens` tokens in float32, patched against unpatched; the output must be equal."""
    device = _device()
    config = Config(vocab_size=vocab, draft_vocab_size=min(512, vocab))
    model, prompts = small_model(config=config, total_token=60, depth=7, top_k=10, prompts=2, steps=60, unroll=3)
    model.to(device).ea_layer.init_tree()
    patched, _ = optimize_eagle(copy.deepcopy(model))
    options = {"max_new_tokens": tokens, "max_length": 256}
    ids = prompts[0].to(device)
    _, new, last = model.eagenerate(ids, log=True, **options)
    return Workload(
        candidate=lambda: patched.eagenerate(ids, **options),
        baselines={"EAGLE": lambda: model.eagenerate(ids, **options)},
        note=f"{int(new)} tokens a call, {int(new) / (last + 1):.1f} a step",
    )
