"""Patterns that carry tensors: equal and hashed by their content, which is digested once."""

from __future__ import annotations

import hashlib

import torch

from sparse_attention.patterns.base import Pattern


class Digested(Pattern):
    """Base of dataclasses made with ``eq=False``; `_digest_from` is called once, at the end of their `__post_init__`."""

    def _digest_from(self, *content: object) -> None:
        digest = hashlib.blake2b(digest_size=16)
        for item in content:
            if isinstance(item, torch.Tensor):
                digest.update(f"{item.dtype}{tuple(item.shape)}".encode())
                digest.update(item.numpy().data if item.numel() else b"")
            else:
                digest.update(repr(item).encode())
            digest.update(b"|")
        object.__setattr__(self, "_digest", digest.digest())
        object.__setattr__(self, "_hash", hash(digest.digest()))

    def __eq__(self, other):
        if self is other:
            return True
        return self._digest == other._digest if type(self) is type(other) else NotImplemented

    def __hash__(self):
        return self._hash

    def __getstate__(self):
        # The hash of bytes differs between processes.
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    def __setstate__(self, state):
        self.__dict__.update(state, _hash=hash(state["_digest"]))
