"""Token ids on the device whose newest the host knows too, so that EAGLE's loop can look for the end token without waiting."""

from __future__ import annotations

import copy
import functools
from types import GeneratorType, MethodType

import torch
from torch import Tensor


class HostKnown(Tensor):
    """Token ids [1, L], or [n] of them, the last of which are in the list `host` as well. What is computed from it, and a copy of it, is a
    plain tensor.

    EAGLE's loop asks `token in input_ids[0, input_len:].tolist()` after every step. That slice and its list are taken from `host`, as
    far as it reaches, until the ids are changed in place; everything else is the tensor's own. Inference tensors do not count their
    changes, so their `host` is never taken; nor does a change through `.data`, or by a replayed graph, count, so ids must not be changed so.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    host: list[int]
    version: int  # of the tensor when `host` held its values; -1 for an inference tensor

    @property
    def current(self) -> bool:
        """Whether `host` still holds the tensor's values."""
        return self.version == _version(self) >= 0

    def __getitem__(self, index):
        part = super().__getitem__(index)
        two = self.dim() == 2 and isinstance(index, tuple) and len(index) == 2
        if two and type(index[0]) is int and isinstance(index[1], slice) and self.current:
            start, stop, step = index[1].indices(self.shape[1])
            first = self.shape[1] - len(self.host)
            if step == 1 and first <= start <= stop:
                return _known(part, self.host[start - first : stop - first])
        return part

    def tolist(self):
        return list(self.host) if self.dim() == 1 and self.current else super().tolist()

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), copy.deepcopy(_plain(self), memo))

    def __reduce_ex__(self, protocol):
        return _plain(self).__reduce_ex__(protocol)


def extended(input_ids: Tensor, accepted: Tensor, tokens: list[int]) -> HostKnown:
    """input_ids [1, L] and accepted [1, n] behind it, whose values are `tokens`."""
    before = input_ids.host if isinstance(input_ids, HostKnown) and input_ids.current else []
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
    made.host, made.version = host, _version(made)
    return made


def _version(ids: Tensor) -> int:
    return -1 if ids.is_inference() else ids._version
