"""Uniform numbers from a counter: the same on every device, for any batch."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attention.eagle.checks import check_integer, short

_LOW = 0xFFFFFFFF
_ROUNDS = 10


def uniforms(seed: Tensor, offset: Tensor, batch: int, count: int) -> Tensor:
    """[batch, count] float32 in [0, 1): multiples of 2^-24.

    Number i of request b is word i % 4 of Philox4x32-10 (Salmon et al. 2011) with the key (seed's low and high 32 bits) and the counter
    (offset's low and high 32 bits, b, i // 4), its upper 24 bits over 2^24. seed and offset: [1] int64.
    """
    device = seed.device
    blocks = (count + 3) // 4
    shape = (batch, blocks)
    counter = [
        (offset & _LOW).expand(shape),
        (offset >> 32 & _LOW).expand(shape),
        torch.arange(batch, device=device)[:, None].expand(shape),
        torch.arange(blocks, device=device).expand(shape),
    ]
    key = [seed & _LOW, seed >> 32 & _LOW]
    for _ in range(_ROUNDS):
        low0, high0 = _product(counter[0], 0xD2511F53)
        low1, high1 = _product(counter[2], 0xCD9E8D57)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & _LOW, (key[1] + 0xBB67AE85) & _LOW]
    words = torch.stack(counter, dim=2).view(batch, blocks * 4)[:, :count]
    return (words >> 8).to(torch.float32) * 2.0**-24


def as_counter(name: str, value: int | Tensor, device: torch.device) -> Tensor:
    """A seed or an offset as [1] int64 on the device; a tensor that is there already stays there, to be changed between replays."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype != torch.int64 or value.device != device:
            raise ValueError(f"{name} is {short(value)} on {value.device}; expected one int64 on {device}")
        return value.reshape(1)
    return torch.full((1,), check_integer(name, value, 0, 2**63 - 1), dtype=torch.int64, device=device)


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Low and high 32 bits of x * factor; int64 wraps, its bits do not care."""
    product = x * factor
    return product & _LOW, product >> 32 & _LOW
