"""The forms of a tree's attention mask, and `tree_mask`, which makes one from parents in any of four ways."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_attention.eagle import ancestors
from sparse_attention.eagle.checks import FLOATS, INT64, at, check_choice, check_out, check_tensor, first, short, wants_check
from sparse_attention.eagle.native import engine
from sparse_attention.eagle.outputs import MASK_FORMS, empty_mask, mask_layout
from sparse_attention.eagle.profile import Profile, section

TREE_IMPLS = ("auto", "native", "reference", "incremental", "rebuild")


def tree_mask(
    parents: Tensor,
    form: str = "bool",
    *,
    dtype: torch.dtype = torch.float32,
    prefix_lens: Sequence[int] | Tensor | None = None,
    impl: str = "auto",
    check: bool | None = None,
    profile: Profile | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The mask of trees: node n sees its ancestors and itself.

    parents: [B, N] int64, N up to 1,024 for the native kernels on CUDA; the parent of each node, which is a lower index, or -1 for a
    root. form, and what comes back:

    * "bool": [B, N, N] bool
    * "float": [B, 1, N, N] float32, 1 and 0, what EAGLE calls tree_mask
    * "additive": [B, 1, N, N] of `dtype`, 0 where it sees and the lowest finite number elsewhere
    * "bits": [B, N, ceil(N / 64)] int64, bit c % 64 of word c // 64; "bits32": [B, N, ceil(N / 32)] int32
    * "full": one flat bool tensor; request after request, N rows of prefix_lens[b] + N keys, the prefix all True (SGLang's FULL_MASK).
      prefix_lens: [B], a sequence or tensor. One on CUDA also needs `out`, for its size is not known without a wait; what does not fit
      is not written.

    impl: "native" is the fused kernel; "incremental" goes level by level, waiting for the device at each; "rebuild" is EAGLE's loop
    over rows on the host; "reference" doubles the distance at each step; "auto" is native where the device has it, else reference.
    A parent that is not a lower index is a ValueError; with check=False (the default on CUDA) its node counts as a root. profile:
    takes the times of the sections. out: a contiguous tensor of the form's shape and dtype.
    """
    check_tensor("parents", parents, (None, None), INT64)
    check_choice("form", form, MASK_FORMS[:-1])
    check_choice("impl", impl, TREE_IMPLS)
    batch, nodes = parents.shape
    native = engine("tree_mask", parents.device, impl) if impl in ("auto", "native") else None
    checked = wants_check(check, parents.device)
    if checked and (native is None or parents.device.type != "cpu"):
        refuse_parents(parents, forest=True)
    with section(profile, "total", parents.device):
        with section(profile, "preallocation", parents.device):
            prefix = check_prefix(prefix_lens, form, batch, parents.device)
            out = prepare_mask(out, form, dtype, prefix, batch, nodes, parents.device)
        if native is None:
            render(sees(valid_parents(parents), impl, profile), form, prefix, out)
        else:
            with section(profile, "mask", parents.device):
                if native(parents.contiguous(), out, MASK_FORMS.index(form), prefix) and checked:
                    refuse_parents(parents, forest=True)
    return out


def sees(parents: Tensor, impl: str, profile: Profile | None) -> Tensor:
    """[B, N, N] bool of well-formed parents, by the PyTorch way that `impl` names."""
    if impl == "rebuild":
        return ancestors.rebuild(parents, profile)
    with section(profile, "mask", parents.device):
        return ancestors.incremental(parents) if impl == "incremental" else ancestors.doubling(parents)


