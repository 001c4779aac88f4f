"""Rows into a preallocated cache, and out of it."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attention.eagle.checks import FLOATS, INT64, at, check_integer, check_tensor, first, short, wants_check
from sparse_attention.eagle.native import engine


def append(
    k_cache: Tensor,
    v_cache: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    lengths: Tensor | int,
    *,
    impl: str = "auto",
    check: bool | None = None,
) -> Tensor:
    """Writes new rows after the rows that the cache holds, in place, and returns the new lengths, [B] int64.

    k_cache, v_cache: [B, H, S, D], any strides with D contiguous; k_new, v_new: [B, H, n, D] of the same dtype; lengths: [B] int64, rows
    in use, or one number for all. If lengths + n is more than S anywhere, or a length is negative, ValueError, and nothing is written;
    with check=False (the default on CUDA) such a request is left as it is and keeps its length.
    """
    _check_pair("cache", k_cache, v_cache)
    batch, heads, rows, dim = k_cache.shape
    for name, x in (("k_new", k_new), ("v_new", v_new)):
        check_tensor(name, x, (batch, heads, None, dim), (k_cache.dtype,), k_cache, "k_cache")
    if k_new.shape != v_new.shape:
        raise ValueError(f"v_new has shape {tuple(v_new.shape)}; expected {tuple(k_new.shape)}, the shape of k_new")
    count = k_new.shape[2]
    if isinstance(lengths, int) and not isinstance(lengths, bool) and not 0 <= lengths <= rows - count:
        raise ValueError(f"lengths is {lengths}; expected 0 to {rows - count}: the cache has {rows} rows and {count} are appended")
    lengths = as_lengths(lengths, batch, k_cache)
    native = engine("append", k_cache.device, impl)
    checked = wants_check(check, k_cache.device)
    if checked and (native is None or k_cache.device.type != "cpu"):
        refuse_lengths(lengths, count, rows)
    result = torch.empty_like(lengths)
    if native is not None:
        if native(k_cache, v_cache, unit_stride(k_new), unit_stride(v_new), lengths, result, checked):
            refuse_lengths(lengths, count, rows)
        return result
    fits = (lengths >= 0) & (lengths <= rows - count)
    place = torch.where(fits, lengths, 0)[:, None] + torch.arange(count, device=lengths.device)
    where = place[:, None, :, None].expand(batch, heads, count, dim)
    for cache, new in ((k_cache, k_new), (v_cache, v_new)):
        cache.scatter_(2, where, torch.where(fits[:, None, None, None], new, cache.gather(2, where)))
    return torch.where(fits, lengths + count, lengths)


def retrieve(
    k_cache: Tensor, v_cache: Tensor, indices: Tensor, *, impl: str = "auto", check: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of the cache by their indices: k and v, each [B, H, n, D], contiguous.

    indices: [B, n] int64; -1 gives a row of zeros. Another index out of range is a ValueError; with check=False (the default on CUDA) it
    gives zeros too.
    """
    _check_pair("cache", k_cache, v_cache)
    batch, heads, rows, dim = k_cache.shape
    check_tensor("indices", indices, (batch, None), INT64, k_cache, "k_cache")
    native = engine("retrieve", k_cache.device, impl)
    checked = wants_check(check, k_cache.device)
    if checked and (native is None or k_cache.device.type != "cpu"):
        _refuse_indices(indices, rows)
    if native is not None:
        k, v = (x.new_empty(batch, heads, indices.shape[1], dim) for x in (k_cache, v_cache))
        if native(k_cache, v_cache, indices.contiguous(), k, v) and checked:
            _refuse_indices(indices, rows)
        return k, v
    there = ((indices >= 0) & (indices < rows))[:, None, :, None]
    where = indices.clamp(0, rows - 1)[:, None, :, None].expand(-1, heads, -1, dim)
    return tuple(torch.where(there, x.gather(2, where), 0) for x in (k_cache, v_cache))


def as_lengths(lengths: Tensor | int, batch: int, like: Tensor) -> Tensor:
    """lengths as [B] int64 on the device of `like`."""
    if isinstance(lengths, Tensor):
        return check_tensor("lengths", lengths, (batch,), INT64, like, "the cache").contiguous()
    return torch.full((batch,), check_integer("lengths", lengths, 0), dtype=torch.int64, device=like.device)


def refuse_lengths(lengths: Tensor, count: int, rows: int) -> None:
    """ValueError unless `count` more rows fit everywhere."""
    found = first((lengths < 0) | (lengths > rows - count))
    if found is not None:
        wanted = f"0 to {rows - count}: the cache has {rows} rows and {count} are appended"
        raise ValueError(f"{at('lengths', found)} is {int(lengths[found])}; expected {wanted}")


def unit_stride(x: Tensor) -> Tensor:
    """x, copied if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def check_rows(name: str, x: object, dims: int) -> None:
    """That x is a cache: `dims` dimensions, the last contiguous, of a floating dtype, and every element in a place of its own."""
    check_tensor(name, x, (None,) * dims, FLOATS)
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        raise ValueError(f"{name} has strides {x.stride()}; expected a contiguous last dimension")
    if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape)):
        raise ValueError(f"{name} has strides {x.stride()}; expected none of 0: rows that share memory cannot be written")


def _check_pair(name: str, k: object, v: object) -> None:
    check_rows(f"k_{name}", k, 4)
    check_rows(f"v_{name}", v, 4)
    if v.shape != k.shape or v.dtype != k.dtype or v.device != k.device:
        raise ValueError(f"v_{name} is {short(v)} on {v.device}; expected one like k_{name}: {short(k)} on {k.device}")


def _refuse_indices(indices: Tensor, rows: int) -> None:
    found = first((indices < -1) | (indices >= rows))
    if found is not None:
        raise ValueError(f"{at('indices', found)} is {int(indices[found])}; expected a row from 0 to {rows - 1}, or -1")
