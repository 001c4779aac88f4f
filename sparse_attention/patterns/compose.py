"""Patterns made of patterns: intersection, union, difference, and what a strided sequence sees of a pattern."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparse_attention.patterns.base import Lengths, Part, Pattern, Rects, Spans


class _Pair(Pattern):
    """What `And`, `Or` and `Minus` share: two operands, whose bits `combine` turns into one (tensors or arrays)."""

    a: Pattern
    b: Pattern

    @staticmethod
    def combine(a, b):
        raise NotImplementedError

    def check(self, q_len, kv_len, heads):
        self.a.check(q_len, kv_len, heads)
        self.b.check(q_len, kv_len, heads)

    @property
    def live(self):
        return self.a.live or self.b.live

    def frozen(self):
        return type(self)(self.a.frozen(), self.b.frozen()) if self.live else self

    def for_head(self, head):
        a, b = self.a.for_head(head), self.b.for_head(head)
        return self if a is self.a and b is self.b else type(self)(a, b)

    def quotient(self, stride, residue, lengths):
        return type(self)(self.a.quotient(stride, residue, lengths), self.b.quotient(stride, residue, lengths))

    def bits(self, rects, tile, lengths):
        return self.combine(self.a.bits(rects, tile, lengths), self.b.bits(rects, tile, lengths))

    def allows(self, i, j, lengths):
        return self.combine(self.a.allows(i, j, lengths), self.b.allows(i, j, lengths))

    def signature(self, rects, lengths):
        a, b = (_ranked_signature(x, rects, lengths) for x in (self.a, self.b))
        return a * (b.max(initial=0) + 1) + b


def _ranked_signature(pattern: Pattern, rects: Rects, lengths: Lengths) -> np.ndarray:
    """0 for empty rectangles, 1 for full ones, otherwise 2 + the rank of the signature."""
    rank = np.unique(pattern.signature(rects, lengths), return_inverse=True)[1].reshape(-1)
    uniform = np.where(pattern.full(rects, lengths), 1, 2 + rank)
    return np.where(pattern.empty(rects, lengths), 0, uniform)


@dataclass(frozen=True)
class And(_Pair):
    """The pairs that both patterns allow; written ``a & b``."""

    a: Pattern
    b: Pattern

    def __repr__(self):
        return f"({self.a!r} & {self.b!r})"

    @staticmethod
    def combine(a, b):
        return a & b

    def parts(self, lengths):
        a, b = self.a.parts(lengths), self.b.parts(lengths)
        if _plain(a) and _plain(b):
            return (Part(1, self),)
        strided, other = (b, self.a) if _plain(a) else (a, self.b)
        return tuple(_restrict(part, other, And, lengths) for part in strided)

    def spans(self, first, last, lengths):
        a, b = self.a.spans(first, last, lengths), self.b.spans(first, last, lengths)
        a, b = _clip(a, b, first.size), _clip(b, a, first.size)
        smaller = _total(a, first.size) <= _total(b, first.size)
        return Spans.join(a.pick(smaller[a.group]), b.pick(~smaller[b.group]))

    def full(self, rects, lengths):
        return self.a.full(rects, lengths) & self.b.full(rects, lengths)

    def empty(self, rects, lengths):
        return self.a.empty(rects, lengths) | self.b.empty(rects, lengths)


@dataclass(frozen=True)
class Or(_Pair):
    """The pairs that either pattern allows; written ``a | b``."""

    a: Pattern
    b: Pattern

    def __repr__(self):
        return f"({self.a!r} | {self.b!r})"

    @staticmethod
    def combine(a, b):
        return a | b

    def parts(self, lengths):
        a, b = self.a.parts(lengths), self.b.parts(lengths)
        if _plain(a) and _plain(b):
            return (Part(1, self),)
        return a + tuple(_restrict(part, self.a, Minus, lengths) for part in b)

    def spans(self, first, last, lengths):
        return Spans.join(self.a.spans(first, last, lengths), self.b.spans(first, last, lengths))

    def full(self, rects, lengths):
        return self.a.full(rects, lengths) | self.b.full(rects, lengths)

    def empty(self, rects, lengths):
        return self.a.empty(rects, lengths) & self.b.empty(rects, lengths)


@dataclass(frozen=True)
class Minus(_Pair):
    """The pairs that `a` allows and `b` does not: how the parts of a union are kept disjoint."""

    a: Pattern
    b: Pattern

    @staticmethod
    def combine(a, b):
        return a & ~b

    def spans(self, first, last, lengths):
        return self.a.spans(first, last, lengths)

    def full(self, rects, lengths):
        return self.a.full(rects, lengths) & self.b.empty(rects, lengths)

    def empty(self, rects, lengths):
        return self.a.empty(rects, lengths) | self.b.full(rects, lengths)


@dataclass(frozen=True)
class Quotient(Pattern):
    """`inner` seen by the sequence residue, residue + stride, ...: positions here are (position - residue) / stride."""

    inner: Pattern
    stride: int
    residue: int
    lengths: Lengths

    def _outer(self, x):
        return x * self.stride + self.residue

    def _rects(self, rects):
        i1, j1 = (self._outer(x - 1) + 1 for x in (rects.i1, rects.j1))
        return Rects(self._outer(rects.i0), i1, self._outer(rects.j0), j1)

    def allows(self, i, j, lengths):
        return self.inner.allows(self._outer(i), self._outer(j), self.lengths)

    def spans(self, first, last, lengths):
        group, start, stop = self.inner.spans(self._outer(first), self._outer(last), self.lengths)
        down = self.residue - self.stride + 1
        return Spans(group, (start - down) // self.stride, (stop - down) // self.stride)

    def full(self, rects, lengths):
        return self.inner.full(self._rects(rects), self.lengths)

    def empty(self, rects, lengths):
        return self.inner.empty(self._rects(rects), self.lengths)

    def signature(self, rects, lengths):
        return self.inner.signature(self._rects(rects), self.lengths)


def _plain(parts: tuple[Part, ...]) -> bool:
    return len(parts) == 1 and parts[0].stride == 1


def _restrict(part: Part, other: Pattern, combine: type, lengths: Lengths) -> Part:
    if part.stride == 1:
        return Part(1, combine(part.of_residue(0), other))
    others = [other.quotient(part.stride, c, lengths) for c in range(part.stride)]
    if not isinstance(part.pattern, tuple) and all(x == others[0] for x in others):
        return Part(part.stride, combine(part.pattern, others[0]))
    return Part(part.stride, tuple(combine(part.of_residue(c), x) for c, x in enumerate(others)))


def _clip(spans: Spans, by: Spans, groups: int) -> Spans:
    """`spans` cut to the smallest range that holds what `by` has in the same group."""
    low, high = np.full(groups, np.iinfo(np.int64).max), np.full(groups, np.iinfo(np.int64).min)
    some = by.start < by.stop
    np.minimum.at(low, by.group[some], by.start[some])
    np.maximum.at(high, by.group[some], by.stop[some])
    return Spans(spans.group, np.maximum(spans.start, low[spans.group]), np.minimum(spans.stop, high[spans.group]))


def _total(spans: Spans, groups: int) -> np.ndarray:
    return np.bincount(spans.group, np.maximum(spans.stop.astype(float) - spans.start, 0), minlength=groups)
