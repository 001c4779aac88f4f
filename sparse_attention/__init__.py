"""Exact sparse attention, and a harness that says from which size on it is faster than dense."""

from sparse_attention._build import BuildError
from sparse_attention.api import attention, explain, plan
from sparse_attention.longnet import longnet
from sparse_attention.patterns import (
    BigBird,
    BlockSparse,
    Causal,
    Csr,
    Dense,
    Dilated,
    Documents,
    Fixed,
    LogSparse,
    Longformer,
    MultiScale,
    Pattern,
    Predicate,
    Sinks,
    SlidingWindow,
    Strided,
    Tree,
)
from sparse_attention.reference import merge

__all__ = [
    "BigBird",
    "BlockSparse",
    "BuildError",
    "Causal",
    "Csr",
    "Dense",
    "Dilated",
    "Documents",
    "Fixed",
    "LogSparse",
    "Longformer",
    "MultiScale",
    "Pattern",
    "Predicate",
    "Sinks",
    "SlidingWindow",
    "Strided",
    "Tree",
    "attention",
    "explain",
    "longnet",
    "merge",
    "plan",
]
