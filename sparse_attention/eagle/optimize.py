"""`optimize_eagle`: an unmodified EAGLE model runs on the tree operations, this instance and no other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import FunctionType, MethodType

import torch
from torch import nn

from sparse_attention.eagle.checks import IMPLS, check_choice
from sparse_attention.eagle.host_known import plain_results
from sparse_attention.eagle.optimize_mask import NAME, has_mask, without_wait
from sparse_attention.eagle.optimize_model import STEPS, recognise, unwrapped
from sparse_attention.eagle.optimize_steps import DynamicSteps, StaticSteps, Steps

_STEPS_OF = "_sparse_attention_eagle"
_MASK = f"base_model.model.{NAME}"
_ABSENT = object()


def optimize_eagle(model: nn.Module, *, impl: str = "auto") -> tuple[nn.Module, dict[str, Callable]]:
    """Patches an EaModel of SafeAILab/EAGLE (EAGLE-1, 2 or 3) in place; returns it and the methods that were replaced.

    Replaced are, for this instance only: ea_layer.topK_genrate, by logsoftmax_topk, cumulative_topk and build_tree, which makes the tree
    mask too (EAGLE-1: its greedy top-k); and in eagenerate, ea_generate and every other method that calls them, the functions
    tree_decoding (logits are not gathered into [leaves, W, V]), evaluate_posterior (verify_greedy, verify_sampling) and
    update_inference_inputs (commit, with the hidden states); and the base's _prepare_decoder_attention_mask, whose mask of the tree would
    wait for the device. The loop itself, the two models and their cache stay EAGLE's, and no module or class is changed: the instance gets
    its own copy of each such method, whose globals hold our functions.

    Greedy output is the unpatched model's in float32; sampled output has its law, drawn with torch's generator in the place of Python's.
    EAGLE-1 keeps its own drawing and rule of acceptance when it samples.

    impl: "auto", "native" (every operation needs a compiled kernel) or "reference". `eagle_hits` counts what ran.

    ValueError: model is already patched, is spread over devices, or is none that we know; it names the attribute.
    """
    check_choice("impl", impl, IMPLS)
    if isinstance(model, nn.Module) and _STEPS_OF in vars(model):
        raise ValueError("model is already patched; expected one that is not: call restore_eagle first")
    found = recognise(model)
    steps = (StaticSteps if found.version == 1 else DynamicSteps)(model, found, impl)
    original_methods = {name: getattr(model, name) for name in found.generators}
    original_methods["ea_layer.topK_genrate"] = model.ea_layer.topK_genrate
    decoder = model.base_model.model
    if has_mask(decoder):
        original_methods[_MASK] = getattr(decoder, NAME)
    steps.before = {path: vars(owner).get(name, _ABSENT) for path, owner, name in _places(model, original_methods)}
    steps.original_methods = original_methods
    replaced = {name: getattr(steps, name) for name in STEPS}
    for name in found.generators:
        vars(model)[name] = plain_results(with_globals(original_methods[name], replaced))
    vars(model.ea_layer)["topK_genrate"] = steps.topK_genrate
    if _MASK in original_methods:
        vars(decoder)[NAME] = without_wait(original_methods[_MASK])
    vars(model)[_STEPS_OF] = steps
    return model, original_methods


def restore_eagle(model: nn.Module, original_methods: Mapping[str, Callable]) -> nn.Module:
    """Takes back what `optimize_eagle` did: the instance has the attributes that it had, the same objects under the same names.

    original_methods: what `optimize_eagle` returned for this model. ValueError for another model's, or if it is not patched.
    """
    steps = _steps_of(model)
    if original_methods is not steps.original_methods:
        raise ValueError("original_methods are not those that optimize_eagle returned for this model; expected the same dict")
    del vars(model)[_STEPS_OF]
    for path, owner, name in _places(model, original_methods):
        if steps.before[path] is _ABSENT:
            del vars(owner)[name]
        else:
            vars(owner)[name] = steps.before[path]
    return model


def eagle_hits(model: nn.Module) -> dict[str, int]:
    """How often each operation ran for this model since it was patched. Calls that no compiled kernel ran count under "<name>/reference".

    ValueError if the model is not patched."""
    return dict(_steps_of(model).hits)


def with_globals(method: MethodType, replaced: Mapping[str, Callable]) -> MethodType:
    """A copy of a method, bound to the same object, that sees its module's globals with some replaced; under torch.no_grad."""
    function = unwrapped(method)
    known = {**function.__globals__, **replaced}
    copy = FunctionType(function.__code__, known, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copy, function)
    del copy.__wrapped__
    return MethodType(torch.no_grad()(copy), method.__self__)


def _places(model: nn.Module, paths: Mapping[str, Callable]) -> list[tuple[str, nn.Module, str]]:
    """(path, object, attribute) of each path."""
    return [(path, model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in paths]


def _steps_of(model: nn.Module) -> Steps:
    if not isinstance(model, nn.Module) or _STEPS_OF not in vars(model):
        raise ValueError(f"model ({type(model).__name__}) is not patched; expected one that optimize_eagle returned")
    return vars(model)[_STEPS_OF]
