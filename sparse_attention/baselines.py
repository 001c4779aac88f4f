"""What a user would run instead: every way that PyTorch offers, as callables over tensors that exist already.

q, k, v: [batch, heads, seq, head_dim] as for `attention`; k and v may have fewer heads.
"""

from __future__ import annotations

import functools
import importlib
import os
import types
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_attention import cuda_blocks
from sparse_attention.patterns import Dense, Lengths, Pattern
from sparse_attention.rows import rows

Call = Callable[[], torch.Tensor]

COMPILED = "sdpa compiled"
COMPILED_FLAG = "SPARSE_ATTENTION_COMPILED_BASELINE"  # environment variable: 1 makes it a rival on CPU too, seconds a shape
FLASH_ATTN = {"flash-attn 2": "flash_attn", "flash-attn 3": "flash_attn_interface", "flash-attn 4": "flash_attn.cute"}  # modules
FLEX_BLOCK = 128  # queries and keys of a block of FlexAttention's mask
FLEX_MOST = 2**31 - 1  # elements of a tensor that 32-bit indices reach: with 64 bits Triton refuses its decoding kernel (torch 2.11)
MATH_BYTES = 1 << 26  # the math backend writes all scores: it is a rival only while they fit the caches


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, mask: torch.Tensor | None = None,
    around: Callable[[Call], Call] = lambda call: call,
) -> dict[str, Call]:  # fmt: skip
    """SDPA in each way that might be the fastest; the first is what a plain call gives. `mask` instead of `causal`.

    around: makes of SDPA's call what is timed, such as many in a row; not of the compiled one's. A backend is chosen once around that.
    Compiled too on CUDA. On CPU only under COMPILED_FLAG: it calls the same kernel there after its guards.
    """
    grouped = q.shape[1] != k.shape[1]

    def sdpa():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)

    ways = {"sdpa": around(sdpa)}
    if grouped:
        group = q.shape[1] // k.shape[1]

        def repeated():
            k_all, v_all = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            return F.scaled_dot_product_attention(q, k_all, v_all, attn_mask=mask, is_causal=causal)

        ways["sdpa, heads repeated"] = around(repeated)
    for backend in _further_backends(q, k):
        ways[f"sdpa {backend.name.lower()}"] = _on(backend, around(sdpa))
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and mask is None and (q.shape[2] == k.shape[2] or not causal):
        ways |= {name: around(call) for name, call in flash_attn(q, k, v, causal=causal).items()}
    if q.is_cuda or (os.environ.get(COMPILED_FLAG) == "1" and not q.requires_grad):
        compiled = functools.cache(lambda: torch.compile(sdpa, dynamic=False))  # seconds, so not before it is called
        ways[COMPILED] = lambda: compiled()()
    return ways


def flash_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> dict[str, Call]:
    """FlashAttention's own packages, those that can be imported: `is_causal` from the last query on."""
    found = {}
    for name, module in FLASH_ATTN.items():
        try:
            function = importlib.import_module(module).flash_attn_func
        except Exception:  # whatever a package built for another torch raises
            continue
        found[name] = functools.partial(_flash_attn, function, q, k, v, causal)
    return found


def _flash_attn(function: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    out = function(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def prepare(ways: Mapping[str, Call]) -> Callable[[str], None]:
    """For `Workload.prepare`: compiles the compiled one, which happens in its first call."""
    return lambda name: ways[name]() if name == COMPILED else None


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern) -> Call:
    """SDPA with the pattern as a boolean mask, which is made once; [heads, q_len, kv_len] bytes."""
    mask = pattern.mask(q.shape[2], k.shape[2], q.shape[1]).to(q.device)
    return dense(q, k, v, causal=False, mask=mask)["sdpa"]


def flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, most: int = FLEX_MOST) -> Call:
    """FlexAttention, compiled, with a block mask that is made once. Patterns whose heads differ must be made of blocks.

    Tensors of more than `most` elements are given to it in views of `flex_requests` requests, whose outputs are concatenated.
    """
    from torch.nn.attention.flex_attention import flex_attention

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

    block_mask = flex_mask(mask_mod, 1 if alike else heads, lengths, q.device)
    grouped = q.shape[1] != k.shape[1]

    def attend(q, k, v, block_mask):
        return flex_attention(q, k, v, block_mask=block_mask, enable_gqa=grouped)

    # Recompilations are counted by code object, and past a limit it would run uncompiled: each call of this function has its own.
    own = types.FunctionType(attend.__code__.replace(), globals(), "attend", None, attend.__closure__)
    compiled = torch.compile(own, dynamic=False, fullgraph=True)
    parts = list(zip(*(x.split(flex_requests(q, k, v, most=most)) for x in (q, k, v))))  # of one shape: compiled once

    def call():
        with torch.no_grad():  # on CPU it has no backward
            outs = [compiled(*part, block_mask) for part in parts]
            return outs[0] if len(outs) == 1 else torch.cat(outs)

    call()
    return call


