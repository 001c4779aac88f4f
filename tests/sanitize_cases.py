"""Small calls of every CUDA kernel, held against the reference on the CPU: what tests/sanitize.py runs under compute-sanitizer.

python -m tests.sanitize_cases ENGINE. Inputs are made on the CPU and copied, so that no kernel of PyTorch's has to be followed.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

import sparse_attention as sa
from sparse_attention import _build_cuda, cuda_layout, cuda_rows, eagle
from sparse_attention._build import source_folder
from sparse_attention.decode import decode
from sparse_attention.dispatch import Sizes
from sparse_attention.eagle import tree_mask
from sparse_attention.rows import rows as rows_of
from tests.cases import csr
from tests.eagle_trees import likely_logits, random_tree
from tests.eagle_upstream import draft_candidates

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU the cases run its engines, to try the cases themselves
HALVES = (torch.bfloat16, torch.float16)
TREE = (-1, 0, 0, 1, 1, 2, 4, 4, 7)
LARGE_TREE = [-1, *((n - 1) // 3 for n in range(1, 300))]
FAULTS = Path(__file__).with_name("sanitize_faults.cu")


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def there(x):
    """A tensor, or each of a tuple's, on the device."""
    if isinstance(x, tuple):
        moved = [there(y) for y in x]
        return type(x)(*moved) if hasattr(x, "_fields") else tuple(moved)
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


def close(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype, ulps: int = 16) -> None:
    tolerance = ulps * torch.finfo(dtype).eps
    torch.testing.assert_close(ours.cpu().double(), theirs.double(), rtol=tolerance, atol=tolerance)


def same(ours, theirs) -> None:
    for a, b in zip(ours, theirs):
        assert (a is None) == (b is None) and (a is None or torch.equal(a.cpu(), b.cpu()))


