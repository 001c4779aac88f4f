"""Speculative decoding's token trees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sparse_attention.patterns.base import Spans
from sparse_attention.patterns.digest import Digested
from sparse_attention.patterns.validate import integers, set_field
from sparse_attention.patterns.window import FAR


@dataclass(frozen=True, eq=False)
class Tree(Digested):
    """The last len(parents) positions are nodes of a tree: each sees the whole prefix, its ancestors and itself.

    parents: parents[n] is the index of node n's parent, -1 for a root; parents precede their children. Queries before the
    tree, if the call has any, are causal (SpecInfer, Miao et al. 2023; EAGLE, Li et al. 2024).
    """

    parents: tuple[int, ...]

    def __post_init__(self):
        set_field(self, "parents", integers("parents", self.parents, -1))
        sees = np.zeros((len(self.parents), len(self.parents)), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= node:
                raise ValueError(f"parents[{node}] is {parent}; expected less than {node}: parents precede their children")
            if parent >= 0:
                sees[node] = sees[parent]
            sees[node, node] = True
        set_field(self, "_sees", torch.from_numpy(sees))
        self._digest_from(self.parents)

    def check(self, q_len, kv_len, heads):
        for name, length in (("q_len", q_len), ("kv_len", kv_len)):
            if len(self.parents) > length:
                raise ValueError(f"parents has {len(self.parents)} nodes; expected at most {name}, {length}")

    def _first(self, lengths) -> int:
        """The position of node 0."""
        return lengths.kv_len - len(self.parents)

    def allows(self, i, j, lengths):
        first = self._first(lengths)
        related = self._sees.to(i.device)[(i - first).clamp(min=0), (j - first).clamp(min=0)]
        return (j <= i) & ((j < first) | related)

    def spans(self, first, last, lengths):
        return Spans.of((np.zeros_like(first), last + 1))

    def full(self, rects, lengths):
        return (rects.j1 <= self._first(lengths)) & (rects.j1 - 1 <= rects.i0)

    def empty(self, rects, lengths):
        return rects.j0 > rects.i1 - 1

    def signature(self, rects, lengths):
        causal = rects.i1 <= self._first(lengths)
        return np.where(causal, rects.i0 - rects.j0, FAR + np.arange(rects.i0.size))
