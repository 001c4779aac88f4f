"""The device code of the sm80 tier, compiled for the host: threads are fibers that run in random order, instructions are functions.

Slow, so sizes are small; it needs no GPU. Buffers that a copy is on its way to hold NaN, so a missing wait or barrier shows.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparse_attention as sa
from sparse_attention import cuda_tables
from sparse_attention._build import compiler, source_folder
from sparse_attention.layout import layout
from sparse_attention.patterns.base import Tile

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="fibers are ucontext's, on Linux")
HERE = Path(__file__).parent / "cuda_on_host"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """csrc/cuda with another ptx.h."""
    folder = tmp_path_factory.mktemp("cuda")
    cuda = source_folder() / "cuda"
    for source in [cuda / "tile.h", cuda / "walk.cuh", HERE / "threads.h", HERE / "library.cpp"]:
        shutil.copy(source, folder)
    shutil.copytree(cuda / "sm80", folder / "sm80")
    shutil.copy(HERE / "ptx.h", folder / "sm80" / "ptx.h")
    target = folder / "library.so"
    command = [*compiler(), "-std=c++20", "-O2", "-w", "-fPIC", "-fvisibility=hidden", "-shared", f"-I{folder}", str(folder / "library.cpp"), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return ctypes.CDLL(str(target))


def forward(library, q, k, v, pattern, keys=64, bits=None, order=None, barriers=True, seed=0):
    """(out, lse) by three blocks of threads. bits: int64 [heads, 64-row halves, words] of a block mask; order: of the items, with it, each
    with what it is cut into in the upper half of an int64, see struct Piece; -1 there is nothing.
    """
    batch, heads, q_len, head_dim = q.shape
    blocks, tile = 3, Tile(cuda_tables.QUERIES, keys)
    parts = cuda_tables.tables(layout(pattern, q_len, k.shape[2], heads, tile), q.device, blocks, halves=bits is not None)
    out, lse, partial = torch.full_like(q, 7.0), torch.full(q.shape[:3], 7.0), torch.full(q.shape, torch.nan)
    strides = [step for x in (q, k, v, out) for step in x.stride()[:3]]
    for part in parts:
        tables = part.work, part.starts, part.runs, part.masks, part.dead, part.marks
        pointers = [0 if x is None else x.data_ptr() for x in (q, k, v, out, partial, lse, *tables, bits, order)]
        sizes = [len(part.work), batch, heads, k.shape[1], q_len, k.shape[2], head_dim, keys, part.merge]
        sizes += [*((0, 0, 0) if bits is None else bits.shape), part.marks.shape[1] - 1, 0 if order is None else len(order)]
        arrays = (ctypes.c_void_p * 14)(*pointers), (ctypes.c_int64 * 12)(*strides), (ctypes.c_int32 * 14)(*sizes)
        assert library.run(*arrays, ctypes.c_float(head_dim**-0.5), blocks, int(barriers), seed) == 0
    return out, lse


def whole(*items):
    """The order of items that are not cut."""
    return torch.tensor(items) & 0xFFFFFFFF | -1 << 32


def tensors(batch, heads, kv_heads, q_len, kv_len, head_dim):
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    return [torch.randn(batch, *shape, head_dim, generator=generator).bfloat16() for shape in shapes]


def is_right(q, k, v, mask, out, lse):
    """Whether out and lse are those of float64, to a few units in bfloat16's last place."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = ((q.double() @ k.mT) * q.shape[3] ** -0.5).masked_fill(~mask, -torch.inf)
    right, right_lse = torch.softmax(scores, -1).nan_to_num(0.0) @ v, scores.logsumexp(-1)
    return torch.allclose(out.double(), right, atol=0.02, rtol=0.01) and torch.allclose(lse.double(), right_lse, atol=1e-3)


