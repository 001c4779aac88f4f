"""Counts on the CPU what would make the host wait for a device."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode

READS = {"item", "tolist", "numpy", "cpu", "nonzero", "unique", "equal", "__bool__", "__int__", "__index__", "__float__", "__contains__"}


class Reads(TorchFunctionMode):
    """`count` of calls that read a tensor's values on the host, those of `on_host` left out, which would be there on any device.

    An assignment by a mask counts too, unless a number is assigned: the places are counted first.
    """

    def __init__(self, on_host: torch.Tensor):
        super().__init__()
        self.on_host, self.count = on_host.untyped_storage().data_ptr(), 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        by_mask = name == "__setitem__" and isinstance(args[1], torch.Tensor) and args[1].dtype == torch.bool
        if (name in READS and args[0].untyped_storage().data_ptr() != self.on_host) or (by_mask and isinstance(args[2], torch.Tensor)):
            self.count += 1
        return function(*args, **(kwargs or {}))
