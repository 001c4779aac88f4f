"""Times the CUDA engine beside SDPA and compiled FlexAttention, each case a ratio in one run: python perf/cuda_speed.py [quick]

Events around the call, the L2 cache overwritten before each, turns in random order, the median of 15. For development: what is
published comes from `python -m sparse_attention.breakeven gate --device cuda`.
"""

from __future__ import annotations

import random
import sys
from statistics import median

import torch

from sparse_attention import BigBird, BlockSparse, Causal, Dense, Dilated, Longformer, LogSparse, MultiScale, SlidingWindow, baselines
from sparse_attention import attention, cuda_layout
from sparse_attention.breakeven.cuda_clock import CudaClock

K = 1024


def blocks(length: int, block: int, heads: int = 16) -> BlockSparse:
    side = length // block
    generator = torch.Generator().manual_seed(0)
    return BlockSparse(torch.rand(heads, side, side, generator=generator) < 0.1, block)


# name, pattern, length, head_dim, heads, kv_heads, rivals
CASES = [
    ("window4096", SlidingWindow(4096), 128 * K, 128, 16, 16, "flex"),
    ("window1024", SlidingWindow(1024), 128 * K, 128, 16, 16, "flex"),
    ("window1024", SlidingWindow(1024), 16 * K, 128, 16, 16, "flex dense"),
    ("window256", SlidingWindow(256), 128 * K, 128, 16, 16, "flex"),
    ("window256", SlidingWindow(256), 16 * K, 128, 16, 16, "flex dense"),
    ("dilated1024x4", Dilated(1024, 4), 128 * K, 128, 16, 16, "flex"),
    ("dilated1024x16", Dilated(1024, 16), 128 * K, 128, 16, 16, ""),
    ("multiscale1024", MultiScale(1024), 128 * K, 128, 16, 16, ""),
    ("multiscale1024", MultiScale(1024), 16 * K, 128, 16, 16, "flex"),
    ("bigbird", BigBird(64), 16 * K, 128, 16, 16, ""),
    ("bigbird", BigBird(64), 128 * K, 128, 16, 16, ""),
    ("blocks128", blocks(32 * K, 128), 32 * K, 128, 16, 16, ""),
    ("blocks64", blocks(32 * K, 64), 32 * K, 128, 16, 16, ""),
    ("longformer512", Longformer(512, 4), 16 * K, 128, 16, 16, "flex"),
    ("logsparse", LogSparse(), 128 * K, 128, 16, 16, ""),
    ("causal", Causal(), 16 * K, 128, 16, 16, "dense"),
    ("dense", Dense(), 16 * K, 128, 16, 16, "dense"),
    ("window1024", SlidingWindow(1024), 4 * K, 128, 16, 16, "flex dense"),
    ("window1024", SlidingWindow(1024), K, 128, 16, 16, "flex dense"),
    ("window1024 gqa", SlidingWindow(1024), 16 * K, 128, 64, 8, "flex"),
    ("window1024 d64", SlidingWindow(1024), 128 * K, 64, 16, 16, "flex"),
]


def medians(calls: dict, clock: CudaClock, turns: int = 15) -> dict[str, float]:
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    for turn in range(turns + 2):
        for name in random.sample(list(calls), len(calls)):
            clock.settle()
            taken = clock.time(calls[name], 1)
            if turn > 1:
                times[name].append(taken)
    return {name: median(values) for name, values in times.items()}


def main() -> None:
    clock = CudaClock()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name, pattern, length, head_dim, heads, kv_heads, rivals in CASES:
        if "quick" in sys.argv and "flex" in rivals:
            rivals = rivals.replace("flex", "")
        generator = torch.Generator("cuda").manual_seed(0)
        shapes = ((heads, length), (kv_heads, length), (kv_heads, length))
        q, k, v = (torch.randn(1, h, n, head_dim, device="cuda", generator=generator).bfloat16() for h, n in shapes)
        with torch.no_grad():
            calls = {"tile": lambda: attention(q, k, v, pattern, impl="tile")}
            if "flex" in rivals:
                calls["flex"] = baselines.flex(q, k, v, pattern)
            if "dense" in rivals:
                dense = baselines.dense(q, k, v, causal=not isinstance(pattern, Dense))
                calls |= {name: dense[f"sdpa {name}_attention"] for name in ("cudnn", "flash")}
            found = medians(calls, clock)
        layout = cuda_layout.best_layout(pattern, length, length, heads, head_dim)
        useful, computed = (4 * head_dim * n for n in (layout.counts.pairs, layout.counts.visited * layout.tile_q * layout.tile_k))
        mine = found.pop("tile")
        rates = f"{useful / mine / 1e12:5.0f} TFLOP/s useful {computed / mine / 1e12:5.0f} in tiles of {layout.tile_k}"
        against = "  ".join(f"{rival} {1e3 * taken:.3f} ms {taken / mine:.2f}x" for rival, taken in found.items())
        print(f"{name:16} {length // K:4}K {1e3 * mine:8.3f} ms {rates}  {against}", flush=True)
        del q, k, v, calls
        torch._dynamo.reset()  # a later case must not meet a limit on recompiling, and run FlexAttention uncompiled
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
