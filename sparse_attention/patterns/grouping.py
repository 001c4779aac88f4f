"""The parts of a union, with fewer and longer sequences than it asks for by itself."""

from __future__ import annotations

from functools import reduce
from math import gcd
from operator import or_

from sparse_attention.patterns.alias import Alias
from sparse_attention.patterns.base import Lengths, Part, Pattern
from sparse_attention.patterns.compose import Minus, Or

ALL = 0


def grouped_parts(pattern: Pattern, lengths: Lengths, together: int) -> tuple[Part, ...]:
    """Disjoint strided parts whose union is the pattern of a single head.

    together: how many neighbouring members of a union share a part, whose stride then divides theirs: less parts to merge, for tiles in
    which some keys are seen by nobody. 1 for the pattern's own parts; ALL for one part of stride 1.
    """
    if together == ALL:
        return (Part(1, pattern),)
    members = _members(pattern)
    own = [member.parts(lengths) for member in members]
    if together == 1 or len(members) == 1 or any(len(parts) > 1 for parts in own):
        return pattern.parts(lengths)
    found, before = [], None
    for at in range(0, len(members), together):
        group = reduce(or_, members[at : at + together])
        rest = group if before is None else Minus(group, before)
        found.append(_strided(rest, reduce(gcd, [parts[0].stride for parts in own[at : at + together]]), lengths))
        before = group if before is None else before | group
    return tuple(found)


def _members(pattern: Pattern) -> list[Pattern]:
    if isinstance(pattern, Alias):
        return _members(pattern.meaning())
    return _members(pattern.a) + _members(pattern.b) if isinstance(pattern, Or) else [pattern]


def _strided(pattern: Pattern, stride: int, lengths: Lengths) -> Part:
    """A pattern all of whose pairs have positions that are equal modulo `stride`."""
    if stride == 1:
        return Part(1, pattern)
    seen = [pattern.quotient(stride, residue, lengths) for residue in range(stride)]
    return Part(stride, seen[0] if all(one == seen[0] for one in seen) else tuple(seen))
