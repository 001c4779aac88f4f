"""Patterns that are defined by others, and take their structure from them."""

from __future__ import annotations

from sparse_attention.patterns.base import Pattern


class Alias(Pattern):
    """A pattern that `meaning()` writes in terms of other patterns."""

    def meaning(self) -> Pattern:
        raise NotImplementedError(f"{type(self).__name__} must define meaning()")

    def allows(self, i, j, lengths):
        return self.meaning().allows(i, j, lengths)

    def parts(self, lengths):
        return self.meaning().parts(lengths)

    def spans(self, first, last, lengths):
        return self.meaning().spans(first, last, lengths)

    def full(self, rects, lengths):
        return self.meaning().full(rects, lengths)

    def empty(self, rects, lengths):
        return self.meaning().empty(rects, lengths)

    def signature(self, rects, lengths):
        return self.meaning().signature(rects, lengths)

    def bits(self, rects, tile, lengths):
        return self.meaning().bits(rects, tile, lengths)

    def quotient(self, stride, residue, lengths):
        return self.meaning().quotient(stride, residue, lengths)
