"""Row lists as the CUDA gather engine reads them: long rows cut into pieces, on the device. csrc/cuda/gather/gather.h says what they mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from sparse_attention.cost import count
from sparse_attention.patterns.base import Pattern
from sparse_attention.rows import Rows

if TYPE_CHECKING:
    from sparse_attention.dispatch import Sizes

PAIRS = 1 << 27  # in the lists of all distinct heads: 512 MiB on the device
SHORTEST = 256  # keys of a piece: joining costs about what so many keys do
WARPS = 16  # that a multiprocessor holds
SHARES = 4  # a row longer than so small a part of one warp's share of all pairs is cut, or it would outlast the others


class Tables(NamedTuple):
    """row_start, columns, head_variant: as in Rows. The four last are struct Piece, struct Split and two fields of struct Forward."""

    row_start: torch.Tensor
    columns: torch.Tensor
    head_variant: torch.Tensor
    pieces: torch.Tensor
    splits: torch.Tensor
    longest: int
    together: int


def obstacle(pattern: Pattern, q_len: int, kv_len: int, heads: int) -> str | None:
    """Why the gather engine on CUDA cannot run a pattern at these sizes, or None."""
    variants = {pattern.for_head(head) for head in range(heads)}
    pairs = sum(count(variant, q_len, kv_len, 1)[0] for variant in variants)
    if pairs > PAIRS:
        return f"its lists hold {pairs:,} keys and the gather engine on CUDA takes up to {PAIRS:,} (2^{PAIRS.bit_length() - 1})"
    return None


def tables(rows: Rows, sizes: Sizes, device: torch.device, processors: int) -> Tables:
    """The tables of a device with so many multiprocessors, for a call of these sizes."""
    head_variant = rows.head_variant.numpy()
    together = heads_together(head_variant, sizes.kv_heads) if sizes.dtype.itemsize < 8 else 1
    counts = np.diff(rows.row_start.numpy()).reshape(-1, rows.q_len)
    firsts = head_variant[::together]
    share = sizes.batch * int(counts.sum(axis=1)[firsts].sum()) // (processors * WARPS * SHARES)
    longest = max(SHORTEST, share)
    pieces, splits = cut(counts, firsts, together, longest)

    def moved(x):
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int32)).to(device)

    return Tables(
        rows.row_start.to(device), rows.columns.to(device), rows.head_variant.to(device), moved(pieces), moved(splits), longest, together
    )


def heads_together(head_variant: np.ndarray, kv_heads: int) -> int:
    """How many neighbouring heads one warp can take: they share their keys, their values and their lists."""
    group = len(head_variant) // kv_heads
    for together in (4, 2):
        if group % together == 0 and (head_variant.reshape(-1, together) == head_variant[::together, None]).all():
            return together
    return 1


def cut(counts: np.ndarray, firsts: np.ndarray, together: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces `[n, 4]` and splits `[m, 4]` of the rows with more than `longest` keys, for every `together` heads.

    counts: keys of each row, `[variants, q_len]`. firsts: the variant of each `together` heads.
    """
    variant, row = np.nonzero(counts > longest)
    long = counts[variant, row]
    parts = -(-long // longest)
    pieces, splits, total = [np.zeros((0, 4), np.int64)], [np.zeros((0, 4), np.int64)], 0
    for number, head_variant in enumerate(firsts):
        here = variant == head_variant
        n, keys, head = parts[here], long[here], np.full(here.sum(), number * together)
        before = np.cumsum(n) - n
        splits.append(np.stack([head, row[here], total + before, n], axis=1))
        at = np.repeat(np.arange(len(n)), n)
        which = np.arange(n.sum()) - before[at]
        start, stop = keys[at] * which // n[at], keys[at] * (which + 1) // n[at]
        pieces.append(np.stack([head[at], row[here][at], start, stop - start], axis=1))
        total += int(n.sum())
    return np.concatenate(pieces), np.concatenate(splits)
