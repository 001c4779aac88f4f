"""Decoding calls of more blocks than a grid holds are refused by name, on every way to the kernels; attention takes another engine."""

from __future__ import annotations

import ctypes
import subprocess

import pytest
import torch

import sparse_attention as sa
from sparse_attention import decode_cuda, dispatch
from sparse_attention._build import compiler, source_folder
from sparse_attention.decode import decode
from sparse_attention.dispatch import Sizes

SOURCE = """
#include "decode/plan.h"
using namespace sparse_attention;
extern "C" int64_t most() { return kMostBlocks; }
extern "C" int64_t row_blocks(int heads, int kv_heads, int q_len, int head_dim, int kernel, int itemsize) {
  Decode d{};
  d.batch = 1, d.heads = heads, d.kv_heads = kv_heads, d.q_len = q_len, d.head_dim = head_dim;
  return row_blocks(d, static_cast<DecodeKernel>(kernel), itemsize);
}
// Of a tree after a prefix on an H100: 32 heads over 8 of 128.
extern "C" void plan_tree(int nodes, int64_t keys, int32_t* found) {
  Decode d{};
  d.batch = 1, d.heads = 32, d.kv_heads = 8, d.group = 4, d.q_len = nodes, d.head_dim = 128, d.window = -1, d.length = keys;
  const DecodeDevice device{132, true, true};
  const DecodeKernel kernel = choose_kernel(d, 2, device);
  split_keys(d, kernel, 2, device);
  found[0] = static_cast<int32_t>(kernel), found[1] = d.splits, found[2] = d.cluster;
}
// The kernel, splits and blocks of a cluster of test_cuda_decode.py's call with one number of keys for all.
extern "C" void plan(int64_t keys, int itemsize, int processors, bool clusters, bool warpgroups, int32_t* found) {
  Decode d{};
  d.batch = 2, d.heads = 8, d.kv_heads = 2, d.group = 4, d.q_len = 5, d.head_dim = 128, d.window = -1, d.length = keys;
  const DecodeDevice device{processors, clusters, warpgroups};
  const DecodeKernel kernel = choose_kernel(d, itemsize, device);
  split_keys(d, kernel, itemsize, device);
  found[0] = static_cast<int32_t>(kernel), found[1] = d.splits, found[2] = d.cluster;
}
"""


@pytest.fixture(scope="module")
def limits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("limits")
    (folder / "limits.cpp").write_text(SOURCE)
    target = str(folder / "limits.so")
    command = [*compiler(), "-std=c++20", "-shared", "-fPIC", f"-I{source_folder() / 'cuda'}", str(folder / "limits.cpp"), "-o", target]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(target)
    library.row_blocks.restype = library.most.restype = ctypes.c_int64
    return library


def test_the_blocks_of_a_call(limits):
    assert limits.most() == decode_cuda.MOST_BLOCKS
    for kernel, rows in ((0, 16), (1, 64), (2, 64), (3, 128), (4, 64)):
        assert limits.row_blocks(32, 8, 4 * rows, 128, kernel, 2) == 8 * 16
        assert limits.row_blocks(32, 8, 4 * rows + 1, 64, kernel, 2) == 8 * 17
    assert limits.row_blocks(1, 1, 64, 256, 1, 4) == 2
    assert limits.row_blocks(2, 2, 1 << 30, 64, 2, 2) == 1 << 25, "more than 32 bits of rows"


@pytest.mark.parametrize("device", ((132, True, True), (108, False, False), (148, True, False)), ids=("H100", "A100", "B200"))
@pytest.mark.parametrize("itemsize", (2, 4))
def test_where_a_number_of_keys_splits_as_the_capacity_does(limits, itemsize, device):
    def plan(keys):
        found = (ctypes.c_int32 * 3)()
        limits.plan(ctypes.c_int64(keys), itemsize, *device, found)
        return list(found)

    assert plan(900)[1] > 1
    assert plan(400) != plan(900) == plan(899)


def test_attention_leaves_such_calls_to_other_engines(monkeypatch):
    monkeypatch.setattr(decode_cuda, "device_obstacle", lambda capability: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))

    def decodes(batch, heads, q_len=1):
        return dispatch._decoding(sa.Causal(), Sizes(batch, heads, heads, q_len, 4096, 64, torch.bfloat16, "cuda")) is not None

    assert decodes(65535, 8) and not decodes(65536, 8)
    assert decodes(1, 8, 64) and not decodes(1, 65535, 64)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_they_are_refused():
    def tensors(batch, heads, q_len):
        q = torch.zeros(batch, heads, q_len, 8, device="cuda", dtype=torch.bfloat16)
        return q, q[:, :1, :1], q[:, :1, :1]

    for given in ({}, {"impl": "native"}, {"lengths": torch.ones(65536, dtype=torch.int64, device="cuda")}):
        with pytest.raises(ValueError, match=r"q has shape \[65536, 1, 1, 8\], a batch of 65536; expected at most 65535"):
            decode(*tensors(65536, 1, 1), **{"lengths": 1, **given})
    decode(*tensors(65535, 1, 1), 1)
    decode(*tensors(1, 1, 1), 1)  # the module is there, so the next call takes the short way
    for given in ({}, {"impl": "native"}):
        with pytest.raises(ValueError, match=r"q has shape \[1, 8, 1100000, 8\] over 1 heads of keys, .* tiles .* expected at most 65535"):
            decode(*tensors(1, 8, 1_100_000), 1, **given)


@pytest.mark.parametrize(
    "nodes, prefix, splits",
    ((26, 200, 1), (26, 500, 2), (26, 1024, 4), (26, 2048, 6), (26, 3500, 8), (16, 2048, 8), (64, 2048, 7), (64, 3500, 7), (200, 0, 1)),
)
def test_small_trees_share_their_keys_in_one_cluster_of_as_many_as_was_quickest(limits, nodes, prefix, splits):
    found = (ctypes.c_int32 * 3)()
    limits.plan_tree(nodes, ctypes.c_int64(prefix + nodes), found)
    assert list(found) == [4, splits, splits]