@pytest.mark.parametrize(
    "pattern, sizes, keys",
    [
        (sa.SlidingWindow(70), (1, 2, 1, 150, 150, 64), 64),
        (sa.SlidingWindow(70) | sa.Sinks(3), (2, 1, 1, 40, 210, 40), 128),
        (sa.Dilated(20, 7), (1, 1, 1, 200, 200, 64), 64),
        (sa.Dilated(20, (1, 3)), (1, 2, 2, 140, 140, 64), 64),
        (sa.MultiScale(16), (1, 1, 1, 140, 140, 64), 64),
        (sa.Dense(), (1, 1, 1, 130, 67, 200), 64),
        (sa.Causal(), (1, 1, 1, 130, 130, 256), 64),
        (sa.SlidingWindow(70) | sa.Sinks(3), (1, 1, 1, 140, 140, 128), 128),
        (sa.BlockSparse(torch.tensor([[True, False, False], [False, False, False], [True, False, True]]), 64), (1, 1, 1, 190, 190, 8), 64),
    ],
    ids=str,
)
def test_patterns(library, pattern, sizes, keys):
    q, k, v = tensors(*sizes)
    mask = pattern.mask(q.shape[2], k.shape[2], q.shape[1])
    assert is_right(q, k, v, mask, *forward(library, q, k, v, pattern, keys))


@pytest.mark.parametrize("keys", (64, 128))
@pytest.mark.parametrize("head_dim", (64, 72))
def test_nan_where_nobody_looks(library, keys, head_dim):
    q, k, v = tensors(1, 1, 1, 30, 300, head_dim)
    mask = sa.SlidingWindow(50).mask(30, 300, 1)
    unseen = ~mask.any(1)[None, :, :, None]
    bad = [x.masked_fill(unseen, torch.nan) for x in (k, v)]
    out, lse = forward(library, q, *bad, sa.SlidingWindow(50), keys)
    assert is_right(q, k, v, mask, out, lse)


@pytest.mark.parametrize("keys", (64, 128))
def test_a_block_mask_filters_the_tiles(library, keys):
    q, k, v = tensors(1, 2, 2, 200, 330, 64)
    generator = torch.Generator().manual_seed(1)
    seen = torch.rand(2, 4, -(-330 // keys), generator=generator) < 0.5  # of each 64 queries
    seen[1, 2:] = False
    bits = (seen.long() << torch.arange(seen.shape[2])).sum(2, keepdim=True)
    mask = seen.repeat_interleave(64, 1)[:, :200].repeat_interleave(keys, 2)[:, :, :330] & sa.Causal().mask(200, 330, 2)
    order = whole(2, 0, 3, 1)
    assert is_right(q, k, v, mask, *forward(library, q, k, v, sa.Causal(), keys, bits, order))


def test_words_of_a_block_mask_without_bits_are_passed_over(library):
    q, k, v = tensors(1, 1, 1, 128, 64 * 4300, 64)
    seen = torch.zeros(1, 2, 68 * 64, dtype=torch.bool)
    for half, tile in ((0, 0), (1, 63), (0, 200), (1, 200), (0, 4099), (1, 4299)):
        seen[0, half, tile] = True
    words = seen.unflatten(2, (-1, 64)).long() << torch.arange(64)
    mask = seen.repeat_interleave(64, 1).repeat_interleave(64, 2)[..., : 64 * 4300]
    assert is_right(q, k, v, mask, *forward(library, q, k, v, sa.Dense(), 64, words.sum(3), whole(0)))


def test_strides(library):
    base = torch.randn(1, 100, 3, 2, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    q, k, v = (base[:, :, n].transpose(1, 2) for n in range(3))
    assert is_right(q, k, v, sa.Causal().mask(100, 100, 2), *forward(library, q, k, v, sa.Causal()))


def test_the_order_of_threads_does_not_matter_and_barriers_do(library):
    q, k, v = tensors(1, 1, 1, 130, 130, 64)
    pattern = sa.Causal()
    first = forward(library, q, k, v, pattern)
    assert all(torch.equal(a, b) for a, b in zip(first, forward(library, q, k, v, pattern, seed=1)))
    assert not is_right(q, k, v, pattern.mask(130, 130, 1), *forward(library, q, k, v, pattern, barriers=False))
