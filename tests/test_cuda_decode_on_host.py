"""The decoding kernels of a CUDA device, compiled for the host: threads are fibers that run in random order, instructions are functions.

Slow, so sizes are small; it needs no GPU. Shared memory begins as NaN and copies arrive late, so a missing wait or barrier shows.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from sparse_attention._build import compiler, source_folder
from sparse_attention.decode_reference import decode_reference
from sparse_attention.eagle import tree_mask
from tests.test_cuda_on_host import tensors

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="fibers are ucontext's, on Linux")
HERE = Path(__file__).parent / "cuda_on_host"
KERNELS = ("narrow", "wide", "many")
ROWS = {"warpgroups": 128, "warpgroup": 64}  # of a block
MATES = {"mates": 256}  # of two blocks that bring each other's keys
MERGING = (*KERNELS, "warpgroup")  # in a cluster; blocks of 128 rows leave what they find to the second launch


@functools.cache
def host_library(source: str) -> ctypes.CDLL:
    """csrc/cuda with other instructions, compiled once for all tests. source: below tests/cuda_on_host."""
    with tempfile.TemporaryDirectory() as folder:
        return _compiled(Path(folder), HERE / source)


def _compiled(folder: Path, source: Path) -> ctypes.CDLL:
    cuda = source_folder() / "cuda"
    for file in [cuda / "tile.h", cuda / "walk.cuh", cuda / "decode.h", HERE / "threads.h", HERE / "join.h"]:
        shutil.copy(file, folder)
    for tier in ("sm80", "sm90", "decode"):
        shutil.copytree(cuda / tier, folder / tier)
        shutil.copy(HERE / ("ptx.h" if tier == "sm80" else f"{tier}/ptx.h"), folder / tier / "ptx.h")
    shutil.copy(source, folder / "library.cpp")
    target = folder / "library.so"
    command = [*compiler(), "-std=c++20", "-O2", "-w", "-fPIC", "-fvisibility=hidden", "-shared", f"-I{folder}", str(folder / "library.cpp"), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return ctypes.CDLL(str(target))


class Engine:
    """One kernel as `decode`, without its checks."""

    def __init__(self, name):
        self.name = name
        self.rows = (ROWS | MATES).get(name)
        self.call = host_library("sm90/library.cpp" if self.rows else "decode/library.cpp").decode

    def __call__(self, q, k, v, lengths, *, ancestors=None, window=-1, sinks=0, block_table=None, splits=1, cluster=1, seed=0):
        batch, heads, q_len, head_dim = q.shape
        out, lse = torch.full_like(q, 7.0), torch.full(q.shape[:3], 7.0)
        parts = torch.full((splits, batch, heads, q_len, head_dim), torch.nan), torch.full((splits, batch, heads, q_len), torch.nan)
        pages, kv_heads, page = k.shape[:3]
        width = block_table.shape[1] if block_table is not None else 0
        sizes = [batch, heads, kv_heads, q_len, head_dim, page * width or page, page, pages, width]
        sizes += [*((1, 0) if ancestors is None else (ancestors.shape[0], ancestors.shape[2])), window, sinks, splits, cluster]
        one = lengths if isinstance(lengths, int) else None
        pointers = [0 if x is None else x.data_ptr() for x in (q, out, k, v, lse, *parts, lengths if one is None else None, ancestors, block_table)]
        strides = [step for x in (q, out, k, v) for step in x.stride()[:3]]
        sizes.append(one or 0)
        arrays = (ctypes.c_void_p * 10)(*pointers), (ctypes.c_int64 * 12)(*strides), (ctypes.c_int32 * len(sizes))(*sizes)
        which = [self.rows] if self.rows else [int(q.dtype == torch.float32), KERNELS.index(self.name)]
        assert self.call(*arrays, ctypes.c_float(head_dim**-0.5), *which, seed) == 0
        return out, lse

    def check(self, q, k, v, lengths, poison=True, **given):
        """Against float64, where the cache holds NaN that nobody may look at."""
        how = {name: given.pop(name) for name in ("splits", "cluster", "seed") if name in given}
        right, right_lse = reference(q, k, v, lengths, **given)
        if poison:
            k, v = (spoiled(x, lengths, given.get("block_table")) for x in (k, v))
        out, lse = self(q, k, v, lengths, **how, **given)
        tolerance = {"atol": 2e-5, "rtol": 1e-5} if q.dtype == torch.float32 else {"atol": 0.02, "rtol": 0.01}
        torch.testing.assert_close(out.double(), right, **tolerance)
        torch.testing.assert_close(lse.double(), right_lse.double(), atol=1e-3, rtol=1e-3)
        return out, lse


@pytest.fixture(params=[*KERNELS, *ROWS])
def engine(request):
    return Engine(request.param)


@pytest.fixture(params=KERNELS[:2])
def small(request):
    return Engine(request.param)


def reference(q, k, v, lengths, ancestors=None, window=-1, sinks=0, block_table=None):
    if isinstance(lengths, int):
        lengths = torch.full((q.shape[0],), lengths)
    return decode_reference(*(x.double() for x in (q, k, v)), lengths, ancestors, window, sinks, block_table, q.shape[3] ** -0.5)


def spoiled(cache, lengths, block_table):
    """The cache with NaN at and past each request's length."""
    cache = cache.clone()
    page = cache.shape[2]
    for request, length in enumerate([lengths] * len(cache) if isinstance(lengths, int) else lengths.tolist()):
        if block_table is None:
            cache[request, :, length:] = torch.nan
        else:
            for n, at in enumerate(block_table[request].tolist()):
                cache[at, :, max(0, min(page, length - n * page)) :] = torch.nan
    return cache