def attend(
    impl: str, pattern: sa.Pattern, q_len: int, kv_len: int, head_dim: int = 128, dtype=torch.bfloat16, heads: int = 2, kv_heads: int = 1,
    batch: int = 1, times: int = 1,
) -> None:  # fmt: skip
    q = drawn(batch, heads, q_len, head_dim, dtype=dtype)
    k, v = (drawn(batch, kv_heads, kv_len, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    on_device = sa.LiveBlocks(there(pattern.block_mask), pattern.block) if isinstance(pattern, sa.LiveBlocks) else pattern
    given = there((q, k, v))
    out, lse = sa.attention(*given, on_device, impl=impl, return_lse=True)
    for _ in range(times - 1):
        assert torch.equal(sa.attention(*given, on_device, impl=impl).cpu(), out.cpu())
    right, right_lse = sa.attention(*(x.double() for x in (q, k, v)), pattern, impl="reference", return_lse=True)
    close(out, right, dtype)
    close(lse, right_lse, torch.float32 if dtype == torch.float64 else dtype)


def tile() -> None:
    attend("tile", sa.SlidingWindow(70), 300, 300)
    attend("tile", sa.Causal(), 130, 259, 64, torch.float16)
    attend("tile", sa.SlidingWindow(40), 200, 100)  # rows that see nothing
    attend("tile", sa.SlidingWindow(64), 63, 400)  # keys that no row sees
    with mock.patch.object(cuda_layout, "LAUNCH", -1e9):  # parts of a union one after the other, though one launch is quicker here
        attend("tile", sa.Dilated(40, 3), 301, 301, 64)
        attend("tile", sa.Dilated(36, (1, 2)), 290, 290, kv_heads=2)
        attend("tile", sa.MultiScale(16, (1, 2, 4)), 300, 300)
    attend("tile", sa.Longformer(25, 2), 290, 290, dtype=torch.float16)
    attend("tile", sa.Documents((1, 99, 64, 36, 100)), 300, 300)
    attend("tile", csr(150, 200), 150, 200)
    attend("tile", sa.SlidingWindow(70), 150, 150, 72)
    attend("tile", sa.SlidingWindow(70), 150, 150, 192)
    attend("tile", sa.SlidingWindow(70), 150, 150, 256, torch.float16)


def random_blocks(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4


def blocks() -> None:
    attend("tile", sa.BlockSparse(random_blocks(5, 5), 64), 300, 300)
    attend("tile", sa.BlockSparse(random_blocks(2, 3, 4), 128), 300, 500, 64)
    attend("tile", sa.BigBird(64, 1, 1, 1), 450, 450)
    attend("tile", sa.LiveBlocks(random_blocks(2, 5, 5), 64), 300, 290)
    attend("tile", sa.LiveBlocks(random_blocks(3, 3), 128), 300, 300, 64, torch.float16)
    attend("tile", sa.BlockSparse(random_blocks(40, 40), 64) & sa.Causal(), 2560, 2560, 64)
    attend("tile", sa.BlockSparse(random_blocks(9, 9), 32), 270, 270)
    attend("tile", sa.LiveBlocks(random_blocks(4, 80), 64), 250, 5100, times=2)  # items that are cut over their keys
    # More items than an H100 holds blocks, 132 of sm90 and 264 of sm80: the others are taken by a counter, which every call clears.
    attend("tile", sa.LiveBlocks(random_blocks(63, 3), 64), 4000, 190, heads=4, batch=4, times=2)
    attend("tile", sa.BlockSparse(random_blocks(4, 32, 2), 128), 4000, 190, dtype=torch.float16, heads=4, kv_heads=2, batch=4, times=2)
    attend("tile", sa.BigBird(64, 1, 1, 1), 512, 512, 64, heads=6, batch=6, times=2)


def gather() -> None:
    for dtype in (*HALVES, torch.float32, torch.float64):
        attend("gather", sa.LogSparse(), 200, 200, 64, dtype)  # several rows a warp
        attend("gather", csr(80, 300, 0.5), 80, 300, 128, dtype, heads=4)
        attend("gather", sa.Causal(), 3, 1500, 64, dtype)  # cut and joined
    attend("gather", sa.SlidingWindow(40), 200, 100, 72)
    attend("gather", sa.SlidingWindow(40), 100, 100, 256, torch.float32)
    q, k, v = (drawn(1, 1, 90, 65)[..., 1:] for _ in range(3))  # rows that begin at no multiple of 16 bytes
    strided = [there(drawn(1, 1, 90, 65))[..., 1:] for _ in range(3)]
    close(sa.attention(*strided, sa.Causal(), impl="gather"), sa.attention(q, k, v, sa.Causal(), impl="reference"), torch.float32)


def decoding() -> None:
    for head_dim, dtype in ((128, torch.bfloat16), (64, torch.float16), (192, torch.bfloat16)):
        q = drawn(2, 8, 9, head_dim, dtype=dtype)
        k, v = (drawn(2, 2, 700, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
        lengths = torch.tensor([700, 130])
        ancestors = tree_mask(torch.tensor([TREE]), "bits")
        for given in ({}, {"ancestors": ancestors}, {"window": 100, "sinks": 4}):
            ours = decode(*there((q, k, v, lengths)), **{name: there(x) for name, x in given.items()}, impl="native")
            close(ours, decode(*(x.double() for x in (q, k, v)), lengths, **given, impl="reference"), dtype)
    table = torch.tensor([[3, 0, 4], [1, 5, 2]])
    pages = [drawn(6, 2, 64, 192, dtype=torch.bfloat16, seed=seed) for seed in (3, 4)]
    ours = decode(*there((q, *pages, torch.tensor([190, 70]))), block_table=there(table), impl="native")
    right = decode(q.double(), *(x.double() for x in pages), torch.tensor([190, 70]), block_table=table, impl="reference")
    close(ours, right, torch.bfloat16)
    one = drawn(1, 4, 1, 128, dtype=torch.bfloat16), *(drawn(1, 1, 3000, 128, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    ours = decode(*there(one), there(torch.tensor([3000])), impl="native")
    close(ours, decode(*(x.double() for x in one), 3000, impl="reference"), torch.bfloat16)


def decode_kernels() -> list[str]:
    """The kernels of decode by name, in the order of their numbers."""
    listed = re.search(r"enum class DecodeKernel : int32_t {([^}]*)}", (source_folder() / "cuda/decode.h").read_text())
    return [name.strip() for name in listed[1].split(",")]


def decoders() -> None:
    """Each kernel of decode, whichever it would take by itself: blocks alone, as a cluster, and joined by a second launch."""
    ancestors = tree_mask(torch.tensor([LARGE_TREE]), "bits")
    lengths = torch.tensor([700, 310])
    table = torch.randperm(90, generator=torch.Generator().manual_seed(0))[:88].int().view(2, 44)
    single = [(head_dim, torch.float32) for head_dim in (64, 128, 256)]
    for head_dim, dtype in [(128, torch.bfloat16), (64, torch.float16), (192, torch.bfloat16), *single]:
        q = drawn(2, 4, 300, head_dim, dtype=dtype)
        k, v = (drawn(2, 2, 704, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
        pages = [drawn(90, 2, 16, head_dim, dtype=dtype, seed=seed) for seed in (3, 4)]
        decode_each(q, k, v, lengths, (1, 4, 20), ancestors=ancestors)
        decode_each(q[:, :, :26], *pages, lengths, (1, 2, 20), block_table=table)
        decode_each(q[:, :, :26], k, v, lengths, (1, 2), window=100, sinks=3)
    q = drawn(1, 4, 26, 128, dtype=torch.bfloat16)
    k, v = (drawn(1, 1, 9000, 128, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    decode_each(q, k, v, torch.tensor([8999]), (0, 8, 40))


def decode_each(q, k, v, lengths, splits, ancestors=None, window=None, sinks=0, block_table=None) -> None:
    """Every kernel that takes these, with every number of splits; 0: as the plan has it. On a CPU, its engine."""
    given = {"ancestors": ancestors, "window": window, "sinks": sinks, "block_table": block_table}
    right, right_lse = decode(*(x.double() for x in (q, k, v)), lengths, **given, return_lse=True, impl="reference")
    moved = there((q, k, v, lengths))
    given = {name: there(x) for name, x in given.items()}
    outs = [decode(*moved, **given, return_lse=True, impl="native")]
    if DEVICE == "cuda":
        native = _build_cuda.kernels(torch.cuda.get_device_capability())
        terms = given["ancestors"], -1 if window is None else window, sinks, given["block_table"], q.shape[3] ** -0.5, True
        numbers = [n for n, name in enumerate(decode_kernels()) if not name.startswith("kWarpgroup") or (q.dtype in HALVES and q.shape[3] <= 128)]
        outs += [native.decode_forward(*moved, 0, *terms, number, count) for number in numbers for count in splits]
    ulps = 256 if q.dtype == torch.float32 else 16  # its products are three of TF32
    for out, lse in outs:
        close(out, right, q.dtype, ulps)
        close(lse, right_lse, q.dtype, ulps)


def eagles() -> None:
    batch, lengths = 2, torch.tensor([9, 50])
    candidates = tuple(torch.stack(x) for x in zip(*(draft_candidates(3, 4, seed) for seed in range(batch))))
    tree = random_tree(12, 1, batch=batch)
    logits = likely_logits(tree, 3000, 5)
    probs, targets = logits.softmax(2), logits.argmax(2)
    accepted = eagle.verify_greedy(tree, logits, impl="reference")[:2]
    cache, hidden, new = drawn(4, batch, 2, 80, 24), drawn(batch, 12, 33), drawn(batch, 2, 3, 24)
    steps, before = (-torch.arange(120).remainder(17).view(2, 10, 6) / 4, -torch.arange(20).view(2, 10) / 8)
    given = candidates, tree, logits, probs, targets, accepted, cache, hidden, new, lengths, steps, before

    def run(given, impl):
        candidates, tree, logits, probs, targets, accepted, cache, hidden, new, lengths, steps, before = given
        yield eagle.build_tree(*candidates, 20, lengths, mask="bits", impl=impl)
        yield (eagle.select_tree(candidates[0], 20, impl=impl),)
        yield from ((eagle.tree_mask(tree.parents, form, impl=impl),) for form in ("bool", "float", "bits", "additive"))
        yield (eagle.tree_mask(tree.parents, "full", prefix_lens=lengths.cpu(), impl=impl),)
        yield eagle.verify_greedy(tree, logits, return_sample_p=True, impl=impl)
        yield eagle.verify_greedy(tree, target_tokens=targets, impl=impl)
        yield from ((eagle.verify_sampling(tree, probs, seed=3, rule=rule, impl=impl).next_token,) for rule in ("upstream", "target_only"))
        yield eagle.commit(cache, lengths, *accepted, hidden=hidden, impl=impl)
        yield (eagle.append(cache[0], cache[1], new, new, lengths, impl=impl), cache)
        yield eagle.retrieve(cache[0], cache[1], accepted[0], impl=impl)
        yield (eagle.logsoftmax_topk(logits.double(), 10, impl=impl).tokens,)
        yield eagle.cumulative_topk(steps, before, 10, tokens=steps.long(), level=1, impl=impl)

    moved = there(given)
    moved = tuple(x.clone() if x is cache else x for x in moved)  # on a CPU both would change one cache
    for ours, theirs in zip(run(moved, "native"), run(given, "reference"), strict=True):
        same(ours, theirs)


def outside() -> None:
    """Reads keys far past the end: memcheck must say so."""
    sizes, pattern = Sizes(1, 1, 1, 40, 40, 64, torch.float32, "cuda"), sa.Causal()
    listed = rows_of(pattern, 40, 40, 1)
    run, _ = cuda_rows.forward(dataclasses.replace(listed, columns=listed.columns + (1 << 26)), sizes, torch.device("cuda", 0))
    run(*(there(drawn(1, 1, 40, 64)) for _ in range(3)), 1.0)


def unwritten() -> None:
    """Reads queries that nobody wrote: initcheck must say so."""
    q, k = torch.empty(1, 1, 40, 64, device=DEVICE), there(drawn(1, 1, 40, 64))
    sa.attention(q, k, k, sa.Causal(), impl="gather")


def faults(capability: tuple[int, int], target: Path) -> ctypes.CDLL:
    """The kernels of sanitize_faults.cu, compiled."""
    subprocess.run([*_build_cuda.compile_command(capability), "-shared", str(FAULTS), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def fault(name: str) -> None:
    """Runs one of them: racecheck must find `race`, synccheck `divergent`."""
    out = there(torch.zeros(64, dtype=torch.int32))
    with tempfile.TemporaryDirectory() as folder:
        run = getattr(faults(torch.cuda.get_device_capability(), Path(folder) / "faults.so"), name)
        assert run(ctypes.c_void_p(out.data_ptr())) == 0


ENGINES: dict[str, Callable[[], None]] = {
    "sm90": tile,
    "sm80": tile,
    "gather": gather,
    "blocks": blocks,
    "blocks80": blocks,
    "decode": decoding,
    "decoders": decoders,
    "eagle": eagles,
    "outside": outside,
    "unwritten": unwritten,
    "race": lambda: fault("race"),
    "divergent": lambda: fault("divergent"),
}
TIERS = {"sm90": "sm90", "sm80": "sm80", "blocks80": "sm80"}


if __name__ == "__main__":
    if sys.argv[1] in TIERS:
        os.environ["SPARSE_ATTENTION_CUDA"] = TIERS[sys.argv[1]]
    ENGINES[sys.argv[1]]()
