"""Any pattern at all, as a function of positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparse_attention.patterns.base import Pattern


@dataclass(frozen=True)
class Predicate(Pattern):
    """The pairs for which ``fn(i, j)`` is True; the same for every head.

    `fn` gets the query and key positions as int64 tensors that broadcast against each other, and returns a bool tensor of
    a shape that broadcasts to theirs. It must be a pure function of the two. Nothing is known about its structure, so
    a layout looks at every pair once: n^2 time, and memory for the tiles it visits. Two predicates are equal when their
    functions are the same object.
    """

    fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    has_text = False

    def __post_init__(self):
        if not callable(self.fn):
            raise ValueError(f"fn is {self.fn!r}; expected a function of two int64 tensors")

    def __repr__(self):
        return f"Predicate({getattr(self.fn, '__qualname__', repr(self.fn))})"

    def allows(self, i, j, lengths):
        shape = torch.broadcast_shapes(i.shape, j.shape)
        out = self.fn(i, j)
        if not isinstance(out, torch.Tensor) or out.dtype != torch.bool:
            got = f"{out.dtype} tensor" if isinstance(out, torch.Tensor) else type(out).__name__
            raise ValueError(f"fn returned a {got}; expected a bool tensor that broadcasts to {tuple(shape)}")
        try:
            return out.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"fn returned shape {tuple(out.shape)}; expected one that broadcasts to {tuple(shape)}"
            ) from None
