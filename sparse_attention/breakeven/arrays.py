"""What the harness needs to know of tensors and arrays, whoever made them."""

from __future__ import annotations

import sys
from typing import Any

_SAMPLED = 1024  # elements of an array that stand for it


def arrays(output: Any) -> list[Any]:
    """The tensors and arrays in an output, which may be nested in tuples and lists."""
    if isinstance(output, (tuple, list)):
        return [a for item in output for a in arrays(item)]
    return [output] if hasattr(output, "shape") and hasattr(output, "dtype") else []


def memory(array: Any) -> int:
    """Address of the storage that `array` is a view of."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor) and array.layout is not torch.strided:
        return id(array)
    if hasattr(array, "untyped_storage"):
        return array.untyped_storage().data_ptr()
    while getattr(array, "base", None) is not None:
        array = array.base
    return array.ctypes.data if hasattr(array, "ctypes") else id(array)


def size(array: Any) -> int:
    """Number of elements."""
    return array.numel() if hasattr(array, "numel") else array.size


def is_floating(array: Any) -> bool:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return array.is_floating_point()
    return getattr(getattr(array, "dtype", None), "kind", "") == "f"


def sample(array: Any) -> Any:
    """A NumPy array of elements evenly spaced over `array`, copied; None for layouts that have no such order."""
    import numpy as np

    if hasattr(array, "detach"):
        torch = sys.modules["torch"]
        if array.layout is not torch.strided:
            return None
        flat = array.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLED)].cpu()
        return (some.double() if some.is_floating_point() else some).numpy().copy()
    flat = np.asarray(array).reshape(-1)
    return flat[:: max(1, flat.size // _SAMPLED)].copy()
