"""Which calls of `attention` the decode engine runs: few queries at the end of many keys, under a pattern it can be told."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_attention.patterns.base import Lengths, Pattern
from sparse_attention.patterns.compose import And, Or
from sparse_attention.patterns.tree import Tree
from sparse_attention.patterns.window import Causal, Sinks, SlidingWindow

MOST_NODES = 1024
# Measured on Zen 4 against the tile and gather engines: from 8 times as many keys as queries, packed heads are worth more than what a tile
# skips. Under a window, where few keys are left, a plan for every length of a growing cache is what the engine saves.
FEWER, FEW = 8, 16
MOST_QUERIES, LARGE_TREE = 64, 256  # on CUDA


class Terms(NamedTuple):
    """A pattern as the decode engine takes it: ancestor words `[1, nodes, words]` or None, window or -1, sinks, and whether a query
    sees no sink after its own position."""

    ancestors: Tensor | None
    window: int
    sinks: int
    causal: bool


@lru_cache(maxsize=64)
def terms(pattern: Pattern) -> Terms | None:
    """`pattern` in these terms, or None."""
    if isinstance(pattern, Tree):
        return Terms(_words(pattern), -1, 0, True) if len(pattern.parents) <= MOST_NODES else None
    if isinstance(pattern, And):
        for causal, other in ((pattern.a, pattern.b), (pattern.b, pattern.a)):
            if isinstance(causal, Causal):
                found = terms(other) if isinstance(other, (Causal, SlidingWindow, Or)) else None
                return found and found._replace(causal=True)
        return None
    if isinstance(pattern, Or):
        for window, sinks in ((pattern.a, pattern.b), (pattern.b, pattern.a)):
            if _is_window(window) and isinstance(sinks, Sinks):
                return Terms(None, window.window, sinks.n, False)
        return None
    if isinstance(pattern, Causal):
        return Terms(None, -1, 0, True)
    return Terms(None, pattern.window, 0, True) if _is_window(pattern) else None


def suits(pattern: Pattern, q_len: int, kv_len: int, dtype: torch.dtype) -> str | None:
    """Why the decode engine runs a pattern at these lengths on the CPU, or None if it does not."""
    if isinstance(pattern, Tree):
        whole = len(pattern.parents) == q_len <= kv_len
        if not whole or not (q_len * FEWER <= kv_len or (q_len >= 16 and dtype == torch.bfloat16 and _pairs())) or not terms(pattern):
            return None
        return f"a tree of {q_len} nodes at the end of {kv_len:,} keys"
    if q_len * FEWER > kv_len:
        return None
    found = terms(pattern)
    if found is None or not (found.causal or found.sinks <= kv_len - q_len + 1) or (found.window > 0 and q_len > FEW):
        return None
    return f"{q_len} quer{'y' if q_len == 1 else 'ies'} at the end of {kv_len:,} keys"


def suits_cuda(pattern: Pattern, q_len: int, kv_len: int) -> str | None:
    """The same on a CUDA device, where few queries leave the tile engine without blocks enough to fill it: up to 64 queries, and whole
    trees, but large ones not everywhere: see `is_large_tree`."""
    if isinstance(pattern, Tree):
        fits = len(pattern.parents) == q_len <= kv_len
        return f"a tree of {q_len} nodes at the end of {kv_len:,} keys" if fits and terms(pattern) else None
    if q_len > MOST_QUERIES or q_len * FEWER > kv_len:
        return None
    found = terms(pattern)
    if found is None or not (found.causal or found.sinks <= kv_len - q_len + 1):
        return None
    return f"{q_len} quer{'y' if q_len == 1 else 'ies'} at the end of {kv_len:,} keys"


def is_large_tree(pattern: Pattern, q_len: int, kv_len: int) -> bool:
    """Whether it is a tree that the engine should have on CUDA only where warpgroups multiply. There it takes up to 11 % longer than
    the tile engine, whose plan of a new tree costs 10 to 40 ms (docs/decode.md); in float32 the gather engine was 2 to 8 times as
    fast."""
    return isinstance(pattern, Tree) and q_len > LARGE_TREE and q_len * FEWER > kv_len


@cache
def _pairs() -> bool:
    """Whether the engine multiplies bfloat16 in pairs here: then it is the faster one without a prefix too."""
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()) and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _is_window(pattern: Pattern) -> bool:
    return isinstance(pattern, SlidingWindow) and pattern.causal


def _words(tree: Tree) -> Tensor:
    nodes = len(tree.parents)
    sees = torch.zeros(nodes, (nodes + 63) // 64 * 64, dtype=torch.int64, device="cpu")
    index = torch.arange(max(nodes, 64), device="cpu")
    sees[:, :nodes] = tree.allows(index[:nodes, None], index[:nodes], Lengths(nodes, nodes))
    return (sees.unflatten(1, (-1, 64)) << index[:64]).sum(-1)[None]
