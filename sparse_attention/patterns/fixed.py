"""Patterns in which some positions serve all: Sparse Transformer's summaries and Longformer's global tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparse_attention.patterns.alias import Alias
from sparse_attention.patterns.base import Pattern, Spans
from sparse_attention.patterns.compose import Or
from sparse_attention.patterns.dilated import Steps
from sparse_attention.patterns.validate import integer, set_field
from sparse_attention.patterns.window import Band


@dataclass(frozen=True)
class Global(Pattern):
    """The first `n` positions see all keys and are seen by all queries."""

    n: int

    def allows(self, i, j, lengths):
        return ((i >= 0) & (i < self.n)) | (j < self.n)

    def spans(self, first, last, lengths):
        sees_all = (first < self.n) & (last >= 0)
        return Spans.of((np.zeros_like(first), np.where(sees_all, lengths.kv_len, self.n)))

    def full(self, rects, lengths):
        return (rects.j1 <= self.n) | ((rects.i0 >= 0) & (rects.i1 <= self.n))

    def empty(self, rects, lengths):
        return (rects.j0 >= self.n) & ((rects.i0 >= self.n) | (rects.i1 <= 0))

    def signature(self, rects, lengths):
        rows = np.clip(rects.i0, -(rects.i1 - rects.i0), self.n)
        return rows * (self.n + 2) + np.minimum(rects.j0, self.n)

    def quotient(self, stride, residue, lengths):
        return Global(max(-((residue - self.n) // stride), 0))


@dataclass(frozen=True)
class Longformer(Alias):
    """A window of `window` keys on each side in steps of `dilation`, and global tokens (Longformer, Beltagy et al. 2020).

    i - j = k * dilation with abs(k) <= window; the first `global_tokens` positions see and are seen by all. Not causal.
    """

    window: int
    global_tokens: int
    dilation: int = 1

    def __post_init__(self):
        set_field(self, "window", integer("window", self.window, 1))
        set_field(self, "global_tokens", integer("global_tokens", self.global_tokens, 0))
        set_field(self, "dilation", integer("dilation", self.dilation, 1))

    def meaning(self):
        low, high = -self.window, self.window + 1
        near = Band(low, high) if self.dilation == 1 else Steps(self.dilation, low, high)
        return Or(near, Global(self.global_tokens)) if self.global_tokens else near


@dataclass(frozen=True)
class Fixed(Pattern):
    """The keys of the query's own block, and the last `summary` keys of every block; causal.

    j <= i and (i // block == j // block or j % block >= block - summary): Sparse Transformer's fixed attention, both of its
    heads in one (Child et al. 2019, section 4.2).
    """

    block: int
    summary: int

    def __post_init__(self):
        set_field(self, "block", integer("block", self.block, 1))
        set_field(self, "summary", integer("summary", self.summary, 1))
        if self.summary > self.block:
            raise ValueError(f"summary is {self.summary}; expected at most block, {self.block}")

    def allows(self, i, j, lengths):
        return (j <= i) & ((i // self.block == j // self.block) | (j % self.block >= self.block - self.summary))

    def spans(self, first, last, lengths):
        own = np.maximum(first, 0) // self.block
        counts = own + 1
        if first.size == 0 or self.block <= self.summary + 1:
            return Spans.of((np.zeros_like(first), last + 1))
        group = np.repeat(np.arange(first.size), counts)
        at = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        mine = at == own[group]
        start = at * self.block + np.where(mine, 0, self.block - self.summary)
        return Spans(group, start, np.where(mine, last[group] + 1, (at + 1) * self.block))

    def full(self, rects, lengths):
        one_block = rects.i0 // self.block == (rects.i1 - 1) // self.block
        own = one_block & (rects.j0 // self.block == rects.i0 // self.block)
        whole = self.summary == self.block
        first_row_past = rects.j0 % self.block >= self.block - self.summary
        summaries = first_row_past & (rects.j0 // self.block == (rects.j1 - 1) // self.block)
        return (rects.j1 - 1 <= rects.i0) & (own | summaries | whole)

    def empty(self, rects, lengths):
        one_block = rects.j0 // self.block == (rects.j1 - 1) // self.block
        before = (rects.j1 - 1) % self.block < self.block - self.summary
        elsewhere = (rects.j1 - 1) // self.block < rects.i0 // self.block
        return (rects.j0 > rects.i1 - 1) | (one_block & before & elsewhere)

    def signature(self, rects, lengths):
        # Beyond the tile's own blocks only the keys' place in their block counts; near them, the place of both does.
        near = rects.j1 - 1 >= rects.i0 // self.block * self.block
        place, distance = rects.j0 % self.block, rects.i0 - rects.j0
        return np.where(near, (distance - distance.min(initial=0)) * min(self.block, lengths.kv_len) + place, -1 - place)

    def _pairs(self, lengths):
        i = np.arange(max(lengths.offset, 0), lengths.kv_len)
        return int((i % self.block + 1 + i // self.block * self.summary).sum())
