"""Which EAGLE a model instance is, and a refusal that names the attribute where it is none that we know."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import NamedTuple

import torch
from torch import nn

STEPS = ("tree_decoding", "evaluate_posterior", "update_inference_inputs")

_COMMON = (
    "ea_layer.topK_genrate",
    "ea_layer.reset",
    "ea_layer.reset_kv",
    "ea_layer.embed_tokens",
    "base_model.lm_head",
    "base_model.model.layers",
)
_DYNAMIC = ("ea_layer.total_tokens", "ea_layer.depth", "ea_layer.top_k", "ea_layer.tree_mask_init", "ea_layer.position_ids")
_OWN = {
    1: ("ea_layer.layers", "ea_layer.tree_buffer", "ea_layer.repeat_hidden"),
    2: ("ea_layer.layers", *_DYNAMIC),
    3: (
        "ea_layer.midlayer",
        "ea_layer.lm_head",
        "ea_layer.norm",
        "ea_layer.config.vocab_size",
        "ea_layer.config.draft_vocab_size",
        *_DYNAMIC,
    ),
}
_DECODING = ("model", "tree_candidates", "past_key_values", "tree_position_ids", "input_ids", "retrieve_indices")
_POSTERIOR = ("logits", "candidates", "logits_processor")
_UPDATE = ("input_ids", "candidates", "best_candidate", "accept_length", "retrieve_indices", "logits_processor")
_CACHE = ("past_key_values_data_list", "current_length_data", "model")
_DYNAMIC_STEPS = {
    "tree_decoding": _DECODING,
    "evaluate_posterior": _POSTERIOR,
    "update_inference_inputs": (*_UPDATE, "new_token", *_CACHE, "hidden_state_new", "sample_p"),
}
_STATIC_STEPS = {
    "tree_decoding": _DECODING,
    "evaluate_posterior": (*_POSTERIOR, "cart_candidates_prob", "op", "p_indices", "tree_candidates", "b_indices"),
    "update_inference_inputs": (
        *(*_UPDATE, "logits", "tree_logits", "new_token"),
        *(*_CACHE, "hidden_state", "hidden_state_new", "sample_p"),
    ),
}


class Found(NamedTuple):
    """What `recognise` found of a model."""

    version: int  # 1, 2 or 3: of EAGLE
    device: torch.device
    steps: Mapping[str, Callable]  # upstream's functions, of the names of STEPS
    generators: tuple[str, ...]  # methods of the model that call the steps


def recognise(model: nn.Module) -> Found:
    """The EAGLE that `model` is. ValueError names the first attribute that is missing or other than expected."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is {type(model).__name__}; expected an EaModel of EAGLE, a torch.nn.Module")
    for path in _COMMON:
        _attribute(model, path)
    layer = model.ea_layer
    if hasattr(layer, "midlayer"):
        version = 3
    elif hasattr(layer, "tree_buffer"):
        version = 1
    elif hasattr(layer, "layers"):
        version = 2
    else:
        raise ValueError("model.ea_layer.midlayer is missing; expected it (EAGLE-3), or layers (EAGLE-1 and 2)")
    for path in _OWN[version]:
        _attribute(model, path)
    if version == 3 and layer.config.vocab_size != layer.config.draft_vocab_size:
        _attribute(model, "ea_layer.d2t")
    _parameters("model.ea_layer.topK_genrate", layer.topK_genrate, ("hidden_states", "input_ids", "head", "logits_processor"))
    _plain("model.ea_layer.topK_genrate", layer.topK_genrate)
    if version == 1 and not isinstance(_globals(layer.topK_genrate).get("top_k"), int):
        raise ValueError(f"{layer.topK_genrate.__module__}.top_k is missing; expected the integer that EAGLE-1 drafts with")
    generators = _generators(model)
    if "eagenerate" not in generators:
        raise ValueError(f"model.eagenerate is missing or calls none of {', '.join(STEPS)}; expected EAGLE's method")
    return Found(version, _one_device(model), _steps(model, generators, version), generators)


def unwrapped(method: Callable) -> FunctionType:
    """The function under the decorators of torch that a method has."""
    return inspect.unwrap(getattr(method, "__func__", method))


def _globals(method: Callable) -> dict:
    return unwrapped(method).__globals__


def _generators(model: nn.Module) -> tuple[str, ...]:
    names = [name for cls in type(model).__mro__ if cls not in nn.Module.__mro__ for name in vars(cls)]
    found = []
    for name in dict.fromkeys([*names, *vars(model)]):
        method = vars(model).get(name, inspect.getattr_static(type(model), name, None))
        function = unwrapped(method) if inspect.isroutine(method) else None
        if isinstance(function, FunctionType) and set(STEPS) & set(function.__code__.co_names):
            _plain(f"model.{name}", method)
            found.append(name)
    return tuple(found)


def _steps(model: nn.Module, generators: tuple[str, ...], version: int) -> dict[str, Callable]:
    """The step functions that eagenerate calls; the other generators must call the same."""
    expected = _STATIC_STEPS if version == 1 else _DYNAMIC_STEPS
    found: dict[str, Callable] = {}
    for name in generators:
        function = unwrapped(getattr(model, name))
        for step in STEPS:
            where = f"{function.__module__}.{step}"
            if not callable(function.__globals__.get(step)) or step not in function.__code__.co_names:
                raise ValueError(f"{where} is missing or not called by model.{name}; expected EAGLE's function")
            _parameters(where, function.__globals__[step], expected[step], exact=True)
            if found.setdefault(step, function.__globals__[step]) is not function.__globals__[step]:
                raise ValueError(f"{where} differs from that of model.{generators[0]}; expected one function for all")
    return found


def _attribute(model: nn.Module, path: str) -> None:
    value, walked = model, "model"
    for name in path.split("."):
        walked += f".{name}"
        if not hasattr(value, name):
            raise ValueError(f"{walked} is missing; expected a model of EAGLE-1, 2 or 3 with it")
        value = getattr(value, name)


def _parameters(where: str, function: Callable, expected: tuple[str, ...], exact: bool = False) -> None:
    given = tuple(inspect.signature(function).parameters)
    if given[: None if exact else len(expected)] != expected:
        raise ValueError(f"{where} takes ({', '.join(given)}); expected ({', '.join(expected)})")


def _plain(where: str, method: Callable) -> None:
    """That nothing but torch.no_grad and its like wraps the method: another wrapper would be lost."""
    function = getattr(method, "__func__", method)
    while hasattr(function, "__wrapped__"):
        if not function.__code__.co_filename.endswith("_contextlib.py"):
            raise ValueError(f"{where} is wrapped by {function.__code__.co_filename}; expected EAGLE's own method")
        function = function.__wrapped__


def _one_device(model: nn.Module) -> torch.device:
    device = model.base_model.lm_head.weight.device
    for name, p in model.named_parameters():
        if p.device != device:
            raise ValueError(f"model.{name} is on {p.device}; expected {device}, where model.base_model.lm_head is")
    return device
