"""Patterns that look back in steps: dilated windows, several scales of them, and powers of two."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import gcd
from numbers import Integral
from operator import or_

import numpy as np

from sparse_attention.patterns.alias import Alias
from sparse_attention.patterns.base import Lengths, Part, Pattern, Spans
from sparse_attention.patterns.compose import Or
from sparse_attention.patterns.validate import boolean, integer, integers, set_field
from sparse_attention.patterns.window import FAR, Band


class Stepped(Pattern):
    """Allows i - j = k * step with low <= k < high; subclasses say `steps()` -> (step, low, high), FAR for no bound."""

    def steps(self) -> tuple[int, int, int]:
        raise NotImplementedError(f"{type(self).__name__} must define steps()")

    def allows(self, i, j, lengths):
        step, low, high = self.steps()
        distance = i - j
        seen = distance % step == 0
        if low > -FAR:
            seen = seen & (distance >= low * step)
        if high < FAR:
            seen = seen & (distance < high * step)
        return seen

    def parts(self, lengths):
        step, low, high = self.steps()
        if step == 1 or _stride_pays(lengths, step, high - low):
            return (Part(step, Band(low, high)),)
        return (Part(1, self),)

    def _range(self, nearest, farthest):
        """The first and last k of allowed distances within nearest..farthest."""
        step, low, high = self.steps()
        return np.maximum(-(-nearest // step), low), np.minimum(farthest // step, high - 1)

    def spans(self, first, last, lengths):
        step, low, high = self.steps()
        if first.size == 0 or (last - first).max() + 1 >= step:
            below, above = (-FAR if low <= -FAR else low * step), (FAR if high >= FAR else (high - 1) * step)
            return Spans.of((first - above, last - below + 1))
        k0, k1 = self._range(first - lengths.kv_len + 1, last)
        counts = np.maximum(k1 - k0 + 1, 0)
        group = np.repeat(np.arange(first.size), counts)
        back = (k1[group] - _within(counts)) * step
        return Spans(group, first[group] - back, last[group] - back + 1)

    def full(self, rects, lengths):
        k0, k1 = self._range(rects.i0 - rects.j1 + 1, rects.i1 - 1 - rects.j0)
        distances = (rects.i1 - rects.i0) + (rects.j1 - rects.j0) - 1
        return k1 - k0 + 1 == distances

    def empty(self, rects, lengths):
        k0, k1 = self._range(rects.i0 - rects.j1 + 1, rects.i1 - 1 - rects.j0)
        return k1 < k0

    def signature(self, rects, lengths):
        return rects.i0 - rects.j0

    def quotient(self, stride, residue, lengths):
        step, low, high = self.steps()
        common = gcd(step, stride)
        low = low if low <= -FAR else -(-low * common // stride)
        high = high if high >= FAR else -(-high * common // stride)
        return Steps(step // common, low, high) if step > common else Band(low, high)

    def _pairs(self, lengths):
        i = np.arange(lengths.offset, lengths.kv_len)
        k0, k1 = self._range(i - lengths.kv_len + 1, i)
        return int(np.maximum(k1 - k0 + 1, 0).sum())


@dataclass(frozen=True)
class Steps(Stepped):
    """Distances k * step, low <= k < high: a dilated window without its side conditions."""

    step: int
    low: int
    high: int

    def steps(self):
        return self.step, self.low, self.high


@dataclass(frozen=True)
class Dilated(Stepped):
    """A sliding window that looks at every `dilation`-th key: i - j = k * dilation with 0 <= k < window.

    dilation: an int, or a tuple with one for each head. With ``causal=False``, abs(k) <= window.
    """

    window: int
    dilation: int | tuple[int, ...]
    causal: bool = True

    def __post_init__(self):
        set_field(self, "window", integer("window", self.window, 1))
        one = isinstance(self.dilation, Integral) or not hasattr(self.dilation, "__iter__")
        set_field(self, "dilation", (integer if one else integers)("dilation", self.dilation, 1))
        boolean("causal", self.causal)

    def check(self, q_len, kv_len, heads):
        if isinstance(self.dilation, tuple) and len(self.dilation) != heads:
            raise ValueError(f"dilation is {self.dilation}, one for each of {len(self.dilation)} heads; expected {heads} heads")

    def for_head(self, head):
        return Dilated(self.window, self.dilation[head], self.causal) if isinstance(self.dilation, tuple) else self

    def steps(self):
        low, high = (0, self.window) if self.causal else (-self.window, self.window + 1)
        return self.dilation, low, high


@dataclass(frozen=True)
class MultiScale(Alias):
    """The union over s in `strides` of ``Dilated(window, s, causal)``: near keys densely, far ones ever more sparsely.

    Each key counts once: 1024 keys and strides 1, 2, 4, 8 make 2,560 keys a row.
    """

    window: int
    strides: tuple[int, ...] = (1, 2, 4, 8)
    causal: bool = True

    def __post_init__(self):
        set_field(self, "window", integer("window", self.window, 1))
        set_field(self, "strides", integers("strides", self.strides, 1))
        boolean("causal", self.causal)

    def meaning(self):
        return reduce(or_, (Dilated(self.window, stride, self.causal) for stride in sorted(set(self.strides))))


@dataclass(frozen=True)
class Strided(Alias):
    """The last `stride` keys, and every `stride`-th one before: 0 <= i - j < stride or (i - j) % stride == 0, causal.

    Sparse Transformer's strided attention, both of its heads in one (Child et al. 2019, section 4.2).
    """

    stride: int

    def __post_init__(self):
        set_field(self, "stride", integer("stride", self.stride, 1))

    def meaning(self):
        return Or(Band(0, self.stride), Steps(self.stride, 0, FAR))


@dataclass(frozen=True)
class LogSparse(Pattern):
    """Distances below `window` and powers of two, causal: about log2(n) keys a row (LogSparse Transformer, Li et al. 2019)."""

    window: int = 1

    def __post_init__(self):
        set_field(self, "window", integer("window", self.window, 1))

    def allows(self, i, j, lengths):
        distance = i - j
        return (distance >= 0) & ((distance < self.window) | (distance & (distance - 1) == 0))

    def _powers(self, lengths: Lengths) -> list[int]:
        """Powers of two that are not in the window, falling."""
        return [1 << n for n in reversed(range(lengths.kv_len.bit_length())) if self.window <= 1 << n < lengths.kv_len]

    def spans(self, first, last, lengths):
        far = [(first - power, last - power + 1) for power in self._powers(lengths)]
        return Spans.of(*far, (first - self.window + 1, last + 1))

    def full(self, rects, lengths):
        return Band(0, self.window).full(rects, lengths)

    def empty(self, rects, lengths):
        nearest, farthest = rects.i0 - rects.j1 + 1, rects.i1 - 1 - rects.j0
        power = np.left_shift(1, np.frexp(np.maximum(farthest, 1))[1] - 1)
        return (farthest < 0) | ((nearest >= self.window) & (power < nearest))

    def signature(self, rects, lengths):
        return rects.i0 - rects.j0

    def quotient(self, stride, residue, lengths):
        window = -(-self.window // stride)
        return LogSparse(window) if stride & (stride - 1) == 0 else Band(0, window)

    def _pairs(self, lengths):
        window = Band(0, self.window)._pairs(lengths)
        return window + sum(lengths.kv_len - max(lengths.offset, power) for power in self._powers(lengths))


def _within(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... within each of consecutive groups of these sizes."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _stride_pays(lengths: Lengths, step: int, window: int) -> bool:
    """Whether strided sequences visit fewer tiles than plain ones; tiles of 64 stand for any."""

    def tiles(q, k, reach):
        return -(-q // 64) * min(-(-k // 64), -(-reach // 64) + 1)

    q, k = lengths
    strided = min(step, q) * tiles(-(-q // step), -(-k // step), window)
    plain = tiles(q, k, window * step) * min(1.0, 127 / step)
    return strided < plain
