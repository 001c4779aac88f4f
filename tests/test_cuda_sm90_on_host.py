"""The device code of the sm90 tier, compiled for the host: threads are fibers that run in random order, instructions are functions.

Slow, so sizes are small; it needs no GPU. Shared memory begins as NaN and copies arrive late, so a missing wait or barrier shows.
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
from sparse_attention.decode_reference import decode_reference
from sparse_attention.eagle import tree_mask
from sparse_attention.layout import layout
from sparse_attention.patterns.base import Tile
from tests.test_cuda_on_host import is_right, tensors

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="fibers are ucontext's, on Linux")
HERE = Path(__file__).parent / "cuda_on_host"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """csrc/cuda/sm90 with another ptx.h."""
    folder = tmp_path_factory.mktemp("cuda")
    cuda = source_folder() / "cuda"
    for source in [cuda / "tile.h", cuda / "walk.cuh", cuda / "decode.h", HERE / "threads.h", HERE / "sm90" / "library.cpp"]:
        shutil.copy(source, folder)
    shutil.copytree(cuda / "sm90", folder / "sm90")
    shutil.copy(HERE / "sm90" / "ptx.h", folder / "sm90" / "ptx.h")
    target = folder / "library.so"
    command = [*compiler(), "-std=c++20", "-O2", "-w", "-fPIC", "-fvisibility=hidden", "-shared", f"-I{folder}", str(folder / "library.cpp"), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return ctypes.CDLL(str(target))


def arguments(pointers, tensors, sizes):
    strides = [step for x in tensors for step in x.stride()[:3]]
    pointers = [0 if x is None else x.data_ptr() for x in pointers]
    return (ctypes.c_void_p * len(pointers))(*pointers), (ctypes.c_int64 * len(strides))(*strides), (ctypes.c_int32 * len(sizes))(*sizes)


def decode(library, q, k, v, lengths, *, ancestors=None, window=-1, sinks=0, block_table=None, splits=1, seed=0):
    batch, heads, q_len, head_dim = q.shape
    out, lse = torch.full_like(q, 7.0), torch.full(q.shape[:3], 7.0)
    parts = torch.full((splits, batch, heads, q_len, head_dim), torch.nan), torch.full((splits, batch, heads, q_len), torch.nan)
    pages, kv_heads, page = k.shape[:3]
    width = block_table.shape[1] if block_table is not None else 0
    sizes = [batch, heads, kv_heads, q_len, head_dim, page * width or page, page, pages, width]
    sizes += [*((1, 0) if ancestors is None else (ancestors.shape[0], ancestors.shape[2])), window, sinks, splits]
    arrays = arguments((q, out, k, v, lse, *parts, lengths, ancestors, block_table), (q, out, k, v), sizes)
    assert library.decode(*arrays, ctypes.c_float(head_dim**-0.5), seed) == 0
    return out, lse


def check_decode(library, q, k, v, lengths, poison=True, **given):
    """Against float64, where the cache holds NaN that nobody may look at."""
    splits, seed = given.pop("splits", 1), given.pop("seed", 0)
    right, right_lse = reference(q, k, v, lengths, **given)
    if poison:
        k, v = (spoiled(x, lengths, given.get("block_table")) for x in (k, v))
    out, lse = decode(library, q, k, v, lengths, splits=splits, seed=seed, **given)
    torch.testing.assert_close(out.double(), right, atol=0.02, rtol=0.01)
    torch.testing.assert_close(lse.double(), right_lse.double(), atol=1e-3, rtol=1e-3)
    return out, lse


def reference(q, k, v, lengths, ancestors=None, window=-1, sinks=0, block_table=None):
    return decode_reference(*(x.double() for x in (q, k, v)), lengths, ancestors, window, sinks, block_table, q.shape[3] ** -0.5)


def spoiled(cache, lengths, block_table):
    """The cache with NaN at and past each request's length."""
    cache = cache.clone()
    page = cache.shape[2]
    for request, length in enumerate(lengths.tolist()):
        if block_table is None:
            cache[request, :, length:] = torch.nan
        else:
            for n, at in enumerate(block_table[request].tolist()):
                cache[at, :, max(0, min(page, length - n * page)) :] = torch.nan
    return cache


