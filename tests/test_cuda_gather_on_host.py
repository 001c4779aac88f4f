"""The gather engine's device code, compiled for the host as in test_cuda_on_host.py. Slow, so sizes are small; it needs no GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import sparse_attention as sa
from sparse_attention import cuda_rows
from sparse_attention._build import compiler, source_folder
from sparse_attention.dispatch import Sizes
from sparse_attention.layout import rows
from tests.cases import csr

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="fibers are ucontext's, on Linux")
HERE = Path(__file__).parent / "cuda_on_host"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TOLERANCE = dict(zip(DTYPES, (2e-6, 1e-14, 6e-3, 8e-4)))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """csrc/cuda/gather with a cuda_runtime.h of its own."""
    folder = tmp_path_factory.mktemp("gather")
    for source in [*(source_folder() / "cuda" / "gather").iterdir(), *(HERE / "gather").iterdir(), HERE / "threads.h"]:
        shutil.copy(source, folder)
    command = [*compiler(), "-std=c++20", "-O1", "-w", "-fPIC", "-fvisibility=hidden", f"-I{folder}"]

    def compiled(source):
        done = subprocess.run([*command, "-x", "c++", "-c", source, "-o", source.with_suffix(".o")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return source.with_suffix(".o")

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [*folder.glob("*.cu"), folder / "library.cpp"]))
    target = folder / "library.so"
    subprocess.run([*command, "-shared", *objects, "-o", target], check=True)
    return ctypes.CDLL(str(target))


def tensors(batch, heads, kv_heads, q_len, kv_len, head_dim, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    return [torch.randn(batch, *shape, head_dim, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def forward(library, q, k, v, pattern, scale):
    """(out, lse), and the tables that were read."""
    batch, heads, q_len, head_dim = q.shape
    sizes = Sizes(batch, heads, k.shape[1], q_len, k.shape[2], head_dim, q.dtype, "cuda")
    table = cuda_rows.tables(rows(pattern, q_len, k.shape[2], heads), sizes, q.device, 132)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out, lse = torch.full(q.shape, torch.nan, dtype=q.dtype), torch.full(q.shape[:3], torch.nan, dtype=wide)
    partial = torch.full((batch * len(table.pieces) * table.together * (head_dim + 2) + 1,), torch.nan, dtype=wide)
    aligned = all(x.data_ptr() % 16 == 0 and all(step * x.element_size() % 16 == 0 for step in x.stride()[:3]) for x in (q, k, v))
    assert aligned or table.together == 1, "the bindings copy these"
    pointers = [x.data_ptr() for x in (q, k, v, out, lse, partial, *table[:5])]
    strides = [step for x in (q, k, v, out) for step in x.stride()[:3]]
    numbers = [len(table.pieces), len(table.splits), table.longest, table.together, table.apart, aligned, batch, heads, k.shape[1], q_len, head_dim]
    arrays = (ctypes.c_void_p * 11)(*pointers), (ctypes.c_int64 * 12)(*strides), (ctypes.c_int32 * 11)(*numbers)
    assert library.run(DTYPES.index(q.dtype), *arrays, ctypes.c_double(scale)) == 0
    return out, lse, table


def assert_right(library, q, k, v, pattern, scale=0.11):
    out, lse, table = forward(library, q, k, v, pattern, scale)
    group = q.shape[1] // k.shape[1]
    k_all, v_all = (x.double().repeat_interleave(group, 1) for x in (k, v))
    mask = pattern.mask(q.shape[2], k.shape[2], q.shape[1])
    scores = ((q.double() @ k_all.mT) * scale).masked_fill(~mask, -torch.inf)
    right, right_lse = torch.softmax(scores, -1).nan_to_num(0.0) @ v_all, scores.logsumexp(-1)
    atol = TOLERANCE[q.dtype] * float(right.abs().max())
    torch.testing.assert_close(out.double(), right, rtol=0, atol=atol)
    torch.testing.assert_close(lse.double(), right_lse, rtol=0, atol=max(1e-13, atol / 100) if q.dtype == torch.float64 else 1e-5)
    return table


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [40, 64, 128, 200])
def test_every_kernel(library, head_dim, dtype, monkeypatch):
    for short in (0, 1000):
        monkeypatch.setattr(cuda_rows, "SHORT", short)
        for heads, kv_heads in ((1, 1), (2, 1), (4, 1)):
            q, k, v = tensors(1, heads, kv_heads, 21, 60, head_dim, dtype)
            table = assert_right(library, q, k, v, csr(21, 60, density=0.15))
            assert table.apart == bool(short)
    assert table.together == cuda_rows.most_together(Sizes(1, 4, 1, 21, 60, head_dim, dtype, "cuda"))
    odd = [torch.cat([x, x[..., :3]], -1)[..., 1 : head_dim + 1] for x in tensors(1, 2, 2, 9, 31, head_dim, dtype)]
    assert_right(library, *odd, sa.LogSparse())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_rows_are_split_and_joined(library, dtype, monkeypatch):
    monkeypatch.setattr(cuda_rows, "SHORTEST", 9)
    for heads, kv_heads in ((2, 2), (4, 1)):
        q, k, v = tensors(2, heads, kv_heads, 40, 250, 64, dtype)
        table = assert_right(library, q, k, v, sa.LogSparse() | csr(40, 250, density=0.02) | sa.Longformer(2, 1))
        assert len(table.splits) and not table.apart


def test_lists_of_each_head_and_empty_rows(library):
    q, k, v = tensors(1, 8, 2, 60, 45, 64, torch.bfloat16)
    for pattern in (sa.Dilated(9, (1, 2, 3, 4, 4, 4, 2, 2)), sa.SlidingWindow(5), csr(60, 45)):
        assert_right(library, q, k, v, pattern)
    assert_right(library, q, k, v, sa.LogSparse(), scale=-0.3)
    assert_right(library, q, k, v, sa.LogSparse(), scale=0.0)


@pytest.mark.parametrize("short", [0, 1000])
def test_nan_where_nobody_looks(library, short, monkeypatch):
    monkeypatch.setattr(cuda_rows, "SHORT", short)
    pattern = csr(40, 90, density=0.1)
    q, k, v = tensors(1, 2, 2, 40, 90, 64, torch.float32)
    mask = pattern.mask(40, 90, 2)
    clean, clean_lse, _ = forward(library, q, k, v, pattern, 0.1)
    victim = int(mask[0].any(0).nonzero()[0])
    k[:, :, victim], v[:, :, victim] = torch.nan, torch.nan
    out, lse, _ = forward(library, q, k, v, pattern, 0.1)
    seen = mask[None, :, :, victim]
    assert torch.equal(out[~seen], clean[~seen]) and torch.equal(lse[~seen], clean_lse[~seen])
    assert out[seen].isnan().all() and lse[seen].isnan().all()
