"""What is here, which engine would run each operation, and what `optimize_eagle` would patch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

import torch
from torch import nn

from sparse_attention import _build
from sparse_attention._build import BuildError
from sparse_attention.eagle.native import engine
from sparse_attention.eagle.optimize_mask import NAME, has_mask
from sparse_attention.eagle.optimize_model import Found, recognise

KERNELS = (
    *("select", "build", "assemble", "tree_mask", "verify_greedy", "verify_sampling"),
    *("append", "retrieve", "commit", "logsoftmax_topk", "cumulative_topk"),
)
_DYNAMIC = {
    "topK_genrate": "logsoftmax_topk, cumulative_topk, build_tree",
    "tree_decoding": "the same with logits kept [N, V]",
    "evaluate_posterior": "verify_greedy, verify_sampling",
    "update_inference_inputs": "commit",
}
_STATIC = {
    **_DYNAMIC,
    "topK_genrate": "logsoftmax_topk (greedy)",
    "evaluate_posterior": "verify_greedy (EAGLE's own where it samples)",
}


def environment() -> dict[str, str]:
    """Versions and devices."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "no device",
    }
    for package in ("sparse_attention", "transformers", "triton"):
        found[package] = _version(package)
    found["EAGLE"] = "not installed"
    if importlib.util.find_spec("eagle") is not None:
        named = [f"{name} {_version(name)}" for name in ("eagle-llm", "eagle") if _version(name) != "not installed"]
        found["EAGLE"] = named[0] if named else "importable"
    return found


def engines() -> dict[str, dict[str, str]]:
    """For each device and operation "compiled", or why not."""
    found = {"cpu": {}}
    try:
        _build.kernels()
    except BuildError as error:
        found["cpu"] = dict.fromkeys(KERNELS, f"none: {str(error).splitlines()[0]}")
    else:
        found["cpu"] = {name: _engine(name, torch.device("cpu")) for name in KERNELS}
    if torch.cuda.is_available():
        found["cuda"] = {name: _engine(name, torch.device("cuda")) for name in KERNELS}
    return found


def patches(model: nn.Module) -> tuple[Found, dict[str, str]]:
    """(what the model is, {attribute or function that would be replaced: by what}). ValueError as of optimize_eagle."""
    found = recognise(model)
    replaced = _STATIC if found.version == 1 else _DYNAMIC
    places = {"model.ea_layer.topK_genrate": replaced["topK_genrate"]}
    for step, function in found.steps.items():
        places[f"{function.__module__}.{step}, as called by {' and '.join(found.generators)}"] = replaced[step]
    if has_mask(model.base_model.model):
        places[f"model.base_model.model.{NAME}"] = "the same without its wait for the device"
    return found, places


def report(model: nn.Module, name: str) -> dict:
    """All of it, as `text` prints it."""
    found, places = patches(model)
    return {
        "environment": environment(),
        "engines": engines(),
        "model": {"name": name, "version": f"EAGLE-{found.version}", "device": str(found.device), "patches": places},
    }


def healthy(found: dict) -> bool:
    """Every operation has a compiled kernel on the CPU."""
    return set(found["engines"]["cpu"].values()) == {"compiled"}


def text(found: dict) -> str:
    lines = [f"{name:<17} {value}" for name, value in found["environment"].items()]
    for device, kernels in found["engines"].items():
        lines += ["", f"operations on {device}:"] + [f"  {name:<17} {state}" for name, state in kernels.items()]
    model = found["model"]
    lines += ["", f"optimize_eagle would patch {model['name']} ({model['version']} on {model['device']}):"]
    lines += [f"  {place}\n      by {what}" for place, what in model["patches"].items()]
    return "\n".join(lines)


def _engine(name: str, device: torch.device) -> str:
    return "compiled" if engine(name, device, "auto") is not None else "none: the PyTorch reference runs"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
