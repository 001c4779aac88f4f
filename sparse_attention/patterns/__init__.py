"""Attention patterns: which (query, key) pairs attend. See docs/patterns.md."""

from sparse_attention.patterns.base import Lengths, Part, Pattern, Rects, Spans
from sparse_attention.patterns.bigbird import BigBird
from sparse_attention.patterns.blocks import BlockSparse
from sparse_attention.patterns.csr import Csr
from sparse_attention.patterns.dilated import Dilated, LogSparse, MultiScale, Strided
from sparse_attention.patterns.documents import Documents
from sparse_attention.patterns.fixed import Fixed, Longformer
from sparse_attention.patterns.live import LiveBlocks
from sparse_attention.patterns.predicate import Predicate
from sparse_attention.patterns.text import parse, text
from sparse_attention.patterns.tree import Tree
from sparse_attention.patterns.window import Causal, Dense, Sinks, SlidingWindow

__all__ = [
    "BigBird",
    "BlockSparse",
    "Causal",
    "Csr",
    "Dense",
    "Dilated",
    "Documents",
    "Fixed",
    "Lengths",
    "LiveBlocks",
    "LogSparse",
    "Longformer",
    "MultiScale",
    "Part",
    "Pattern",
    "Predicate",
    "Rects",
    "Sinks",
    "SlidingWindow",
    "Spans",
    "Strided",
    "Tree",
    "parse",
    "text",
]
