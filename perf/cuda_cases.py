"""The table of the GPU's cases, with what one H100 must reach: `pytest perf` on a machine with a GPU.

bfloat16, batch 1, 16 heads of 128 unless said. Floors are those that the project set itself before it measured, but for some of EAGLE's. Each case against
FlexAttention costs seconds of compiling in every block, so a pattern has one where it says most, and the others with `--sizes full`.
"""

from __future__ import annotations

from typing import Any

from perf import eagle_cases
from sparse_attention.breakeven import Case

CASES: list[Case] = []
K = 1024
BIGBIRD = "BigBird(64, 3, 2, 3)"


def add(case: str, build: str, floor: float = 1.0, share: str | None = None, tags: tuple[str, ...] = (), **args: Any) -> None:
    fields = {"limit_s": floor} if build.endswith("_making") else {"floor": floor, "share": share}
    CASES.append(Case(case, f"perf.cuda_workloads:{build}", args, tags=tags, **fields))


def against_dense(name: str, pattern: str, length: int, floor: float, causal: bool = True, **args: Any) -> None:
    share = f"dense {length} {'causal' if causal else 'full'}"
    add(f"{name}/of-dense", "dense", floor, share, pattern=pattern, shape=[length], causal=causal, **args)


def against_flex(name: str, pattern: str, shape: list[int], floor: float, tags: tuple[str, ...] = ()) -> None:
    add(f"{name}/of-flex", "flex", floor, tags=tags, pattern=pattern, shape=shape)


against_dense("window4096/128k", "SlidingWindow(4096)", 128 * K, 14.0)
against_dense("window1024/128k", "SlidingWindow(1024)", 128 * K, 42.0)
against_dense("dilated1024x4/128k", "Dilated(1024, 4)", 128 * K, 37.8)  # 0.9 of the window's
against_dense("causal/128k", "Causal()", 128 * K, 0.78)
against_dense("bigbird/128k", BIGBIRD, 128 * K, 60.0, causal=False)
against_dense("logsparse/128k", "LogSparse()", 128 * K, 25.0)
against_flex("window4096/128k", "SlidingWindow(4096)", [128 * K], 1.35)
for length, tags in ((16 * K, ()), (64 * K, ("full",)), (128 * K, ())):
    against_flex(f"window1024/{length // K}k", "SlidingWindow(1024)", [length], 1.3, tags)
    against_flex(f"window256/{length // K}k", "SlidingWindow(256)", [length], 1.5, tags)
for dilation in (2, 4, 8, 16):
    against_flex(f"dilated1024x{dilation}/128k", f"Dilated(1024, {dilation})", [128 * K], 4.0, () if dilation == 4 else ("full",))
    add(
        f"dilated1024x{dilation}/128k/of-window", "against", 0.9, "window1024/128k", pattern=f"Dilated(1024, {dilation})", shape=[128 * K],
        rival="SlidingWindow(1024)", by="pairs",
    )  # fmt: skip
against_flex("multiscale1024/128k", "MultiScale(1024)", [128 * K], 3.0)
against_flex("multiscale1024/16k", "MultiScale(1024)", [16 * K], 3.0, ("full",))
against_dense("multiscale64/16k", "MultiScale(64)", 16 * K, 5.0)
against_flex("bigbird/16k", BIGBIRD, [16 * K], 2.5)
add("bigbird/128k/tile-rate", "against", 0.6, pattern=BIGBIRD, shape=[128 * K], rival="Dense()", rival_shape=[16 * K], by="tiles")
add("bigbird/128k/layout", "layout_making", 5e-3, pattern=BIGBIRD, shape=[128 * K])
for block in (64, 128):
    against_flex(f"blocks{block}/32k", f"blocks {block}", [32 * K], 1.4)
    add(f"blocks{block}/32k/tile-rate", "against", 0.75, pattern=f"blocks {block}", shape=[32 * K], rival="Dense()", rival_shape=[16 * K], by="tiles")
add("blocks64/64k/layout-again", "filter_making", 100e-6, blocks=1024, heads=32, block=64)
against_flex("longformer512/16k", "Longformer(512, 4)", [16 * K], 2.0)
add("csr/16k/of-torch-sparse", "torch_sparse", 5.0, pattern="csr", shape=[16 * K], impl="gather")
add("logsparse/128k/of-torch-sparse", "torch_sparse", 5.0, tags=("full",), pattern="LogSparse()", shape=[128 * K], impl="gather")
for name, pattern in (("causal", "Causal()"), ("dense", "Dense()")):
    against_dense(f"{name}/16k", pattern, 16 * K, 0.78, causal=name == "causal")  # 450 TFLOP/s of cuDNN's 575
for name, pattern, causal in (
    ("window256", "SlidingWindow(256)", True), ("window1024", "SlidingWindow(1024)", True),
    ("dilated256x4", "Dilated(256, 4)", True), ("bigbird", BIGBIRD, False),
):  # fmt: skip
    for length, floor, tags in ((K, 0.9, ("full",)), (2 * K, 0.95, ("full",)), (4 * K, 1.0, ())):
        against_dense(f"{name}/{length // K}k", pattern, length, floor, causal)
        against_flex(f"{name}/{length // K}k", pattern, [length], 1.1, tags)
for length in (512, K):
    against_dense(f"auto/window256/{length}", "SlidingWindow(256)", length, 0.9, impl="auto")
add(
    "window1024/16k/gqa-64-8/of-mha", "against", 1.0, pattern="SlidingWindow(1024)", shape=[16 * K, 64, 8], rival="SlidingWindow(1024)",
    rival_shape=[16 * K], by="pairs",
)  # fmt: skip
against_flex("window1024/128k/d64", "SlidingWindow(1024)", [128 * K, 16, 16, 64], 1.2)
against_flex("window1024/16k/d64", "SlidingWindow(1024)", [16 * K, 16, 16, 64], 1.2, ("full",))
add("window4096/128k/sm80-of-flash", "tier", 1.0, pattern="SlidingWindow(4096)", shape=[128 * K], name="sm80", rival="sdpa flash_attention")

CASES += eagle_cases.CUDA