def render(visible: Tensor, form: str, prefix: Tensor | None, out: Tensor | None) -> None:
    """Writes visible [B, N, N] bool to `out` in a form."""
    batch, nodes, _ = visible.shape
    if form == "bool":
        out.copy_(visible)
    elif form == "float":
        out.copy_(visible[:, None])
    elif form == "additive":
        out.fill_(torch.finfo(out.dtype).min).masked_fill_(visible[:, None], 0)
    elif form in ("bits", "bits32"):
        width = 64 if form == "bits" else 32
        padded = torch.zeros(batch, nodes, out.shape[2] * width, dtype=torch.int64, device=visible.device)
        padded[:, :, :nodes] = visible
        words = (padded.view(batch, nodes, -1, width) << torch.arange(width, device=visible.device)).sum(3)
        out.copy_(words if form == "bits" else torch.where(words >= 2**31, words - 2**32, words))
    elif form == "full":
        start = 0
        for b, length in enumerate(prefix.tolist()):
            rows = torch.nn.functional.pad(visible[b], (max(length, 0), 0), value=True).flatten()
            room = max(0, min(rows.numel(), out.numel() - start))
            out[start : start + room] = rows[:room]
            start += rows.numel()


def valid_parents(parents: Tensor) -> Tensor:
    """parents with -1 where they are no lower index."""
    index = torch.arange(parents.shape[1], device=parents.device)
    return torch.where((parents < 0) | (parents >= index), -1, parents)


def refuse_parents(parents: Tensor, forest: bool) -> None:
    """ValueError unless every parent is a lower index, or -1: anywhere in a forest, else at node 0 only and always there."""
    index = torch.arange(parents.shape[1], device=parents.device)
    bad = (parents >= index) | (parents < -1)
    if not forest:
        bad |= (parents == -1) & (index > 0)
    found = first(bad)
    if found is not None:
        node = found[1]
        lowest = -1 if forest else 0
        wanted = f"a node from {lowest} to {node - 1}: parents precede their children" if node else "-1: node 0 is the root"
        raise ValueError(f"{at('parents', found)} is {int(parents[found])}; expected {wanted}")


def check_prefix(prefix_lens: Sequence[int] | Tensor | None, form: str, batch: int, device: torch.device) -> Tensor | None:
    """prefix_lens as [B] int64, where it is or on the CPU; None for a form that needs none."""
    if form != "full":
        return None
    if prefix_lens is None:
        raise ValueError(f"prefix_lens is None; expected {batch} lengths for a 'full' mask")
    if not isinstance(prefix_lens, Tensor):
        prefix_lens = torch.tensor(list(prefix_lens), dtype=torch.int64)
    placed = prefix_lens.device in (device, torch.device("cpu"))
    if tuple(prefix_lens.shape) != (batch,) or prefix_lens.dtype != torch.int64 or not placed:
        given = f"{short(prefix_lens)} on {prefix_lens.device}"
        raise ValueError(f"prefix_lens is {given}; expected {batch} int64 lengths on {device} or the CPU")
    if prefix_lens.device.type == "cpu" and int(prefix_lens.min()) < 0:
        raise ValueError(f"prefix_lens is {prefix_lens.tolist()}; expected lengths of at least 0")
    return prefix_lens


def prepare_mask(
    out: Tensor | None, form: str, dtype: torch.dtype, prefix: Tensor | None, batch: int, nodes: int, device: torch.device
) -> Tensor | None:
    """`out`, checked, or a new tensor for the mask. `prefix` is what `check_prefix` gave."""
    if form == "additive" and dtype not in FLOATS:
        raise ValueError(f"mask dtype is {dtype}; expected {', '.join(map(str, FLOATS))}")
    if form == "none":
        return None
    if form == "full":
        size = None if prefix.device.type != "cpu" else int((prefix + nodes).sum()) * nodes
        if out is None and size is None:
            raise ValueError("prefix_lens is on CUDA and no tensor for the mask is given in out; expected one of N * (prefix + N), summed")
        if out is not None:
            check_out("the full mask of out", out, (out.numel(),), device, torch.bool)
            if size is not None and out.numel() < size:
                raise ValueError(f"the full mask of out has {out.numel()} elements; expected at least {size}")
            return out
        return empty_mask(batch, nodes, form, dtype, size, device)
    if out is None:
        return empty_mask(batch, nodes, form, dtype, 0, device)
    shape, expected = mask_layout(batch, nodes, form, out.dtype, 0)
    if form == "additive" and out.dtype not in FLOATS:
        raise ValueError(f"the mask of out has dtype {out.dtype}; expected {', '.join(map(str, FLOATS))}")
    check_out("the mask of out", out, shape, device, expected)
    return out
