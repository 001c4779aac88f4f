"""Rows of EAGLE's operations, for the tables of both devices: ours against EAGLE's own formulas, trees against SDPA with their mask.

60 nodes of 10 candidates in 7 levels, a vocabulary of 128,256 and 32 layers of 8 heads of 128 unless said. Floors on a CPU are such that
any machine must hold them, but for that of `build`, which the project set itself, as it set those on one H100.
"""

from __future__ import annotations

from typing import Any

from sparse_attention.breakeven import Case

CPU: list[Case] = []
CUDA: list[Case] = []
V = 128256


def add(table: list[Case], case: str, build: str, tags: tuple[str, ...] = (), **args: Any) -> None:
    """`floor` and `limit_s` are the case's, everything else the builder's."""
    fields = {name: args.pop(name) for name in ("floor", "limit_s", "columns") if name in args}
    module = {"generate": "eagle_generation", "tree": "decode_workloads", "window": "decode_workloads"}.get(build, "eagle_workloads")
    table.append(Case(case, f"perf.{module}:{build}", args, tags=(*tags, "eagle"), **fields))


FULL = ("full",)
MASKS = ("rebuild", "incremental", "doubling")

add(CPU, "eagle/build", "build", floor=5.0)
for nodes in (16, 64, 256, 1024, 4096):
    add(CPU, f"eagle/mask/{nodes}", "mask", () if nodes == 64 else FULL, nodes=nodes, floor=2.0, columns=MASKS)
add(CPU, "eagle/verify/128k", "verify", FULL, floor=20.0, vocab=V, dtype="float32")
add(CPU, "eagle/commit/32-layers", "commit", layers=32, rows=512, dtype="bfloat16")
add(CPU, "eagle/draft/32k", "draft", FULL, vocab=32000, dtype="float32")
add(CPU, "eagle/step", "step", FULL, floor=20.0, vocab=V, layers=32, rows=512, dtype="float32")
for vocab, floor in ((96, 0.8), (32000, 1.2)):
    add(CPU, f"eagle/generate/{vocab}", "generate", FULL, floor=floor, vocab=vocab)
for nodes, prefix in ((50, 0), (100, 0), (200, 0), (500, 0), (1000, 0), (64, 2048)):
    add(CPU, f"eagle/attention/{nodes}-after-{prefix}", "tree", FULL, nodes=nodes, prefix=prefix, dtype="float32")

# One H100. The floors of the tree's attention (in a graph, and eager: as launched from Python), of windows, of build, of commit's
# time and of verification, 75 % of the bandwidth of a copy, are what the project asked, reached or not: docs/decode.md and
# docs/eagle.md. Under a window that was twice the speed of FlexAttention or of SDPA over the slice of the cache; SDPA's rows cannot
# reach it, since it reads the slice at the bandwidth of the memory from batch 16 on. The others, of which nothing was asked, are a
# fifth or so below what was measured.
for prefix, lengths, floor in ((0, (26, 50, 100, 200, 500, 1000), 1.0), (2048, (26, 64), 4.0), (32768, (26, 64), 9.0)):
    for nodes in lengths:
        name = f"eagle/attention/{nodes}" + f"-after-{prefix}" * (prefix > 0)
        add(CUDA, name, "tree", nodes=nodes, prefix=prefix, dtype="float16", floor=floor)
        if prefix == 0:
            add(CUDA, f"{name}/eager", "tree", nodes=nodes, prefix=prefix, dtype="float16", eager=True, floor=floor)
for batch in (1, 16, 64):
    sizes = {"batch": batch, "window": 4096, "length": 131072, "dtype": "float16"}
    tags, name = FULL if batch == 64 else (), f"decode/window4096/128k/batch-{batch}"
    add(CUDA, name, "window", tags, floor=2.0, **sizes)
    add(CUDA, f"{name}/of-flex", "window", tags, floor=2.0, rival="flex", **sizes)
add(CUDA, "eagle/build/time", "build", mask="bits", limit_s=15e-6)
add(CUDA, "eagle/build", "build", floor=20.0)
for nodes in (16, 64, 256, 1024, 4096):
    add(CUDA, f"eagle/mask/{nodes}", "mask", () if nodes in (64, 4096) else FULL, nodes=nodes, floor=4.0)
add(CUDA, "eagle/verify/128k/of-copy", "verify", vocab=V, dtype="float16", rival="copy", floor=0.75)
add(CUDA, "eagle/verify/128k/of-argmax", "verify", FULL, vocab=V, dtype="float16", rival="argmax", floor=1.5)
add(CUDA, "eagle/verify/128k/batch-16/of-copy", "verify", vocab=V, dtype="float16", batch=16, rival="copy", floor=0.75)
add(CUDA, "eagle/verify/128k", "verify", vocab=V, dtype="float16", floor=5.0)
add(CUDA, "eagle/commit/32-layers/time", "commit", layers=32, rows=2048, dtype="float16", limit_s=8e-6)
add(CUDA, "eagle/commit/32-layers", "commit", layers=32, rows=2048, dtype="float16", floor=1.5)
add(CUDA, "eagle/draft/128k", "draft", FULL, vocab=V, dtype="float16", floor=1.5)
add(CUDA, "eagle/step", "step", vocab=V, layers=32, rows=2048, dtype="float16", floor=5.0)
add(CUDA, "eagle/generate/32000", "generate", FULL, vocab=32000)
