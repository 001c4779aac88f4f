"""The model that the command line works on: a checkpoint through an installed EAGLE, or the small one that trains itself."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparse_attention.eagle.small_model_layers import Config
from sparse_attention.eagle.small_model_training import small_model

_SIZES = {"total_token": 60, "depth": 7, "top_k": 10}


class Loaded(NamedTuple):
    """A model and what to ask it."""

    model: nn.Module
    prompts: list[Tensor]  # [1, L] each
    name: str


def load(options) -> Loaded:
    """From base_model, draft_model, prompt, total_token, depth, top_k, vocab, dtype and device of the command line. ValueError where they
    do not fit together."""
    if (options.base_model is None) != (options.draft_model is None):
        missing = "--draft-model" if options.draft_model is None else "--base-model"
        raise ValueError(f"{missing} is not given; expected --base-model and --draft-model, or neither")
    sizes = {name: getattr(options, name) for name in _SIZES}
    dtype = getattr(torch, options.dtype)
    if options.base_model is None:
        if options.prompt:
            raise ValueError(f"--prompt is {options.prompt[0]!r}; expected none without --base-model: the small model has no tokenizer")
        chosen = {name: _SIZES[name] if value is None else value for name, value in sizes.items()}
        _check_sizes(**chosen)
        config = Config(vocab_size=options.vocab, draft_vocab_size=min(512, max(1, options.vocab * 5 // 6)))
        model, prompts = small_model(config=config, steps=60, unroll=3, **chosen)
        model = model.to(options.device, dtype)
        model.ea_layer.init_tree()
        return Loaded(model, [p.to(options.device) for p in prompts], f"small self-trained EAGLE-3, {options.vocab} tokens")
    model = _checkpoint(options.base_model, options.draft_model, {k: v for k, v in sizes.items() if v is not None}, dtype)
    model = model.to(options.device).eval()
    model.ea_layer.init_tree()
    if hasattr(model.ea_layer, "total_tokens"):
        _check_sizes(model.ea_layer.total_tokens + 1, model.ea_layer.depth, model.ea_layer.top_k)
    texts = options.prompt or ["Write a short story about a robot that learns to paint."]
    prompts = [model.tokenizer(text, return_tensors="pt").input_ids.to(options.device) for text in texts]
    for text, ids in zip(texts, prompts):
        if ids.shape[1] < 2:
            raise ValueError(f"--prompt is {text!r}, {ids.shape[1]} tokens; expected 2 or more")
    return Loaded(model, prompts, f"{options.base_model} with {options.draft_model}")


def _check_sizes(total_token: int, depth: int, top_k: int) -> None:
    most = 1 + top_k + depth * top_k**2
    if not 2 <= total_token <= most:
        raise ValueError(f"--total-token is {total_token}; expected 2 to {most} with --depth {depth} and --top-k {top_k}")


def _checkpoint(base: str, draft: str, sizes: dict[str, int], dtype: torch.dtype) -> nn.Module:
    try:
        from eagle.model.ea_model import EaModel
    except ImportError as error:
        where = "https://github.com/SafeAILab/EAGLE"
        raise ValueError(f"--base-model is {base!r}; expected EAGLE to be installed ({where}): {error}") from error
    known = inspect.signature(EaModel.from_pretrained).parameters
    for name, value in sizes.items():
        if name not in known:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; expected none: this EAGLE's tree is fixed")
    config = Path(draft) / "config.json"
    if "use_eagle3" in known and config.exists():
        sizes["use_eagle3"] = "draft_vocab_size" in json.loads(config.read_text())
    return EaModel.from_pretrained(base_model_path=base, ea_model_path=draft, torch_dtype=dtype, **sizes)
