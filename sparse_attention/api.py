"""What users call."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attention import dispatch
from sparse_attention.engines import engine, quick
from sparse_attention.handle import handle
from sparse_attention.ops import Attention, attention_op
from sparse_attention.patterns.base import Pattern
from sparse_attention.validate import check_call, check_names, check_scale, check_strides, check_tensors

_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    scale: float | None = None,
    impl: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q @ k^T over the pairs that `pattern` allows) @ v, exactly.

    q: `[batch, heads, q_len, head_dim]`; k, v: `[batch, kv_heads, kv_len, head_dim]`, where kv_heads divides heads. float32,
    float64, bfloat16 or float16, all of one dtype and device, any strides with a contiguous last dimension. The last query
    stands at the position of the last key. scale: 1 / sqrt(head_dim) if None.

    impl: "auto" runs whichever engine should be fastest, see `explain`; "tile" and "gather" are the sparse engines (head_dim a
    multiple of 8 up to 256; "tile" on CUDA takes bfloat16 and float16), "dense" is scaled_dot_product_attention, "reference" plain
    matrix products. A named impl runs or raises.

    Returns out, like q; with ``return_lse=True`` also the log-sum-exp of each query's scores, `[batch, heads, q_len]`, natural
    logarithm, float32 (float64 for float64). A query that may attend to nothing gives 0 and -inf. Both are differentiable, once.

    Under autocast, float32, bfloat16 and float16 inputs are cast to autocast's dtype first, as SDPA does.

    Raises ValueError for inputs that do not fit, BuildError when the sparse engines cannot be compiled here.
    """
    if torch.compiler.is_compiling():
        return _traced(q, k, v, pattern, scale, impl, return_lse)
    known = quick(pattern)
    if known is not None and scale is None and not return_lse:
        out = known.run(q, k, v, impl)
        if out is not None:
            return out
    if not _plain(q, k, v):
        return _traced(q, k, v, pattern, scale, impl, return_lse)
    if torch._C._is_any_autocast_enabled():
        q, k, v = _autocast(q, k, v)
    try:
        call = engine(q, k, v, pattern, impl)
    except TypeError:
        check_names(pattern, impl)  # not hashable
        raise
    scale = call.scale if scale is None else check_scale(scale)
    if q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1:
        check_strides(q, k, v)
    if call.attend is not None and not return_lse:
        return call.attend(q, k, v, scale)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out, lse = Attention.apply(q, k, v, call, scale)
    else:
        out, lse = call.forward(q, k, v, scale)
    return (out, lse) if return_lse else out


def _plain(q, k, v) -> bool:
    """Whether these are tensors that nothing watches: no subclass, no mode, no torch.func transform."""
    if type(q) in _PLAIN and type(k) in _PLAIN and type(v) in _PLAIN:
        return not (
            torch._C._len_torch_dispatch_stack()
            or torch._C._is_torch_function_mode_enabled()
            or torch._C._functorch.peek_interpreter_stack() is not None
        )
    check_tensors(q, k, v)
    return False


def _traced(q, k, v, pattern, scale, impl, return_lse):
    check_names(pattern, impl)
    if scale is not None and not isinstance(scale, torch.SymFloat):
        scale = check_scale(scale)
    q, k, v = _autocast(q, k, v)
    out, lse = attention_op(q, k, v, handle(pattern), scale, impl)
    return (out, lse) if return_lse else out


def _autocast(*tensors):
    device = tensors[0].device.type
    # The first two have it; asking is what torch.compile of torch 2.11 cannot trace.
    if device not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device):
        return tensors
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors]


def plan(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, *, impl: str = "auto") -> dispatch.Plan:
    """How `attention` would run these inputs: the engine, the reason, and the tables it reads. Errors as for `attention`."""
    check_tensors(q, k, v)
    check_call(q, k, v, pattern, impl)
    check_strides(q, k, v)
    return dispatch.plan(pattern.frozen(), dispatch.Sizes.of(q, k), impl)


def explain(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, *, impl: str = "auto") -> str:
    """`plan` in words: engine, why, tiles visited, full and partial, FLOPs, bytes, and the expected speedup over dense."""
    return str(plan(q, k, v, pattern, impl=impl))
