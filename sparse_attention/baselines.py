"""What a user would run instead: every way that PyTorch offers, as callables over tensors that exist already.

q, k, v: [batch, heads, seq, head_dim] as for `attention`; k and v may have fewer heads.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_attention import cuda_blocks
from sparse_attention.patterns import Dense, Lengths, Pattern

Call = Callable[[], torch.Tensor]

COMPILED = "sdpa compiled"
COMPILED_FLAG = "SPARSE_ATTENTION_COMPILED_BASELINE"  # environment variable: 1 makes it a rival on CPU too, seconds a shape
MATH_BYTES = 1 << 26  # the math backend writes all scores: it is a rival only while they fit the caches


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, mask: torch.Tensor | None = None) -> dict[str, Call]:
    """SDPA in each way that might be the fastest; the first is what a plain call gives. `mask` instead of `causal`.

    Compiled too on CUDA. On CPU only under COMPILED_FLAG: it calls the same kernel there after its guards.
    """
    grouped = q.shape[1] != k.shape[1]

    def sdpa():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)

    ways = {"sdpa": sdpa}
    if grouped:
        group = q.shape[1] // k.shape[1]

        def repeated():
            k_all, v_all = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            return F.scaled_dot_product_attention(q, k_all, v_all, attn_mask=mask, is_causal=causal)

        ways["sdpa, heads repeated"] = repeated
    for backend in _further_backends(q, k):
        ways[f"sdpa {backend.name.lower()}"] = _on(backend, sdpa)
    if q.is_cuda or (os.environ.get(COMPILED_FLAG) == "1" and not q.requires_grad):
        compiled = functools.cache(lambda: torch.compile(sdpa, dynamic=False))  # seconds, so not before it is called
        ways[COMPILED] = lambda: compiled()()
    return ways


def prepare(ways: Mapping[str, Call]) -> Callable[[str], None]:
    """For `Workload.prepare`: compiles the compiled one, which happens in its first call."""
    return lambda name: ways[name]() if name == COMPILED else None


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern) -> Call:
    """SDPA with the pattern as a boolean mask, which is made once; [heads, q_len, kv_len] bytes."""
    mask = pattern.mask(q.shape[2], k.shape[2], q.shape[1]).to(q.device)
    return dense(q, k, v, causal=False, mask=mask)["sdpa"]


def flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern) -> Call:
    """FlexAttention, compiled, with a block mask that is made once. Patterns whose heads differ must be made of blocks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths, heads, one = Lengths(q.shape[2], k.shape[2]), q.shape[1], pattern.for_head(0)
    alike = all(pattern.for_head(head) == one for head in range(heads))
    blocks = None if alike else cuda_blocks.split(pattern, *lengths, heads)
    if not alike and blocks is None:
        raise ValueError(f"pattern is {pattern!r}, whose heads differ; expected one for all heads, or of blocks of 64 or 128")
    table = None if alike else cuda_blocks.mask_of(blocks.blocked, *lengths, heads, q.device)

    def mask_mod(batch, head, i, j):
        if alike:
            return one.allows(i + lengths.offset, j, lengths)
        seen = table[head, i // blocks.blocked.block, j // blocks.blocked.block]
        return seen if isinstance(blocks.base, Dense) else seen & blocks.base.allows(i + lengths.offset, j, lengths)

    # Compiled, it does not write the whole mask, 16 GiB at 128K; on CPU compiling takes longer than that.
    make = torch.compile(create_block_mask) if q.is_cuda else create_block_mask
    block_mask = make(mask_mod, None, None if alike else heads, *lengths, device=q.device.type)
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = q.shape[1] != k.shape[1]

    def call():
        with torch.no_grad():  # on CPU it has no backward
            return compiled(q, k, v, block_mask=block_mask, enable_gqa=grouped)

    call()
    return call


def torch_sparse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern) -> Call:
    """`torch.sparse`: sampled product, softmax over the listed pairs, product. Head by head, float32, batch 1, no groups."""
    if q.shape[0] != 1 or q.shape[1] != k.shape[1]:
        raise ValueError(f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}; expected batch 1 and equal heads")
    masks = pattern.mask(q.shape[2], k.shape[2], q.shape[1])
    zeros = [mask.to(q.dtype).to_sparse_csr() for mask in masks]
    scale = q.shape[3] ** -0.5

    def one(head: int) -> torch.Tensor:
        scores = torch.sparse.sampled_addmm(zeros[head], q[0, head], k[0, head].T, beta=0.0, alpha=scale)
        weights = torch.sparse.softmax(scores.to_sparse_coo(), dim=1)
        return torch.sparse.mm(weights, v[0, head])

    return lambda: torch.stack([one(head) for head in range(q.shape[1])])[None]


def _further_backends(q: torch.Tensor, k: torch.Tensor) -> list[SDPBackend]:
    if q.device.type == "cuda":
        return [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    scores_bytes = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.element_size()
    return [SDPBackend.MATH] if scores_bytes <= MATH_BYTES else []


def _on(backend: SDPBackend, call: Call) -> Call:
    def run():
        with sdpa_kernel(backend):
            return call()

    return run
