"""Packed documents that do not see each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sparse_attention.patterns.base import Spans
from sparse_attention.patterns.digest import Digested
from sparse_attention.patterns.validate import integers, set_field


@dataclass(frozen=True, eq=False)
class Documents(Digested):
    """i and j lie in the same packed document; not causal by itself (``Documents(...) & Causal()``).

    lengths: the documents' lengths in order; they sum to kv_len. A query before the first key (q_len > kv_len) is in no
    document.
    """

    lengths: tuple[int, ...]

    def __post_init__(self):
        set_field(self, "lengths", integers("lengths", self.lengths, 1))
        ends = np.cumsum((0,) + self.lengths)
        # A document of no keys in front holds the positions below 0.
        set_field(self, "_starts", np.concatenate([[0], ends[:-1]]))
        set_field(self, "_stops", ends)
        self._digest_from(self.lengths)

    def check(self, q_len, kv_len, heads):
        if self._stops[-1] != kv_len:
            raise ValueError(f"lengths sum to {self._stops[-1]}; expected kv_len, {kv_len}")

    def _document(self, position: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._stops, position, side="right")

    def allows(self, i, j, lengths):
        stops = torch.from_numpy(self._stops).to(i.device)
        document = torch.bucketize(i, stops, right=True)
        return (j >= torch.from_numpy(self._starts).to(i.device)[document]) & (j < stops[document])

    def spans(self, first, last, lengths):
        return Spans.of((self._starts[self._document(first)], self._stops[self._document(last)]))

    def full(self, rects, lengths):
        first, last = self._document(rects.i0), self._document(rects.i1 - 1)
        return (first == last) & (rects.j0 >= self._starts[first]) & (rects.j1 <= self._stops[first])

    def empty(self, rects, lengths):
        first, last = self._document(rects.i0), self._document(rects.i1 - 1)
        return (rects.j1 <= self._starts[first]) | (rects.j0 >= self._stops[last])

    def _pairs(self, lengths):
        queries = self._stops[1:] - np.maximum(self._starts[1:], lengths.offset)
        return int((np.maximum(queries, 0) * np.array(self.lengths)).sum())
