"""Patterns as the text that the registered op carries."""

from __future__ import annotations

import ast
import operator
from functools import lru_cache
from uuid import uuid4

from sparse_attention.patterns.base import Pattern
from sparse_attention.patterns.compose import And, Or
from sparse_attention.patterns.digest import Digested
from sparse_attention.patterns.text import kinds, parse, text

_registered: dict[str, Pattern] = {}
_names: dict[Pattern, str] = {}
# Patterns whose fields are numbers, booleans and tuples of them.
_PLAIN = frozenset(kind for kind in kinds().values() if not issubclass(kind, Digested))


def constant_when_traced(function):
    """torch.compiler.assume_constant_result, without importing the compiler, which takes a second."""
    function._dynamo_marked_constant = True
    return function


def handle(pattern: Pattern) -> str:
    """The text that stands for `pattern` in the registered op.

    That is the pattern's own text where it has one: an exported program holds it and runs anywhere. A pattern that carries a
    tensor or a function is registered in this process under a name, for tensors a digest of their content; a program exported
    with it runs elsewhere once ``handle`` was called there with an equal pattern.

    Compilers trace this function: it takes patterns apart with what they understand, so that a pattern may be made inside a
    compiled function.
    """
    if type(pattern) is And or type(pattern) is Or:
        sign = " & " if type(pattern) is And else " | "
        return "(" + handle(pattern.a) + sign + handle(pattern.b) + ")"
    if type(pattern) in _PLAIN:
        return type(pattern).__name__ + _literal(tuple([getattr(pattern, name) for name in type(pattern).__match_args__]))
    return _leaf(pattern)


def _literal(value) -> str:
    if isinstance(value, tuple):
        out = "("
        for item in value:
            out = out + _literal(item) + ","
        return out + ")"
    if isinstance(value, bool):
        return "True" if value else "False"
    return repr(operator.index(value))  # index() makes a constant of a number that the compiler holds as a symbol


@constant_when_traced
def _leaf(pattern: Pattern) -> str:
    try:
        return text(pattern)
    except ValueError:
        pass
    if pattern not in _names:
        token = pattern._digest.hex() if isinstance(pattern, Digested) else uuid4().hex
        name = f"registered[{type(pattern).__name__ + ' ' + token!r}]"
        _names[pattern] = name
        _registered[name] = pattern
    return _names[pattern]


@lru_cache(maxsize=512)
def pattern_of(handle: str) -> Pattern:
    """The pattern that `handle` stands for; ValueError when it was registered in another process only."""
    return _resolve(ast.parse(handle, mode="eval").body)


def _resolve(node: ast.expr) -> Pattern:
    if isinstance(node, ast.BinOp):
        a, b = _resolve(node.left), _resolve(node.right)
        return And(a, b) if isinstance(node.op, ast.BitAnd) else Or(a, b)
    source = ast.unparse(node)
    if not source.startswith("registered["):
        return parse(source)
    if source not in _registered:
        raise ValueError(
            f"pattern is {source}, which carries a tensor or a function and is unknown to this process; make an equal pattern "
            "here and call sparse_attention.handle.handle(pattern) before the program runs"
        )
    return _registered[source]
