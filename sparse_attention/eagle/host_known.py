"""Token ids on the device whose newest the host knows too, so that EAGLE's loop can look for the end token without waiting."""

from __future__ import annotations

import functools
from types import GeneratorType, MethodType

import torch
from torch import Tensor


class HostKnown(Tensor):
    """Token ids [1, L], or [n] of them, the last of which are in the list `host` as well. What is computed from it is a plain tensor.

    EAGLE's loop asks `token in input_ids[0, input_len:].tolist()` after every step. That slice and its list are taken from `host`, as
    far as it reaches; everything else is the tensor's own.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    host: list[int]

    def __getitem__(self, index):
        part = super().__getitem__(index)
        if self.dim() == 2 and isinstance(index, tuple) and len(index) == 2 and type(index[0]) is int and isinstance(index[1], slice):
            start, stop, step = index[1].indices(self.shape[1])
            first = self.shape[1] - len(self.host)
            if step == 1 and first <= start <= stop:
                return _known(part, self.host[start - first : stop - first])
        return part

    def tolist(self):
        return list(self.host) if self.dim() == 1 else super().tolist()


def extended(input_ids: Tensor, accepted: Tensor, tokens: list[int]) -> HostKnown:
    """input_ids [1, L] and accepted [1, n] behind it, whose values are `tokens`."""
    before = input_ids.host if isinstance(input_ids, HostKnown) else []
    return _known(torch.cat([input_ids, accepted], 1), before + tokens)


def plain_results(method: MethodType) -> MethodType:
    """The method, returning or yielding plain tensors."""

    @functools.wraps(method.__func__)
    def call(self, *args, **kwargs):
        result = method.__func__(self, *args, **kwargs)
        return (_plain(x) for x in result) if isinstance(result, GeneratorType) else _plain(result)

    return MethodType(call, method.__self__)


def _plain(result: object) -> object:
    if isinstance(result, tuple):
        return tuple(map(_plain, result))
    return result.as_subclass(Tensor) if isinstance(result, HostKnown) else result


def _known(ids: Tensor, host: list[int]) -> HostKnown:
    made = ids.as_subclass(HostKnown)
    made.host = host
    return made
