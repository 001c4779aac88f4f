"""Families whose break-even point `python -m sparse_attention.breakeven study` finds, and the seeds' table. Needs no torch.

Dense is the best SDPA, causal where the pattern is. Four heads, as many queries as keys.
"""

from __future__ import annotations

from sparse_attention.breakeven import Case
from sparse_attention.breakeven.crossing import Family, geometric
from sparse_attention.breakeven.study import Published

FAMILIES: list[Family] = []
PUBLISHED: list[Published] = []

HEADS = 4
LENGTHS = geometric(16, 4096)
DENSITIES = tuple(n / 256 for n in geometric(1, 256))


def by_length(name: str, pattern: str, causal: bool = True, impl: str = "tile", lengths: tuple[int, ...] = LENGTHS) -> None:
    """The smallest length that wins, in two dtypes and head_dims; only float32 and 64 unless all sizes are asked for."""
    for dtype, short in (("float32", "f32"), ("bfloat16", "bf16")):
        for head_dim in (64, 128):
            fixed = {"batch": 1, "heads": HEADS, "kv_heads": HEADS, "head_dim": head_dim, "dtype": dtype}
            args = {"pattern": pattern, "causal": causal, "impl": impl, **fixed}
            tags = ("length",) if (dtype, head_dim) == ("float32", 64) else ("length", "full")
            id = f"{name}/{short}/{head_dim}"
            FAMILIES.append(Family(id, "perf.workloads:forward", ("q_len", "kv_len"), lengths, args, tags=tags))


by_length("window64", "SlidingWindow(64)")
by_length("window256", "SlidingWindow(256)")
by_length("window1024", "SlidingWindow(1024)", lengths=geometric(512, 8192))
by_length("dilated256x4", "Dilated(256, 4)")
by_length("multiscale64", "MultiScale(64)")
by_length("strided64", "Strided(64)")
by_length("logsparse", "LogSparse()", impl="gather")
by_length("bigbird", "BigBird()", causal=False)
by_length("longformer256", "Longformer(256, 1)", causal=False)

# The largest density that wins.
for name, impl in (("blocks", "tile"), ("scattered", "gather")):
    args = {"impl": impl, "length": 2048, "heads": HEADS, "head_dim": 64}
    FAMILIES.append(Family(f"{name}/2k", f"perf.densities:{name}", ("density",), DENSITIES, args, "small", tags=("density",)))

# The seeds' table: an EAGLE tree of 26 positions and larger ones of its density on an RTX 4090 (float16, lists of keys), the
# break-even point put at about 200 positions; at 10 % they give one figure, for 26 positions. Here: 8 heads of 128.
SEEDS = {
    26: ("0.129 ms", "0.233 ms", "0.51x"),
    50: ("0.134 ms", "0.245 ms", "0.54x"),
    100: ("0.142 ms", "0.216 ms", "0.66x"),
    200: ("0.158 ms", "0.148 ms", "1.07x"),
    500: ("0.214 ms", "0.092 ms", "2.33x"),
    1000: ("0.328 ms", "0.103 ms", "3.18x"),
}
for density, percent in ((0.136, "13.6"), (0.1, "10")):
    for positions, figures in SEEDS.items():
        name = f"seeds/{positions}/{percent}%"
        if density == 0.1:
            figures = ("-", "-", "0.50x" if positions == 26 else "-")
        args = {"positions": positions, "density": density, "heads": 8, "head_dim": 128}
        cases = tuple(
            Case(f"{name}/{impl}", "perf.densities:tree", {**args, "impl": impl}, share=name) for impl in ("tile", "gather")
        )
        PUBLISHED.append(Published(name, dict(zip(("seeds: PyTorch", "CUDA", "speedup"), figures)), cases, tags=("seeds",)))
    for impl in ("tile", "gather"):
        args = {"density": density, "impl": impl, "heads": 8, "head_dim": 128}
        id = f"tree/{percent}%/{impl}"
        FAMILIES.append(Family(id, "perf.densities:tree", ("positions",), geometric(16, 1024), args, tags=("tree",)))
