"""Bit masks of tiles: int64 `[n, rows, columns // 64]`, bit c of word c // 64 for column c."""

from __future__ import annotations

import numpy as np

_BITS_OF_BYTE = np.array([bin(n).count("1") for n in range(256)], dtype=np.uint8)


def pack(bits: np.ndarray) -> np.ndarray:
    """bool `[n, rows, columns]` -> int64 `[n, rows, columns // 64]`."""
    packed = np.packbits(np.ascontiguousarray(bits), axis=-1, bitorder="little")
    return packed.view("<i8").astype(np.int64, copy=False)


def popcount(masks: np.ndarray) -> np.ndarray:
    """Set bits of each mask: int64 `[n]`."""
    if masks.size == 0:
        return np.zeros(len(masks), dtype=np.int64)
    return _BITS_OF_BYTE[masks.view(np.uint8)].reshape(len(masks), -1).sum(axis=1, dtype=np.int64)


def transpose_masks(masks: np.ndarray) -> np.ndarray:
    """int64 `[n, rows, columns // 64]` -> int64 `[n, columns, rows // 64]`, by swapping halves of ever smaller squares."""
    n, rows, words = masks.shape
    squares = masks.reshape(n, rows // 64, 64, words).transpose(0, 3, 1, 2)
    x = squares.copy(order="C").view(np.uint64)
    half, low = 32, np.uint64(0x00000000FFFFFFFF)
    while half:
        pairs = x.reshape(n, words, rows // 64, 32 // half, 2, half)
        upper, lower = pairs[..., 0, :], pairs[..., 1, :]
        shift = np.uint64(half)
        swap = ((upper >> shift) ^ lower) & low
        upper ^= swap << shift
        lower ^= swap
        half //= 2
        low ^= low << np.uint64(half)
    return np.ascontiguousarray(x.transpose(0, 1, 3, 2)).view(np.int64).reshape(n, words * 64, rows // 64)