TREE = torch.tensor([-1, 0, 0, 0, 1, 1, 2, 4, 4, 7, 6, 3, 11])


def bits(parents):
    return tree_mask(parents if parents.ndim == 2 else parents[None], "bits")


def test_a_token(engine):
    q, k, v = tensors(2, 4, 2, 1, 300, 64)
    for lengths, splits in (([300, 1], 1), ([129, 128], 3), ([5, 0], 1), ([5, 0], 3)):
        engine.check(q, k, v, torch.tensor(lengths), splits=splits)
    engine.check(q, k, v, 200, splits=2)


@pytest.mark.parametrize("head_dim", (64, 72, 256))
def test_a_tree(engine, head_dim):
    if engine.name in ROWS and head_dim == 256:
        pytest.skip("no such kernel")
    q, k, v = tensors(1, 4, 1, 13, 260, head_dim)
    for length, splits in ((13, 1), (140, 1), (250, 2)):
        engine.check(q, k, v, torch.tensor([length]), ancestors=bits(TREE), splits=splits)


@pytest.mark.parametrize("head_dim", (64, 72, 256))
def test_float32(small, head_dim):
    q, k, v = (x.float() + torch.randn(x.shape) * 1e-3 for x in tensors(1, 4, 1, 13, 160, head_dim))
    for length, splits, cluster in ((13, 1, 1), (150, 2, 1), (150, 2, 2)):
        small.check(q, k, v, torch.tensor([length]), ancestors=bits(TREE), splits=splits, cluster=cluster)


def test_float32_is_off_by_at_most_twice_what_pytorch_is(small):
    q, k, v = (x.float() + torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) * 1e-3 for x in tensors(1, 4, 1, 5, 900, 64))
    lengths = torch.tensor([900])
    right, right_lse = reference(q, k, v, lengths)
    seen = torch.ones(5, 900, dtype=torch.bool).tril(895)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k.expand(1, 4, -1, -1), v.expand(1, 4, -1, -1), attn_mask=seen)
    out, lse = small(q, k, v, lengths)
    mine, allowed = ((x.double() - right).square().mean().sqrt() for x in (out, theirs))
    assert mine <= 2 * allowed, f"off by {float(mine):.2e} where PyTorch is by {float(allowed):.2e}"
    assert (lse.double() - right_lse).abs().max() < 4e-6


