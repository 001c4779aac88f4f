"""Patterns as text: `parse` makes a pattern from its repr, in another process too."""

from __future__ import annotations

import ast
from functools import cache

from sparse_attention.patterns.base import Pattern
from sparse_attention.patterns.compose import And, Or


@cache
def kinds() -> dict[str, type[Pattern]]:
    """The public patterns whose repr holds all of them, by name."""
    from sparse_attention import patterns

    public = [getattr(patterns, name) for name in patterns.__all__]
    found = [kind for kind in public if isinstance(kind, type) and issubclass(kind, Pattern) and kind is not Pattern]
    return {kind.__name__: kind for kind in found if kind.has_text}


def text(pattern: Pattern) -> str:
    """The repr of a pattern, when `parse` can read it; ValueError for patterns that carry a tensor or a function."""
    leaves = [pattern]
    while leaves:
        one = leaves.pop()
        if type(one) in (And, Or):
            leaves += [one.a, one.b]
        elif kinds().get(type(one).__name__) is not type(one):
            raise ValueError(f"pattern holds {one!r}, which has no text form; expected {', '.join(sorted(kinds()))}, & and |")
    return repr(pattern)


def parse(source: str) -> Pattern:
    """The pattern that `source`, the repr of one, describes, such as ``(SlidingWindow(window=64) | Sinks(4)) & Causal()``.

    Only pattern names with literal arguments, & and | are read; nothing is evaluated. ValueError for anything else.
    """
    try:
        tree = ast.parse(source, mode="eval").body
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"text is {source!r}; expected the repr of a pattern ({error})") from None
    return _pattern(tree, source)


def _pattern(node: ast.expr, source: str) -> Pattern:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitAnd, ast.BitOr)):
        kind = And if isinstance(node.op, ast.BitAnd) else Or
        return kind(_pattern(node.left, source), _pattern(node.right, source))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds():
        try:
            args = [ast.literal_eval(arg) for arg in node.args]
            named = {word.arg: ast.literal_eval(word.value) for word in node.keywords}
            return kinds()[node.func.id](*args, **named)
        except TypeError as error:
            raise ValueError(f"text is {source!r}; {error}") from None
    raise ValueError(f"text is {source!r}; expected {', '.join(sorted(kinds()))} with literal arguments, joined by & and |")
