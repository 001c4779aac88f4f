"""The table of cases. pytest-benchmark (perf/tests) and asv (perf/bench_break_even.py) both read it; it needs no torch.

A row is raced against dense attention: the best SDPA, causal where the pattern is. `floor` is the least speedup over it.
Shapes named after models are those of one layer; `2of8` says how many of its key and value heads take part.
"""

from __future__ import annotations

from typing import Any

from perf import eagle_cases
from sparse_attention.breakeven import Case

CASES: list[Case] = []


def shape(heads: int, length: int, head_dim: int, kv_heads: int | None = None, dtype: str = "float32") -> dict[str, Any]:
    """Batch 1, as many queries as keys; `kv_heads` where they are fewer than `heads`."""
    return {
        "batch": 1,
        "heads": heads,
        "kv_heads": kv_heads or heads,
        "q_len": length,
        "kv_len": length,
        "head_dim": head_dim,
        "dtype": dtype,
    }


def add(name: str, build: str, args: dict[str, Any], **fields: Any) -> None:
    CASES.append(Case(name, f"perf.workloads:{build}", args, **fields))


def race(
    name: str, pattern: str, sizes: dict[str, Any], causal: bool = True, impl: str = "tile", direction: str = "forward", **fields
) -> None:
    """Against dense; cases of equal sizes, causality and direction are timed beside one dense measurement."""
    words = [str(size) for size in sizes.values()] + ["causal" if causal else "full", direction]
    add(name, direction, {"pattern": pattern, "causal": causal, "impl": impl, **sizes}, share=" ".join(words), **fields)


K = 1024
LONG = shape(4, 16 * K, 64)  # the sizes of the speed table: 4 heads of 64, 16,384 tokens

race("window256/16k", "SlidingWindow(256)", LONG, floor=14.0, columns=("flex",))
race("window1024/16k", "SlidingWindow(1024)", LONG, floor=5.0, columns=("flex",))
race("dilated256x4/16k", "Dilated(256, 4)", LONG, floor=12.6)
race("multiscale256/16k", "MultiScale(256)", LONG)
race("logsparse/16k", "LogSparse()", LONG, impl="gather", floor=40.0)
race("bigbird/16k", "BigBird()", LONG, causal=False)
race("longformer256/16k", "Longformer(256, 1)", LONG, causal=False)
race("window256/16k/backward", "SlidingWindow(256)", LONG, direction="backward", floor=11.0)
race("window256/1k", "SlidingWindow(256)", shape(4, K, 64))
race("window256/512", "SlidingWindow(256)", shape(4, 512, 64), tags=("full",))
race("window256/4k", "SlidingWindow(256)", shape(4, 4 * K, 64), columns=("masked", "torch.sparse"))
add(
    "dilated256x4/16k/of-window256",
    "against",
    {"pattern": "Dilated(256, 4)", "rival": "SlidingWindow(256)", **LONG},
    floor=0.9,
)
for window, floor in ((256, 3.0), (1024, 2.5)):
    add(
        f"window{window}/16k/of-flex",
        "against_flex",
        {"pattern": f"SlidingWindow({window})", **LONG},
        floor=floor,
        tags=("full",),
    )

# The engine's rate in visited tiles, against its own on a plain causal call.
for name, pattern in (("multiscale256", "MultiScale(256)"), ("bigbird", "BigBird()"), ("longformer256", "Longformer(256, 1)")):
    sizes = shape(4, 4 * K, 64)
    add(f"{name}/4k/tile-rate", "tile_rate", {"pattern": pattern, **sizes}, floor=0.6, share="causal tiles 4k")

