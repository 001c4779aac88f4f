"""What a pattern is: a predicate over (query position, key position), and what it may promise about its structure."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch


class Lengths(NamedTuple):
    """The two sequence lengths of a call; query `local` stands at position `local + offset`."""

    q_len: int
    kv_len: int

    @property
    def offset(self) -> int:
        return self.kv_len - self.q_len


class Tile(NamedTuple):
    """Query rows and key columns of a tile of a layout, each a multiple of 64."""

    q: int
    k: int


class Rects(NamedTuple):
    """Rectangles [i0, i1) x [j0, j1) of (query position, key position): int64 arrays of one length."""

    i0: np.ndarray
    i1: np.ndarray
    j0: np.ndarray
    j1: np.ndarray


class Spans(NamedTuple):
    """Key ranges [start, stop) of numbered groups: int64 arrays of one length. Empty and overlapping ranges are legal."""

    group: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    @classmethod
    def of(cls, *ranges: tuple[np.ndarray, np.ndarray]) -> "Spans":
        """From (start, stop) pairs whose arrays hold one range for each group."""
        start = np.stack([start for start, _ in ranges], axis=1)
        stop = np.stack([stop for _, stop in ranges], axis=1)
        return cls(np.repeat(np.arange(len(start)), len(ranges)), start.ravel(), stop.ravel())

    @classmethod
    def join(cls, *spans: "Spans") -> "Spans":
        return cls(*(np.concatenate(columns) for columns in zip(*spans)))

    def pick(self, keep: np.ndarray) -> "Spans":
        return Spans(self.group[keep], self.start[keep], self.stop[keep])

    def merged(self) -> "Spans":
        """The same keys as ascending ranges that are not empty and neither overlap nor touch, group by group."""
        group, start, stop = self.pick(self.start < self.stop)
        if group.size == 0:
            return Spans(group, start, stop)
        low = start.min()
        width = int(stop.max() - low) + 1
        start, stop = group * width + (start - low), group * width + (stop - low)
        if np.any(start[1:] < start[:-1]):
            order = np.argsort(start, kind="stable")
            start, stop = start[order], stop[order]
        reach = np.maximum.accumulate(stop)
        opens = np.nonzero(np.append(True, start[1:] > reach[:-1]))[0]
        start, stop = start[opens], reach[np.append(opens[1:] - 1, len(start) - 1)]
        group = start // width
        return Spans(group, start - group * width + low, stop - group * width + low)


class Part(NamedTuple):
    """`stride` independent sequences c, c + stride, ..., each following `pattern` in quotient coordinates.

    `pattern` is either one pattern for all residue classes or a tuple with one for each class.
    """

    stride: int
    pattern: "Pattern | tuple[Pattern, ...]"

    def of_residue(self, residue: int) -> "Pattern":
        return self.pattern[residue] if isinstance(self.pattern, tuple) else self.pattern


class Pattern:
    """A set of allowed (query, key) pairs. Subclasses are frozen dataclasses that define :meth:`allows`.

    Patterns compose: ``a & b`` allows what both allow, ``a | b`` what either does.

    has_text: whether the repr, class name and literal arguments, holds all of the pattern.
    live: whether it reads a tensor whose contents may change between calls; `frozen` is then the pattern of this moment.
    """

    has_text = True
    live = False

    def frozen(self) -> "Pattern":
        """The same pairs, for good: what layouts and other things that are kept are made of."""
        return self

    def allows(self, i: torch.Tensor, j: torch.Tensor, lengths: Lengths) -> torch.Tensor:
        """Whether the query at position `i` sees the key at `j` (int64 tensors that broadcast); bool tensor.

        `i` lies in [offset, kv_len) and may be negative when q_len > kv_len; `j` lies in [0, kv_len).
        """
        raise NotImplementedError(f"{type(self).__name__} must define allows(i, j, lengths)")

    def check(self, q_len: int, kv_len: int, heads: int) -> None:
        """Raise ValueError if the pattern cannot apply to these sizes."""

    def for_head(self, head: int) -> "Pattern":
        """The pattern that head number `head` follows; it answers the questions below."""
        return self

    def parts(self, lengths: Lengths) -> tuple[Part, ...]:
        """Disjoint strided parts whose union is the pattern."""
        return (Part(1, self),)

    def spans(self, first: np.ndarray, last: np.ndarray, lengths: Lengths) -> Spans:
        """Key ranges that hold every key seen by the queries at positions first[g]..last[g] (inclusive) of group g."""
        return Spans.of((np.zeros_like(first), np.full_like(first, lengths.kv_len)))

    def full(self, rects: Rects, lengths: Lengths) -> np.ndarray:
        """True where every pair of the rectangle is surely allowed."""
        return np.zeros(rects.i0.shape, dtype=bool)

    def empty(self, rects: Rects, lengths: Lengths) -> np.ndarray:
        """True where surely no pair of the rectangle is allowed."""
        spans = self.spans(rects.i0, rects.i1 - 1, lengths)
        start = np.maximum(spans.start, rects.j0[spans.group])
        out = np.ones(rects.i0.shape, dtype=bool)
        out[spans.group[start < np.minimum(spans.stop, rects.j1[spans.group])]] = False
        return out

    def bits(self, rects: Rects, tile: Tile, lengths: Lengths) -> np.ndarray:
        """bool `[n, tile.q, tile.k]`: the pairs of rectangles no larger than a tile. What lies past i1 or j1 means nothing."""
        # Rows and columns past the end repeat the last one, so that a pattern is only asked about real positions.
        i = np.minimum(rects.i0[:, None] + np.arange(tile.q), rects.i1[:, None] - 1)
        j = np.minimum(rects.j0[:, None] + np.arange(tile.k), rects.j1[:, None] - 1)
        seen = self.allows(torch.from_numpy(i).unsqueeze(2), torch.from_numpy(j).unsqueeze(1), lengths)
        return seen.expand(len(i), tile.q, tile.k).numpy()

    def signature(self, rects: Rects, lengths: Lengths) -> np.ndarray:
        """int64 array; rectangles of equal size and equal signature have equal bits."""
        return np.arange(rects.i0.size, dtype=np.int64)

    def quotient(self, stride: int, residue: int, lengths: Lengths) -> "Pattern":
        """The pattern as the sequence residue, residue + stride, ... sees it, in positions of that sequence."""
        from sparse_attention.patterns.compose import Quotient

        return Quotient(self, stride, residue, lengths)

    def mask(self, q_len: int, kv_len: int, heads: int | None = None) -> torch.Tensor:
        """The bool mask, `[q_len, kv_len]`, or `[heads, q_len, kv_len]` when `heads` is given. For small sizes.

        Without `heads`, BigBird gives its head 0; a pattern with one entry for each head needs `heads`.
        """
        check_sizes(self, q_len, kv_len, 1 if heads is None else heads)
        lengths = Lengths(q_len, kv_len)
        i = torch.arange(q_len, device="cpu").unsqueeze(1) + lengths.offset
        j = torch.arange(kv_len, device="cpu").unsqueeze(0)
        if heads is None:
            return self.for_head(0).allows(i, j, lengths).expand(q_len, kv_len).contiguous()
        rows = [self.for_head(h).allows(i, j, lengths).expand(q_len, kv_len) for h in range(heads)]
        return torch.stack(rows)

    def pairs(self, q_len: int, kv_len: int, heads: int = 1) -> int:
        """The exact number of allowed (query, key) pairs, summed over `heads` heads."""
        check_sizes(self, q_len, kv_len, heads)
        counts = {}
        total = 0
        frozen = self.frozen()
        for head in range(heads):
            one = frozen.for_head(head)
            if one not in counts:
                counts[one] = one._pairs(Lengths(q_len, kv_len))
            total += counts[one]
        return total

    def _pairs(self, lengths: Lengths) -> int:
        from sparse_attention.layout import count_pairs

        return count_pairs(self, lengths)

    def sparsity(self, q_len: int, kv_len: int, heads: int = 1) -> float:
        """The share of the q_len * kv_len pairs that is not allowed: 0 for dense, close to 1 for very sparse."""
        return 1.0 - self.pairs(q_len, kv_len, heads) / (heads * q_len * kv_len)

    def __and__(self, other: "Pattern") -> "Pattern":
        from sparse_attention.patterns.compose import And

        return And(self, other) if isinstance(other, Pattern) else NotImplemented

    def __or__(self, other: "Pattern") -> "Pattern":
        from sparse_attention.patterns.compose import Or

        return Or(self, other) if isinstance(other, Pattern) else NotImplemented


def check_sizes(pattern: Pattern, q_len: int, kv_len: int, heads: int) -> None:
    """Raise ValueError for sizes that are no sizes, and for those that the pattern cannot apply to."""
    for name, value in (("q_len", q_len), ("kv_len", kv_len), ("heads", heads)):
        if not 1 <= value < 2**31:
            raise ValueError(f"{name} is {value}; expected at least 1 and less than 2**31")
    pattern.check(q_len, kv_len, heads)


def quotient_lengths(lengths: Lengths, stride: int, residue: int) -> Lengths:
    """How many queries and keys stand at positions residue, residue + stride, ..."""

    def below(position):
        return -((residue - position) // stride)

    kv_len = below(lengths.kv_len)
    return Lengths(kv_len - below(lengths.offset), kv_len)