def flex_requests(*tensors: torch.Tensor, most: int = FLEX_MOST) -> int:
    """Requests that a call of FlexAttention is given: the most that divide the batch and lie within `most` elements of each tensor."""
    batch = tensors[0].shape[0]

    def fits(x: torch.Tensor, requests: int) -> bool:
        return sum((n - 1) * stride for n, stride in zip((requests, *x.shape[1:]), x.stride())) < most

    return max(n for n in range(1, batch + 1) if batch % n == 0 and (n == 1 or all(fits(x, n) for x in tensors)))


def flex_mask(mask_mod: Callable, heads: int, lengths: Lengths, device: torch.device, most: int = 1 << 28):
    """What `create_block_mask` returns, made of at most about `most` pairs at a time: that one writes the mask of all pairs, 16 GiB at
    128K, unless it is compiled, which takes seconds for each mask.
    """
    from torch.nn.attention.flex_attention import BlockMask

    q_blocks, kv_blocks = (-(-length // FLEX_BLOCK) for length in lengths)
    visited, full = (torch.empty(heads, q_blocks, kv_blocks, dtype=torch.bool, device=device) for _ in range(2))
    step = max(1, most // (lengths.kv_len * FLEX_BLOCK))
    j = torch.arange(lengths.kv_len, device=device)[None]
    for head in range(heads):
        for first in range(0, q_blocks, step):
            i = torch.arange(first * FLEX_BLOCK, min((first + step) * FLEX_BLOCK, lengths.q_len), device=device)[:, None]
            seen = mask_mod(i.new_zeros(()), i.new_full((), head), i, j).expand(len(i), lengths.kv_len)
            seen = F.pad(seen, (0, -lengths.kv_len % FLEX_BLOCK, 0, -len(i) % FLEX_BLOCK))
            seen = seen.unflatten(1, (kv_blocks, FLEX_BLOCK)).unflatten(0, (-1, FLEX_BLOCK))
            visited[head, first : first + step] = seen.any(3).any(1)
            full[head, first : first + step] = seen.all(3).all(1)
    partly, full = ((x.sum(-1, dtype=torch.int32)[None], _in_order(x)[None]) for x in (visited & ~full, full))
    return BlockMask.from_kv_blocks(*partly, *full, BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask_mod, seq_lengths=tuple(lengths))


def _in_order(blocks: torch.Tensor) -> torch.Tensor:
    """Of each row the columns that are set, ascending, then the others."""
    return blocks.int().argsort(dim=-1, descending=True, stable=True).int().contiguous()


def torch_sparse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern) -> Call:
    """`torch.sparse`: sampled product, softmax over the listed pairs, product. Head by head, float32, batch 1, no groups."""
    if q.shape[0] != 1 or q.shape[1] != k.shape[1]:
        raise ValueError(f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}; expected batch 1 and equal heads")
    zeros = _zeros(q, k, pattern)
    scale = q.shape[3] ** -0.5

    def one(head: int) -> torch.Tensor:
        scores = torch.sparse.sampled_addmm(zeros[head], q[0, head], k[0, head].T, beta=0.0, alpha=scale)
        weights = torch.sparse.softmax(scores.to_sparse_coo(), dim=1)
        return torch.sparse.mm(weights, v[0, head])

    return lambda: torch.stack([one(head) for head in range(q.shape[1])])[None]


def _zeros(q: torch.Tensor, k: torch.Tensor, pattern: Pattern) -> list[torch.Tensor]:
    """The allowed pairs of each head as a CSR tensor of zeros; heads that are alike share one."""
    listed = rows(pattern, q.shape[2], k.shape[2], q.shape[1])
    found = []
    for variant in range(int(listed.head_variant.max()) + 1):
        start = listed.row_start[variant * q.shape[2] : (variant + 1) * q.shape[2] + 1]
        columns = listed.columns[start[0] : start[-1]].long()
        values = torch.zeros(len(columns), dtype=q.dtype)
        found.append(torch.sparse_csr_tensor(start - start[0], columns, values, (q.shape[2], k.shape[2]), check_invariants=False).to(q.device))
    return [found[variant] for variant in listed.head_variant.tolist()]


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
