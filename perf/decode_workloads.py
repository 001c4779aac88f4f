"""Builders of the decode cases: a tree's nodes, or one token, over a cache, against SDPA with the mask that says the same."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from perf.workloads import _no_grad, _require_kernels
from sparse_attention import decode, eagle
from sparse_attention.breakeven import Workload
from sparse_attention.decode_reference import decode_reference, visible


def tree(nodes: int, prefix: int, dtype: str, heads: int = 32, kv_heads: int = 8, head_dim: int = 128) -> Workload:
    """A random tree of `nodes` after `prefix` tokens; one node is a token's decoding. Ancestor words and masks are made beforehand."""
    _require_kernels()
    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    parents = torch.tensor([[-1, *(int(torch.randint(0, n, (), generator=generator)) for n in range(1, nodes))]])
    words = eagle.tree_mask(parents, "bits")
    shapes = [(1, heads, nodes, head_dim)] + 2 * [(1, kv_heads, prefix + nodes, head_dim)]
    q, k, v = (torch.randn(shape, generator=generator).to(kind) for shape in shapes)
    lengths = torch.tensor([prefix + nodes])
    seen = visible(lengths, nodes, prefix + nodes, words, -1, 0)[0]
    masks = {"mask": seen, "bias": torch.zeros(seen.shape, dtype=kind).masked_fill(~seen, -torch.inf)} if nodes > 1 else {"": None}

    def grouped(mask):
        return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    def repeated():
        k_all, v_all = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k_all, v_all, attn_mask=next(iter(masks.values())))

    rivals = {f"sdpa {name}".strip(): grouped(mask) for name, mask in masks.items()}

    def check(out):
        want, _ = decode_reference(q.double(), k.double(), v.double(), lengths, words, -1, 0, None, head_dim**-0.5)
        tolerance = 1e-5 if kind == torch.float32 else 2e-2
        torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=tolerance)

    return Workload(
        candidate=_no_grad(lambda: decode(q, k, v, lengths, ancestors=words)),
        baselines={name: _no_grad(call) for name, call in {**rivals, "sdpa, heads repeated": repeated}.items()},
        check=check,
        inputs=(q, k, v),
    )
