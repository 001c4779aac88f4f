"""Patterns that allow one range of distances i - j: dense, causal and sliding windows; and attention sinks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sparse_attention.patterns.base import Lengths, Pattern, Spans
from sparse_attention.patterns.validate import boolean, integer, set_field

# A distance that no sequence reaches, far from overflow when positions are added.
FAR = 1 << 48


class Banded(Pattern):
    """Allows low <= i - j < high; subclasses say `bounds()` -> (low, high), with -FAR and FAR for none."""

    def bounds(self) -> tuple[int, int]:
        raise NotImplementedError(f"{type(self).__name__} must define bounds()")

    def allows(self, i, j, lengths):
        low, high = self.bounds()
        distance = i - j
        if low <= -FAR:
            return distance < high
        return (distance >= low) & (distance < high) if high < FAR else distance >= low

    def spans(self, first, last, lengths):
        low, high = self.bounds()
        return Spans.of((first - high + 1, last - low + 1))

    def full(self, rects, lengths):
        low, high = self.bounds()
        return (rects.i0 - rects.j1 + 1 >= low) & (rects.i1 - 1 - rects.j0 < high)

    def empty(self, rects, lengths):
        low, high = self.bounds()
        return (rects.i1 - 1 - rects.j0 < low) | (rects.i0 - rects.j1 + 1 >= high)

    def signature(self, rects, lengths):
        return rects.i0 - rects.j0

    def quotient(self, stride, residue, lengths):
        low, high = self.bounds()
        return Band(low if low <= -FAR else -(-low // stride), high if high >= FAR else -(-high // stride))

    def _pairs(self, lengths):
        low, high = self.bounds()
        i = np.arange(lengths.offset, lengths.kv_len)
        start, stop = np.maximum(i - high + 1, 0), np.minimum(i - low + 1, lengths.kv_len)
        return int(np.maximum(stop - start, 0).sum())


@dataclass(frozen=True)
class Band(Banded):
    """Distances low <= i - j < high: what a strided sequence sees of a window."""

    low: int
    high: int

    def bounds(self):
        return self.low, self.high


@dataclass(frozen=True)
class Dense(Banded):
    """Every query sees every key."""

    def bounds(self):
        return -FAR, FAR

    def allows(self, i, j, lengths):
        return torch.ones(1, dtype=torch.bool, device=i.device).expand(torch.broadcast_shapes(i.shape, j.shape))


@dataclass(frozen=True)
class Causal(Banded):
    """A query sees the keys at or before its own position: j <= i."""

    def bounds(self):
        return 0, FAR


@dataclass(frozen=True)
class SlidingWindow(Banded):
    """The last `window` keys, the query's own included: 0 <= i - j < window.

    That is what Mistral (Jiang et al. 2023) and Hugging Face call `sliding_window`. With ``causal=False`` a query sees
    `window` keys on each side and its own: abs(i - j) <= window.
    """

    window: int
    causal: bool = True

    def __post_init__(self):
        set_field(self, "window", integer("window", self.window, 1))
        boolean("causal", self.causal)

    def bounds(self):
        return (0, self.window) if self.causal else (-self.window, self.window + 1)


@dataclass(frozen=True)
class Sinks(Pattern):
    """Every query sees the first `n` keys: attention sinks (StreamingLLM, Xiao et al. 2023). Not causal by itself."""

    n: int

    def __post_init__(self):
        set_field(self, "n", integer("n", self.n, 1))

    def allows(self, i, j, lengths: Lengths):
        return (j < self.n).expand(torch.broadcast_shapes(i.shape, j.shape))

    def spans(self, first, last, lengths):
        return Spans.of((np.zeros_like(first), np.full_like(first, self.n)))

    def full(self, rects, lengths):
        return rects.j1 <= self.n

    def empty(self, rects, lengths):
        return rects.j0 >= self.n

    def signature(self, rects, lengths):
        return rects.j0

    def quotient(self, stride, residue, lengths):
        seen = -((residue - self.n) // stride)
        return Sinks(seen) if seen > 0 else Band(0, 0)

    def _pairs(self, lengths):
        return min(self.n, lengths.kv_len) * lengths.q_len