TREE = torch.tensor([-1, 0, 0, 0, 1, 1, 2, 4, 4, 7, 6, 3, 11])


def bits(parents):
    return tree_mask(parents if parents.ndim == 2 else parents[None], "bits")


def test_decode_a_token(library):
    q, k, v = tensors(2, 4, 2, 1, 300, 64)
    for lengths in ([300, 1], [129, 128], [5, 0]):
        check_decode(library, q, k, v, torch.tensor(lengths))
        check_decode(library, q, k, v, torch.tensor(lengths), splits=3)


@pytest.mark.parametrize("head_dim", (64, 72, 128, 256))
def test_decode_a_tree(library, head_dim):
    q, k, v = tensors(1, 4, 1, 13, 260, head_dim)
    for length, splits in ((13, 1), (140, 1), (250, 2)):
        check_decode(library, q, k, v, torch.tensor([length]), ancestors=bits(TREE), splits=splits)


def test_decode_a_tree_of_more_rows_than_a_tile_and_more_nodes_than_a_word(library):
    parents = torch.tensor([-1] + [max(0, n - 1 - n % 5) for n in range(1, 70)])
    q, k, v = tensors(1, 4, 2, 70, 200, 64)
    for length in (70, 137, 191):
        check_decode(library, q, k, v, torch.tensor([length]), ancestors=bits(parents))


def test_decode_trees_of_different_sizes(library):
    ancestors = bits(TREE.repeat(3, 1))
    ancestors[1, 5:] = ancestors[2, 1:] = 0  # rows of no node
    q, k, v = tensors(3, 2, 2, 13, 150, 64)
    bad = [x.clone() for x in (k, v)]
    for x in bad:
        x[1, :, 100 - 13 + 5 : 100] = torch.nan  # what is no node has no key
    out, lse = decode(library, q, *bad, torch.tensor([150, 100, 40]), ancestors=ancestors)
    right, _ = reference(q, k, v, torch.tensor([150, 100, 40]), ancestors=ancestors)
    torch.testing.assert_close(out.double(), right, atol=0.02, rtol=0.01)
    assert not out[1, :, 5:].any() and (lse[2, :, 1:] == -torch.inf).all()


@pytest.mark.parametrize("window, sinks", ((1, 0), (40, 0), (100, 3), (200, 130), (64, 200)))
def test_decode_with_a_window(library, window, sinks):
    q, k, v = tensors(1, 2, 1, 5, 520, 64)
    for length, splits in ((520, 1), (300, 3), (60, 2)):
        check_decode(library, q, k, v, torch.tensor([length]), window=window, sinks=sinks, splits=splits)


@pytest.mark.parametrize("page", (16, 64, 128, 256))
def test_decode_over_pages(library, page):
    q, k, v = tensors(2, 2, 1, 3, 512, 64)
    width = 512 // page
    table = torch.randperm(2 * width + 3, generator=torch.Generator().manual_seed(1))[: 2 * width].view(2, width).int()
    paged = []
    for x in (k, v):
        pages = torch.zeros(2 * width + 3, 1, page, 64, dtype=x.dtype)
        for request in range(2):
            pages[table[request].long()] = x[request].unflatten(1, (width, page)).transpose(0, 1)
        paged.append(pages)
    lengths = torch.tensor([500, 130])
    out, _ = check_decode(library, q, *paged, lengths, block_table=table, splits=2)
    assert torch.equal(out, decode(library, q, k, v, lengths, splits=2)[0])


def test_what_is_out_of_range_is_not_there(library):
    q, k, v = tensors(2, 2, 1, 3, 128, 64)
    check_decode(library, q, k, v, torch.tensor([129, -1]), poison=False)
    pages = [torch.cat([x, x]).unflatten(2, (8, 16)).transpose(1, 2).flatten(0, 1) for x in (k, v)]  # 32 pages of 16
    table = torch.arange(16).view(2, 8).int()
    table[0, 2], table[1, 7] = -1, 32
    check_decode(library, q, *pages, torch.tensor([128, 100]), poison=False, block_table=table)


