"""Attention of a few new queries over a long cache: single-token, chunk and token-tree decoding."""

from __future__ import annotations

from torch import Tensor

from sparse_attention import _build, decode_cuda
from sparse_attention.decode_checks import check_block_table, check_lengths, check_sizes, check_tree, refuse_gradients
from sparse_attention.decode_reference import decode_reference
from sparse_attention.eagle.checks import IMPLS, check_choice, check_integer
from sparse_attention.validate import check_scale


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | int,
    *,
    parents: Tensor | None = None,
    ancestors: Tensor | None = None,
    window: int | None = None,
    sinks: int = 0,
    block_table: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last q_len positions of each request over its cache, which holds their keys and values already.

    q: `[batch, heads, q_len, head_dim]`. k_cache, v_cache: `[batch, kv_heads, capacity, head_dim]`, of which the first lengths[b] rows
    are request b's; or, with block_table, `[pages, kv_heads, page, head_dim]`, page a power of two from 16 to 256, where row r of
    request b is row r % page of page block_table[b, r // page]. float32, float64, bfloat16 or float16, head_dim a multiple of 8 up to
    256, kv_heads a divisor of heads; any strides with a contiguous last dimension, read where they lie. Rows at or past lengths[b] are
    never looked at. block_table: `[batch, most pages of a request]` int32 or int64.

    lengths: `[batch]` int64 or one number, the keys of each request, the q_len new ones included. New query i has row
    lengths[b] - q_len + i; one whose row would be negative gives 0, so a shorter request stands at the end of the chunk, and an idle
    one has length 0.

    The first lengths[b] - q_len keys are the prefix, which every query sees. Of the new keys query i sees those up to its own, or, in a
    tree of up to 1,024 nodes, its ancestors and itself. The tree is given as parents, `[q_len]` or `[batch, q_len]` int64 with -1 for a
    root and -2 for no node; or as ancestors, `[batch or 1, q_len, ceil(q_len / 64)]` int64, bit j % 64 of word j // 64 of row i: node i
    sees node j (`eagle.tree_mask(parents, "bits")`); a row of zeros is no node and gives 0.

    window: only keys of the last `window` positions, the query's own included, and those of the first `sinks` positions. A node stands at
    position prefix + depth, where depth is the number of its ancestors; a new query without a tree at its row.

    impl: "native" is the compiled engine of the device, "reference" plain PyTorch, "auto" the engine where there is one.

    Returns out, like q; with ``return_lse=True`` also the log-sum-exp of each query's scores, `[batch, heads, q_len]`, float32 (float64
    for float64), -inf where out is 0 because nothing is seen.

    Raises ValueError for inputs that do not fit, and for those that need a gradient: use `attention`. Lengths and pages out of range
    are errors on the CPU; on CUDA, where looking would wait for the device, such a request counts as idle and such a page as unseen.
    After Flash-Decoding (Dao et al. 2023) and SpecInfer's tree attention (Miao et al. 2023).
    """
    if parents is None and impl == "auto" and type(q) is Tensor:
        native = decode_cuda.modules.get(q.get_device())
        found = native and native.decode_plain(q, k_cache, v_cache, lengths, ancestors, window, sinks, block_table, scale, return_lse)
        if found is not None:
            return found
    capacity = check_sizes(q, k_cache, v_cache, block_table)
    refuse_gradients(q, k_cache, v_cache)
    check_choice("impl", impl, IMPLS)
    lengths = check_lengths(lengths, q, capacity)
    if block_table is not None:
        block_table = check_block_table(block_table, lengths, k_cache)
    words = check_tree(parents, ancestors, q)
    window = -1 if window is None else check_integer("window", window, 1)
    sinks = check_integer("sinks", sinks, 0)
    scale = q.shape[3] ** -0.5 if scale is None else check_scale(scale)
    run = _engine(q, k_cache, v_cache, impl)
    out, lse = run(q, k_cache, v_cache, lengths, words, window, sinks, block_table, scale)
    return (out, lse) if return_lse else out


def _engine(q: Tensor, k_cache: Tensor, v_cache: Tensor, impl: str):
    """The compiled engine of q's device where it takes the call, or the reference."""
    if impl == "reference":
        return decode_reference
    if q.shape[3] % 8 or not 8 <= q.shape[3] <= 256:
        obstacle = f"q has head_dim {q.shape[3]}, no multiple of 8 up to 256"
    elif q.device.type == "cpu":
        return _build.kernels().decode_forward
    elif q.device.type == "cuda":
        obstacle = decode_cuda.obstacle(q, k_cache, v_cache)
        if obstacle is None:
            return decode_cuda.forward
    else:
        obstacle = f"q is on {q.device}"
    if impl == "native":
        raise ValueError(f"impl is 'native', but {obstacle}; use impl='reference'")
    return decode_reference
