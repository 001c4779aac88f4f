"""Attention patterns: which (query, key) pairs attend. See docs/patterns.md."""

from sparse_attention.patterns.base import Lengths, Part, Pattern, Rects, Spans
from sparse_attention.patterns.blocks import BlockSparse
from sparse_attention.patterns.predicate import Predicate
from sparse_attention.patterns.window import Causal, Dense, Sinks, SlidingWindow

__all__ = [
    "BlockSparse",
    "Causal",
    "Dense",
    "Lengths",
    "Part",
    "Pattern",
    "Predicate",
    "Rects",
    "Sinks",
    "SlidingWindow",
    "Spans",
]