@pytest.mark.parametrize("engine", MERGING, indirect=True)
@pytest.mark.parametrize("cluster", (2, 3, 9))
def test_blocks_of_a_cluster_merge(engine, cluster):
    q, k, v = tensors(2, 6, 2, 7, 330, 64)
    for lengths in ([330, 7], [200, 0]):
        want = engine.check(q, k, v, torch.tensor(lengths), splits=cluster, cluster=cluster)
        for x, y in zip(want, engine(q, k, v, torch.tensor(lengths), splits=cluster, cluster=cluster, seed=5)):
            assert torch.equal(x, y)


def test_more_rows_than_a_block_and_more_nodes_than_a_word(engine):
    parents = torch.tensor([-1] + [max(0, n - 1 - n % 5) for n in range(1, 70)])
    q, k, v = tensors(1, 4, 2, 70, 200, 64)
    for length in (70, 191):
        engine.check(q, k, v, torch.tensor([length]), ancestors=bits(parents))


@pytest.mark.parametrize("head_dim", (64, 128))
def test_tiles_that_no_node_of_a_block_sees(engine, head_dim):
    parents = torch.tensor([-1, *range(0, 69), *(n // 30 for n in range(70, 270))])
    q, k, v = tensors(1, 2, 1, 270, 310, head_dim)
    for length in (270, 300):
        engine.check(q, k, v, torch.tensor([length]), ancestors=bits(parents))
    engine.check(q, k, v, torch.tensor([300]), splits=2)


@pytest.mark.parametrize("length, splits", ((720, 1), (1040, 1), (1040, 2), (1100, 9)))
def test_more_tiles_than_stages_in_one_block(engine, length, splits):
    """So many that on warpgroups the call's last one comes before others of its block."""
    q, k, v = tensors(1, 4, 1, 13, 1101, 64)
    holes = bits(TREE)
    holes[0, 9] = 0  # no node
    for ancestors in (bits(TREE), holes, None):
        given = {} if ancestors is None else {"ancestors": ancestors}
        first = engine.check(q, k, v, torch.tensor([length]), splits=splits, **given)
        assert torch.equal(first[0], engine(q, k, v, torch.tensor([length]), splits=splits, seed=7, **given)[0])


@pytest.mark.parametrize("cluster, head_dim", ((1, 72), (3, 64)))
def test_a_cache_that_is_nearly_empty(engine, cluster, head_dim):
    """Many blocks have no key, some part of a tile. Of 128 rows, head_dim 64 has the first tile apart, 72 in the loop."""
    q, k, v = tensors(6, 4, 1, 13, 1400, head_dim)
    cluster = cluster if engine.name in MERGING else 1
    for ancestors in (bits(TREE), None):
        given = {} if ancestors is None else {"ancestors": ancestors}
        engine.check(q, k, v, torch.tensor([13, 70, 300, 0, 500, 1400]), splits=3, cluster=cluster, seed=3, **given)


@pytest.mark.parametrize("length, splits", ((70, 1), (200, 2), (600, 1), (900, 1), (900, 2)))
def test_mates_bring_each_other_keys(length, splits):
    """Two tiles of rows, whose blocks also begin and end with tiles that only one of them sees."""
    mates = Engine("mates")
    q, k, v = tensors(1, 4, 2, 70, 901, 128)
    holes = bits(torch.tensor([-1] + [max(0, n - 1 - n % 5) for n in range(1, 70)]))
    given = {"ancestors": holes} if length == 900 or splits > 1 else {}
    holes[0, 40] = 0  # no node
    first = mates.check(q, k, v, torch.tensor([length]), splits=splits, **given)
    assert torch.equal(first[0], mates(q, k, v, torch.tensor([length]), splits=splits, seed=7, **given)[0])


def test_mates_of_several_tiles_requests_and_windows():
    mates = Engine("mates")
    q, k, v = tensors(2, 8, 1, 60, 300, 72)  # four tiles
    mates.check(q, k, v, torch.tensor([300, 0]), splits=2)
    mates.check(q, k, v, torch.tensor([290, 61]), window=40, sinks=3)
    pages = [x.unflatten(2, (6, 50))[:, :, :, :16].transpose(1, 2).flatten(0, 1) for x in (k, v)]  # 12 pages of 16
    table = torch.randperm(12, generator=torch.Generator().manual_seed(1)).view(2, 6).int()
    mates.check(q, *pages, torch.tensor([90, 70]), block_table=table, splits=2)


def test_trees_of_different_sizes(engine):
    ancestors = bits(TREE.repeat(3, 1))
    ancestors[1, 5:] = ancestors[2, 1:] = 0  # rows of no node
    q, k, v = tensors(3, 2, 2, 13, 150, 64)
    bad = [x.clone() for x in (k, v)]
    for x in bad:
        x[1, :, 100 - 13 + 5 : 100] = torch.nan  # what is no node has no key
    lengths = torch.tensor([150, 100, 40])
    out, lse = engine(q, *bad, lengths, ancestors=ancestors)
    right, _ = reference(q, k, v, lengths, ancestors=ancestors)
    torch.testing.assert_close(out.double(), right, atol=0.02, rtol=0.01)
    assert not out[1, :, 5:].any() and (lse[2, :, 1:] == -torch.inf).all()


@pytest.mark.parametrize("window, sinks", ((1, 0), (40, 0), (100, 3), (200, 130), (64, 200)))
def test_a_window(engine, window, sinks):
    q, k, v = tensors(1, 2, 1, 5, 520, 64)
    for length, splits in ((520, 1), (300, 3), (60, 2)):
        engine.check(q, k, v, torch.tensor([length]), window=window, sinks=sinks, splits=splits)


@pytest.mark.parametrize("window, sinks", ((1, 0), (2, 0), (3, 1), (2, 32), (4, 30)))
def test_a_window_of_less_than_a_tree(engine, window, sinks):
    q, k, v = tensors(2, 2, 1, 13, 90, 64)
    ancestors = bits(TREE.repeat(2, 1))
    ancestors[1, 9:] = 0
    engine.check(q, k, v, torch.tensor([90, 41]), poison=False, ancestors=ancestors, window=window, sinks=sinks)


@pytest.mark.parametrize("page", (16, 64, 256))
def test_pages(engine, page):
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
    out, _ = engine.check(q, *paged, lengths, block_table=table, splits=2)
    assert torch.equal(out, engine(q, k, v, lengths, splits=2)[0])


def test_what_is_out_of_range_is_not_there(engine):
    q, k, v = tensors(2, 2, 1, 3, 128, 64)
    engine.check(q, k, v, torch.tensor([129, -1]), poison=False)
    pages = [torch.cat([x, x]).unflatten(2, (8, 16)).transpose(1, 2).flatten(0, 1) for x in (k, v)]  # 32 pages of 16
    table = torch.arange(16).view(2, 8).int()
    table[0, 2], table[1, 7] = -1, 32
    engine.check(q, *pages, torch.tensor([128, 100]), poison=False, block_table=table)


def test_a_strided_cache_in_any_order_of_threads(engine):
    base = torch.randn(1, 200, 2, 2, 64, generator=torch.Generator().manual_seed(3)).bfloat16()  # [batch, length, (k, v), heads, head_dim]
    k, v = (base[:, :, n].transpose(1, 2) for n in range(2))
    q, _, _ = tensors(1, 4, 2, 6, 200, 64)
    first = engine.check(q, k, v, torch.tensor([190]), poison=False)
    for seed in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(first, engine(q, k, v, torch.tensor([190]), seed=seed)))
