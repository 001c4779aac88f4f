"""Checks that every operation shares: each a ValueError that names the argument, its value and what was expected."""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

IMPLS = ("auto", "native", "reference")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INT64 = (torch.int64,)


def check_tensor(
    name: str, x: object, shape: Sequence[int | None], dtypes: Sequence[torch.dtype], like: Tensor | None = None, of: str = ""
) -> Tensor:
    """`x`, a tensor of this shape (None: any size of at least 1), one of these dtypes, and the device of `like`, the argument `of`."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is {short(x)}; expected a tensor of shape {_spelled(shape)}")
    sizes = x.shape
    fits = len(sizes) == len(shape)
    for n, size in zip(sizes, shape):
        fits = fits and (n > 0 if size is None else n == size)
    if not fits:
        raise ValueError(f"{name} has shape {tuple(sizes)}; expected {_spelled(shape)}")
    if x.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {x.dtype}; expected {' or '.join(map(str, dtypes))}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} is on {x.device}; expected {like.device}, the device of {of}")
    return x


def _spelled(shape: Sequence[int | None]) -> str:
    return "[" + ", ".join("*" if size is None else str(size) for size in shape) + "]"


def check_out(name: str, out: object, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int64) -> None:
    """That `out` can be written: its shape, dtype, device, and that it is contiguous."""
    if isinstance(out, Tensor) and out.shape == shape and out.dtype == dtype and out.device == device and out.is_contiguous():
        return
    if not isinstance(out, Tensor) or tuple(out.shape) != shape:
        raise ValueError(f"{name} is {tuple(out.shape) if isinstance(out, Tensor) else out!r}; expected a tensor of shape {shape}")
    if out.dtype != dtype:
        raise ValueError(f"{name} has dtype {out.dtype}; expected {dtype}")
    if out.device != device:
        raise ValueError(f"{name} is on {out.device}; expected {device}, the device of the inputs")
    raise ValueError(f"{name} has strides {out.stride()}; expected a contiguous tensor")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """That `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def check_integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """`value`, an integer from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < low or (high is not None and value > high):
        wanted = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} is {short(value)}; expected an integer {wanted}")
    return int(value)


def wants_check(check: bool | None, device: torch.device) -> bool:
    """Whether values are checked: None means yes on the CPU, where it costs no wait for a device, and no elsewhere."""
    return device.type == "cpu" if check is None else bool(check)


def first(flags: Tensor) -> tuple[int, ...] | None:
    """The index of the first True, or None. Waits for the device."""
    found = flags.nonzero()
    return tuple(found[0].tolist()) if len(found) else None


def at(name: str, index: Sequence[int]) -> str:
    """How a message writes an element: name[b, n]."""
    return f"{name}[{', '.join(map(str, index))}]"


def short(value: object) -> str:
    """One line about a value."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return " ".join(repr(value).split())[:80]
