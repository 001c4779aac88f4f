"""Workloads whose density is given: token trees, random blocks, scattered pairs.

A tree's dense side is SDPA with its mask, boolean or additive: nothing less gives the right answer. The others race against
unmasked attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from perf.oracle import Oracle
from perf.workloads import tensors
from sparse_attention import attention, baselines
from sparse_attention._build import BuildError, kernels
from sparse_attention.breakeven import Unavailable, Workload
from sparse_attention.patterns import BlockSparse, Csr, Pattern, Tree

# The 26 positions of EAGLE's default tree (mc_sim_7b_63), 92 pairs of 676.
EAGLE = (-1, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 5, 5, 5, 6, 6, 7, 7, 8, 13, 13, 13, 21, 21)


def tree(positions: int, density: float, impl: str, heads: int, head_dim: int, dtype: str = "float32") -> Workload:
    """Every position is a node of one tree; `density` is the share of pairs that attend, as near as chains come to it."""
    is_eagle = positions == len(EAGLE) and round(density, 3) == 0.136
    q, k, v = _tensors(heads, positions, head_dim, dtype)
    pattern = Tree(EAGLE if is_eagle else chains(positions, density))
    mask = pattern.mask(positions, positions).to(q.device)
    additive = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -torch.inf)
    rivals = {f"{name}, mask": call for name, call in baselines.dense(q, k, v, causal=False, mask=mask).items()}
    rivals |= {f"{name}, additive mask": call for name, call in baselines.dense(q, k, v, causal=False, mask=additive).items()}
    return _workload(q, k, v, pattern, impl, rivals)


def blocks(density: float, impl: str, length: int, heads: int, head_dim: int, dtype: str = "float32") -> Workload:
    """Blocks of 64 x 64 at random, the same in every head."""
    side = length // 64
    chosen = np.random.default_rng(0).permutation(side * side)[: max(1, round(density * side * side))]
    mask = np.zeros(side * side, dtype=bool)
    mask[chosen] = True
    q, k, v = _tensors(heads, length, head_dim, dtype)
    pattern = BlockSparse(torch.from_numpy(mask.reshape(side, side)), 64)
    return _workload(q, k, v, pattern, impl, baselines.dense(q, k, v, causal=False))


def scattered(density: float, impl: str, length: int, heads: int, head_dim: int, dtype: str = "float32") -> Workload:
    """The same number of keys in every row, at random."""
    each = max(1, round(density * length))
    keys = np.random.default_rng(0).permuted(np.tile(np.arange(length), (length, 1)), axis=1)[:, :each]
    q, k, v = _tensors(heads, length, head_dim, dtype)
    pattern = Csr(torch.arange(0, length * each + 1, each), torch.from_numpy(keys.reshape(-1)))
    return _workload(q, k, v, pattern, impl, baselines.dense(q, k, v, causal=False))


def chains(positions: int, density: float) -> tuple[int, ...]:
    """Parents of a tree of equal chains below one root, and one chain of what is left over; numbered by depth as EAGLE's."""
    pairs = density * positions**2

    def of_length(length):
        count, rest = divmod(positions - 1, length)
        return [length] * count + [rest] * (rest > 0)

    def surplus(length):
        return abs(1 + sum(n * (n + 3) / 2 for n in of_length(length)) - pairs)

    lengths = of_length(min(range(1, positions), key=surplus))
    ends = [0] * len(lengths)
    parents = [-1]
    for depth in range(max(lengths)):
        for chain, length in enumerate(lengths):
            if depth < length:
                parents.append(ends[chain])
                ends[chain] = len(parents) - 1
    return tuple(parents)


def _tensors(heads: int, length: int, head_dim: int, dtype: str) -> tuple[torch.Tensor, ...]:
    return tensors(1, heads, heads, length, length, head_dim, dtype)[:3]


def _workload(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, impl: str, rivals: Mapping[str, Callable]
) -> Workload:
    try:
        kernels()
    except BuildError as error:
        raise Unavailable(str(error)) from error
    density = 1 - pattern.sparsity(q.shape[2], k.shape[2])
    return Workload(
        candidate=lambda: attention(q, k, v, pattern, impl=impl),
        baselines=rivals,
        check=Oracle(q, k, v, pattern).check,
        inputs=(q, k, v),
        note=f"density {density:.1%}",
    )