def test_decode_over_a_strided_cache_in_any_order_of_threads(library):
    base = torch.randn(1, 200, 2, 2, 64, generator=torch.Generator().manual_seed(3)).bfloat16()  # [batch, length, (k, v), heads, head_dim]
    k, v = (base[:, :, n].transpose(1, 2) for n in range(2))
    q, _, _ = tensors(1, 4, 2, 6, 200, 64)
    first = check_decode(library, q, k, v, torch.tensor([190]), poison=False)
    for seed in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(first, decode(library, q, k, v, torch.tensor([190]), seed=seed)))


def forward(library, q, k, v, pattern, keys, bits=None, order=None, seed=0):
    batch, heads, q_len, head_dim = q.shape
    parts = cuda_tables.tables(layout(pattern, q_len, k.shape[2], heads, Tile(cuda_tables.QUERIES, keys)), q.device, 3, halves=bits is not None)
    out, lse, partial = torch.full_like(q, 7.0), torch.full(q.shape[:3], 7.0), torch.full(q.shape, torch.nan)
    for part in parts:
        tables = part.work, part.starts, part.row_start, part.runs, part.masks, part.dead, part.marks
        sizes = [len(part.work), batch, heads, k.shape[1], q_len, k.shape[2], head_dim, keys, part.merge]
        sizes += [*((0, 0, 0) if bits is None else bits.shape), part.marks.shape[1] - 1, part.stride, part.has_dead]
        arrays = arguments((q, k, v, out, partial, lse, *tables, bits, order), (q, k, v, out), sizes)
        assert library.forward(*arrays, ctypes.c_float(head_dim**-0.5), 3, seed) == 0
    return out, lse


@pytest.mark.parametrize("pattern, sizes, keys", [
    (sa.SlidingWindow(70), (1, 2, 1, 150, 150, 64), 64),
    (sa.SlidingWindow(70) | sa.Sinks(3), (2, 1, 1, 40, 210, 40), 128),
    (sa.Dilated(20, 7), (1, 1, 1, 200, 200, 64), 64),
    (sa.Dilated(20, (1, 3)), (1, 2, 2, 140, 140, 64), 128),
    (sa.MultiScale(16), (1, 1, 1, 140, 140, 64), 64),
    (sa.Dense(), (1, 1, 1, 130, 67, 200), 64),
    (sa.Causal(), (1, 1, 1, 130, 130, 128), 128),
], ids=str)  # fmt: skip
def test_patterns(library, pattern, sizes, keys):
    q, k, v = tensors(*sizes)
    mask = pattern.mask(q.shape[2], k.shape[2], q.shape[1])
    assert is_right(q, k, v, mask, *forward(library, q, k, v, pattern, keys))


def test_a_block_mask_filters_the_tiles(library):
    q, k, v = tensors(1, 2, 2, 200, 330, 64)
    seen = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(1)) < 0.5  # of each 64 queries
    seen[1, 2:] = False
    words = (seen.long() << torch.arange(6)).sum(2, keepdim=True)
    mask = seen.repeat_interleave(64, 1)[:, :200].repeat_interleave(64, 2)[:, :, :330] & sa.Causal().mask(200, 330, 2)
    order = torch.tensor([2, 0, 3, 1], dtype=torch.int32)
    assert is_right(q, k, v, mask, *forward(library, q, k, v, sa.Causal(), 64, words, order))


def test_nan_where_nobody_looks(library):
    q, k, v = tensors(1, 1, 1, 30, 300, 64)
    mask = sa.SlidingWindow(50).mask(30, 300, 1)
    unseen = ~mask.any(1)[None, :, :, None]
    bad = [x.masked_fill(unseen, torch.nan) for x in (k, v)]
    assert is_right(q, k, v, mask, *forward(library, q, *bad, sa.SlidingWindow(50), 128))
