"""Which compiled function runs an operation: csrc/cpu on the CPU, csrc/cuda on CUDA, by one name and one signature.

A compiled function takes contiguous tensors, fills the outputs it is given and returns whether its inputs were malformed; on CUDA it
does not wait for the device and returns False.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from sparse_attention import _build
from sparse_attention._build import BuildError
from sparse_attention.eagle.checks import IMPLS, check_choice


def engine(name: str, device: torch.device, impl: str) -> Callable | None:
    """The compiled `eagle_<name>` for this device, or None for the PyTorch reference.

    "native" never falls back: ValueError where this device has no such function. "auto" on a device without one takes the reference;
    on the CPU a compiler that is missing is a BuildError.
    """
    check_choice("impl", impl, IMPLS)
    if impl == "reference":
        return None
    if device.type == "cpu":
        return getattr(_build.kernels(), f"eagle_{name}")
    found = getattr(_cuda(device), f"eagle_{name}", None) if device.type == "cuda" else None
    if found is None and impl == "native":
        raise ValueError(f"impl is 'native'; expected 'auto' or 'reference' for {name} on {device}, which has no compiled kernel for it")
    return found


@functools.cache  # a failed build too: it is not tried again in every call
def _cuda(device: torch.device) -> object:
    from sparse_attention import _build_cuda

    capability = torch.cuda.get_device_capability(device)
    if _build_cuda.obstacle(capability):
        return None
    try:
        return _build_cuda.kernels(capability)
    except BuildError:
        return None