# Layers of real models.
race("mistral-7b/window4096/8k/1of8", "SlidingWindow(4096)", shape(4, 8 * K, 128, kv_heads=1))
race("mistral-7b/window4096/16k/1of8", "SlidingWindow(4096)", shape(4, 16 * K, 128, kv_heads=1), tags=("full",))
race("mistral-7b/window4096/8k", "SlidingWindow(4096)", shape(32, 8 * K, 128, kv_heads=8), tags=("full",))
race("gemma-3-4b/window1024/8k/1of4", "SlidingWindow(1024)", shape(2, 8 * K, 256, kv_heads=1))
race("gemma-3-4b/window1024/8k", "SlidingWindow(1024)", shape(8, 8 * K, 256, kv_heads=4), tags=("full",))
race("gpt-oss/window128/8k/1of8", "SlidingWindow(128)", shape(8, 8 * K, 64, kv_heads=1))
race("gpt-oss/window128/8k", "SlidingWindow(128)", shape(64, 8 * K, 64, kv_heads=8), tags=("full",))
race("longformer-base/4k", "Longformer(256, 1)", shape(12, 4 * K, 64), causal=False)
race("bigbird-base/4k", "BigBird(block=64, window=3, globals=2, random=3)", shape(12, 4 * K, 64), causal=False)
race("sparse-transformer/cifar10/strided128/3k", "Strided(128)", shape(2, 3 * K, 128))
race("sparse-transformer/enwik8/fixed128/12k/2of8", "Fixed(128, 32)", shape(2, 12 * K, 64))
race("sparse-transformer/enwik8/fixed128/12k", "Fixed(128, 32)", shape(8, 12 * K, 64), tags=("full",))
for name, heads, length, segments, tags in (
    ("longnet/8k/2of12", 2, 8 * K, [2048, 4096, 8192], ()),
    ("longnet/32k", 12, 32 * K, [2048, 4096, 8192, 16384, 32768], ("full",)),
):
    dilations = [1, 2, 4, 8, 16][: len(segments)]
    add(name, "segments", {"segments": segments, "dilations": dilations, **shape(heads, length, 64)}, tags=tags)

# The ladder: a window of a sixteenth of the context, up to 4,096.
for length, window, tags in ((1, 64, ()), (4, 256, ()), (16, 1024, ("full",)), (64, 4096, ("full",)), (128, 4096, ("full",))):
    race(f"ladder/window{window}/{length}k", f"SlidingWindow({window})", shape(2, length * K, 128), tags=tags)

# `auto` loses at most 5 % and 10 us to the fastest engine.
for pattern, name in (("SlidingWindow(256)", "window256"), ("BigBird()", "bigbird"), ("LogSparse()", "logsparse")):
    for length in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
        chosen = name == "window256" or length in (64, 512, 2048)
        add(
            f"auto/{name}/{length}",
            "automatic",
            {"pattern": pattern, **shape(4, length, 64)},
            floor=1 / 1.05,
            allowance_s=10e-6,
            tags=("auto",) if chosen else ("auto", "full"),
        )

# Making layouts.
add(
    "layout/window4096/1m",
    "layout_making",
    {"pattern": "SlidingWindow(4096)", "length": 1024 * K, "most_bytes": 20_000_000},
    limit_s=50e-3,
    tags=("layout",),
)
add("layout/bigbird/128k", "layout_making", {"pattern": "BigBird()", "length": 128 * K}, limit_s=0.3, tags=("layout",))
add("layout/predicate/8k", "layout_making", {"pattern": "predicate", "length": 8 * K}, limit_s=1.0, tags=("layout",))
add("layout/again", "layout_again", {"pattern": "SlidingWindow(4096)", "length": 8 * K}, limit_s=10e-6, tags=("layout",))

# Trees and single tokens over a cache, 32 heads over 8 of 128. On Zen 4, after 2,048 tokens in float32, SDPA reaches half of a core's peak
# and more, so twice its speed is out of reach; bfloat16 gets it from AVX512_BF16, which not every machine has.
for nodes, prefix, dtype in (
    (26, 0, "float32"),
    (26, 2048, "float32"),
    (60, 0, "float32"),
    (60, 2048, "float32"),
    (26, 0, "bfloat16"),
    (26, 2048, "bfloat16"),
    (60, 0, "bfloat16"),
    (60, 2048, "bfloat16"),
    (1, 2048, "float32"),
    (1, 2048, "bfloat16"),
):
    case = f"decode/{nodes}-after-{prefix}/{dtype}"
    tags = () if nodes == 26 and dtype == "float32" else ("full",)
    CASES.append(Case(case, "perf.decode_workloads:tree", {"nodes": nodes, "prefix": prefix, "dtype": dtype}, tags=tags))

CASES += eagle_cases.CPU
