"""The table of pattern cases that all correctness tests share: every pattern, at awkward sizes of at most 300 tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from sparse_attention.patterns import (
    BigBird,
    BlockSparse,
    Causal,
    Csr,
    Dense,
    Dilated,
    Documents,
    Fixed,
    LiveBlocks,
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


class Case(NamedTuple):
    id: str
    make: Callable[[], Pattern]
    q_len: int
    kv_len: int
    heads: int = 1


TREE = (-1, 0, 0, 0, 1, 1, 2, 4, 4, 7, 6, -1, 11)


def block_mask(*shape: int, density: float = 0.3, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def csr(q_len: int, kv_len: int, density: float = 0.05, seed: int = 0) -> Csr:
    """Random pairs; unsorted, every third one twice, and the rows 1, 8, 15, ... empty."""
    mask = block_mask(q_len, kv_len, density=density, seed=seed)
    mask[1::7] = False
    rows = [row.nonzero().flatten().flip(0) for row in mask]
    rows = [torch.cat([row, row[::3]]) for row in rows]
    counts = torch.tensor([0] + [row.numel() for row in rows])
    return Csr(counts.cumsum(0), torch.cat(rows).to(torch.int32))


CASES = [
    Case("dense", lambda: Dense(), 100, 130, 2),
    Case("dense-long-queries", lambda: Dense(), 130, 67),
    Case("causal", lambda: Causal(), 200, 200, 2),
    Case("causal-cached", lambda: Causal(), 70, 211),
    Case("causal-empty-rows", lambda: Causal(), 150, 90),
    Case("window", lambda: SlidingWindow(70), 300, 300, 2),
    Case("window-narrow", lambda: SlidingWindow(1), 129, 129),
    Case("window-wider-than-all", lambda: SlidingWindow(1000), 65, 80),
    Case("window-cached", lambda: SlidingWindow(64), 63, 257),
    Case("window-empty-rows", lambda: SlidingWindow(10), 200, 100),
    Case("window-decode", lambda: SlidingWindow(64), 1, 300, 2),
    Case("window-both-sides", lambda: SlidingWindow(33, causal=False), 200, 177),
    Case("one-token", lambda: SlidingWindow(4), 1, 1),
    Case("dilated", lambda: Dilated(40, 4), 300, 300, 2),
    Case("dilated-plain", lambda: Dilated(4, 2), 130, 130),
    Case("dilated-far", lambda: Dilated(5, 70), 190, 260),
    Case("dilated-both-sides", lambda: Dilated(30, 3, causal=False), 250, 299),
    Case("dilated-per-head", lambda: Dilated(36, (1, 2, 5, 2)), 290, 290, 4),
    Case("dilated-cached", lambda: Dilated(50, 3), 5, 280),
    Case("dilated-empty-rows", lambda: Dilated(40, 4), 290, 250),
    Case("multiscale", lambda: MultiScale(16), 300, 300),
    Case("multiscale-cached", lambda: MultiScale(24, (1, 3)), 100, 290, 2),
    Case("multiscale-both-sides", lambda: MultiScale(20, (2, 3), causal=False), 200, 200),
    Case("strided", lambda: Strided(17), 300, 300),
    Case("strided-wide", lambda: Strided(100), 150, 290),
    Case("fixed", lambda: Fixed(32, 4), 300, 300),
    Case("fixed-wide", lambda: Fixed(90, 20), 200, 280),
    Case("fixed-whole", lambda: Fixed(5, 5), 100, 100),
    Case("fixed-empty-rows", lambda: Fixed(3, 1), 100, 60),
    Case("logsparse", lambda: LogSparse(), 300, 300, 2),
    Case("logsparse-window", lambda: LogSparse(11), 90, 260),
    Case("block-sparse", lambda: BlockSparse(block_mask(5, 5), 64), 300, 300, 2),
    Case("block-sparse-16", lambda: BlockSparse(block_mask(13, 17), 16), 200, 260),
    Case("block-sparse-per-head", lambda: BlockSparse(block_mask(3, 7, 9), 32), 200, 260, 3),
    Case("block-sparse-128", lambda: BlockSparse(torch.tensor([[True, False, True], [False, True, False]]), 128), 140, 300),
    Case("live-blocks", lambda: LiveBlocks(block_mask(5, 5), 64), 300, 300, 2),
    Case("live-blocks-causal", lambda: LiveBlocks(block_mask(2, 2, 3), 128) & Causal(), 140, 300, 2),
    Case("bigbird", lambda: BigBird(16, random=2), 300, 300, 3),
    Case("bigbird-64", lambda: BigBird(), 290, 300, 2),
    Case("bigbird-few-blocks", lambda: BigBird(128, globals=0), 300, 300),
    Case("bigbird-cached", lambda: BigBird(32, window=1, globals=1, random=1, seed=7), 77, 300, 2),
    Case("longformer", lambda: Longformer(25, 2), 290, 290, 2),
    Case("longformer-dilated", lambda: Longformer(30, 3, dilation=3), 250, 300),
    Case("longformer-no-global", lambda: Longformer(25, 0), 130, 90),
    Case("sinks", lambda: Sinks(70), 100, 150),
    Case("documents", lambda: Documents((1, 99, 64, 36, 100)), 300, 300),
    Case("documents-cached", lambda: Documents((40, 130, 3, 90)), 100, 263, 2),
    Case("csr", lambda: csr(280, 300), 280, 300, 2),
    Case("csr-dense-rows", lambda: csr(40, 100, density=0.9), 40, 100),
    Case("csr-narrow", lambda: Csr(torch.tensor([0, 2, 2, 3]), torch.tensor([2, 0, 1])), 3, 50),
    Case("csr-empty", lambda: Csr(torch.zeros(71, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)), 70, 80),
    Case("tree", lambda: Tree(TREE), len(TREE), 300, 2),
    Case("tree-alone", lambda: Tree(TREE), len(TREE), len(TREE)),
    Case("tree-after-queries", lambda: Tree(TREE), 200, 290),
    Case("predicate", lambda: Predicate(lambda i, j: (i * j) % 7 == 1), 200, 220),
    Case("predicate-nothing", lambda: Predicate(lambda i, j: i < j - 1000), 100, 100),
    Case("sinks-window", lambda: (SlidingWindow(64, causal=False) | Sinks(4)) & Causal(), 290, 290, 2),
    Case("documents-causal", lambda: Documents((120, 60, 120)) & Causal(), 300, 300),
    Case("dilated-or-sinks", lambda: Dilated(40, 4) | Sinks(3), 290, 290),
    Case("two-dilations", lambda: Dilated(40, 4) | Dilated(30, 6), 290, 300),
    Case("dilations-meet", lambda: Dilated(40, 4) & Dilated(50, 6), 300, 300),
    Case("per-head-or-shared", lambda: (Dilated(36, (3, 1)) | Sinks(5)) & Causal(), 200, 280, 2),
    Case("nested", lambda: ((Strided(20) & SlidingWindow(150)) | LogSparse(4)) & Documents((140, 160)), 300, 300),
    Case("csr-and-causal", lambda: csr(150, 150, density=0.2) & Causal(), 150, 150),
]
