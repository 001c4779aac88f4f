"""The checks of `decode`, each a ValueError that names the argument, its value and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attention.eagle.checks import FLOATS, INT64, at, check_integer, check_tensor, first
from sparse_attention.eagle.mask import tree_mask

PAGES = (16, 32, 64, 128, 256)
MOST_NODES = 1024


def check_sizes(q: object, k_cache: object, v_cache: object, block_table: object) -> int:
    """That q and the caches fit each other; returns the rows that a request may have."""
    check_tensor("q", q, (None,) * 4, FLOATS)
    batch, heads, _, dim = q.shape
    paged = block_table is not None
    check_tensor("k_cache", k_cache, (None if paged else batch, None, None, dim), (q.dtype,), q, "q")
    check_tensor("v_cache", v_cache, k_cache.shape, (q.dtype,), q, "q")
    if heads % k_cache.shape[1]:
        raise ValueError(f"k_cache has shape {tuple(k_cache.shape)}, {k_cache.shape[1]} heads; expected a divisor of q's {heads} heads")
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if x.stride(3) != 1 and dim > 1:
            raise ValueError(f"{name} has strides {x.stride()}; expected a contiguous last dimension: call .contiguous()")
    rows = k_cache.shape[2]
    if not paged:
        return rows
    if rows not in PAGES:
        raise ValueError(f"k_cache has shape {tuple(k_cache.shape)}, pages of {rows} rows; expected one of {', '.join(map(str, PAGES))}")
    check_tensor("block_table", block_table, (batch, None), (torch.int32, torch.int64), q, "q")
    return rows * block_table.shape[1]


def refuse_gradients(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """That nothing here needs a gradient."""
    if torch.is_grad_enabled():
        for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
            if x.requires_grad:
                raise ValueError(
                    f"{name} requires a gradient; expected none, as in torch.no_grad(): attention() has gradients, decode() has none"
                )


def check_lengths(lengths: Tensor | int, q: Tensor, capacity: int) -> Tensor:
    """lengths as `[batch]` int64 on q's device, from 0 to capacity."""
    batch = q.shape[0]
    if not isinstance(lengths, Tensor):
        return torch.full((batch,), check_integer("lengths", lengths, 0, capacity), dtype=torch.int64, device=q.device)
    check_tensor("lengths", lengths, (batch,), INT64, q, "q")
    if lengths.device.type == "cpu":
        for b, length in enumerate(lengths.tolist()):
            if not 0 <= length <= capacity:
                raise ValueError(f"lengths[{b}] is {length}; expected 0 to {capacity}, the rows that its cache has")
    return lengths.contiguous()


def check_block_table(block_table: Tensor, lengths: Tensor, k_cache: Tensor) -> Tensor:
    """block_table as contiguous int32; on the CPU, that the pages in use are there."""
    pages, _, page, _ = k_cache.shape
    if block_table.device.type == "cpu":
        used = torch.arange(block_table.shape[1], device="cpu") * page < lengths[:, None]
        found = first(used & ((block_table < 0) | (block_table >= pages)))
        if found is not None:
            raise ValueError(f"{at('block_table', found)} is {int(block_table[found])}; expected a page from 0 to {pages - 1}")
    return block_table.to(torch.int32).contiguous()


def check_tree(parents: Tensor | None, ancestors: Tensor | None, q: Tensor) -> Tensor | None:
    """The tree as ancestor words, int64 `[batch or 1, q_len, ceil(q_len / 64)]`; None for no tree."""
    if parents is None and ancestors is None:
        return None
    batch, _, nodes, _ = q.shape
    if parents is not None and ancestors is not None:
        raise ValueError("parents and ancestors are both given; expected one of them")
    if nodes > MOST_NODES:
        raise ValueError(f"q has shape {tuple(q.shape)}, {nodes} nodes; expected a tree of at most {MOST_NODES}")
    if ancestors is not None:
        words = (nodes + 63) // 64
        alike = isinstance(ancestors, Tensor) and ancestors.dim() == 3 and ancestors.shape[0] == 1
        return check_tensor("ancestors", ancestors, (1 if alike else batch, nodes, words), INT64, q, "q").contiguous()
    if isinstance(parents, Tensor) and parents.dim() == 1:
        check_tensor("parents", parents, (nodes,), INT64, q, "q")
        parents = parents[None]
    else:
        check_tensor("parents", parents, (batch, nodes), INT64, q, "q")
    return ancestors_of(parents)


def ancestors_of(parents: Tensor) -> Tensor:
    """The ancestor words of parents `[batch, nodes]`, rows of zeros for parents of -2. Checked on the CPU."""
    if parents.device.type == "cpu":
        if int(parents.min()) >= -1:
            return tree_mask(parents, "bits")
        _refuse_absent(parents)
    words = tree_mask(parents.clamp(min=-1), "bits")
    return torch.where((parents < -1)[:, :, None], 0, words)


def _refuse_absent(parents: Tensor) -> None:
    """ValueError for a parent below -2, and for one that is no node itself."""
    absent = parents == -2
    orphan = (parents >= 0) & absent.gather(1, parents.clamp(0, parents.shape[1] - 1))
    found = first((parents < -2) | orphan)
    if found is not None:
        wanted = "a node that is there" if parents[found] >= 0 else "a node, -1 for a root or -2 for no node"
        raise ValueError(f"{at('parents', found)} is {int(parents[found])}; expected {wanted}")
