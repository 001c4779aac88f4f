"""From drafted candidates to a tree: select, resolve the parents, and everything that verification reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_attention.eagle import paths
from sparse_attention.eagle.checks import FLOATS, INT64, check_choice, check_integer, check_out, check_tensor, wants_check
from sparse_attention.eagle.malformed import refuse_depth, refuse_selection
from sparse_attention.eagle.mask import TREE_IMPLS, check_prefix, prepare_mask, refuse_parents, render, sees, valid_parents
from sparse_attention.eagle.native import engine
from sparse_attention.eagle.outputs import MASK_FORMS, ROW_ORDERS, DraftTree, empty_tree
from sparse_attention.eagle.profile import Profile, section
from sparse_attention.eagle.select import refuse_nan, select_reference


def build_tree(
    scores: Tensor,
    tokens: Tensor,
    parents: Tensor,
    total_tokens: int,
    root_tokens: Tensor,
    *,
    mask: str = "bool",
    mask_dtype: torch.dtype = torch.float32,
    prefix_lens: Sequence[int] | Tensor | None = None,
    row_order: str = "leaf",
    max_depth: int | None = None,
    impl: str = "auto",
    check: bool | None = None,
    profile: Profile | None = None,
    out: DraftTree | None = None,
) -> DraftTree:
    """The tree of the `total_tokens` best candidates and the root: `select_tree` and `build` in one, with no wait for the device.

    scores: [B, F] float, the cumulative log-probabilities of F = P * K candidates; tokens: [B, F] int64; parents: [B, P] int64. Of the
    rows of K candidates row 0 holds the root's children; row r those of candidate parents[r] - 1, and parents[0] is 0. So has EAGLE
    its scores_list, ss_token and parents_list after concatenation (cnets.py; B1.5), with P = 1 + depth * K. root_tokens: [B] int64.

    The tree has N = total_tokens + 1 nodes: the root, then the selected candidates in ascending flat index. mask, mask_dtype and
    prefix_lens: see `tree_mask`; mask "none" makes none. row_order: "leaf" has the rows of retrieve_indices by ascending leaf, "sorted"
    sorts them as lists of nodes (what EAGLE does when it samples). max_depth: of the deepest node; retrieve_indices has
    W = min(N, max_depth + 1) columns. None: 1 + (P - 1) / K where that is whole, as EAGLE's is, else no limit.

    Malformed input is a ValueError: NaN scores, a parent that is not selected or not an earlier candidate, a node below max_depth.
    With check=False (the default on CUDA) a NaN counts as minus infinity; a node without a parent is counted in `orphans`, sees only
    itself and is in no row and no link of the root's tree; a path below max_depth keeps its first W nodes, and `width` says its length.

    impl: as for `tree_mask`. profile: takes the times of the sections. out: a DraftTree of contiguous tensors such as `empty_tree`
    makes, filled and returned; with it and a kernel the call allocates one scratch tensor.
    """
    check_tensor("scores", scores, (None, None), FLOATS)
    batch, candidates = scores.shape
    total_tokens = check_integer("total_tokens", total_tokens, 1, candidates)
    _check_candidates(tokens, parents, root_tokens, (batch, candidates), scores)
    options = _Options(mask, mask_dtype, prefix_lens, row_order, max_depth, impl, check, profile, out)
    return _build(scores, None, total_tokens, tokens, parents, root_tokens, options)


def build(
    selected: Tensor,
    tokens: Tensor,
    parents: Tensor,
    root_tokens: Tensor,
    *,
    mask: str = "bool",
    mask_dtype: torch.dtype = torch.float32,
    prefix_lens: Sequence[int] | Tensor | None = None,
    row_order: str = "leaf",
    max_depth: int | None = None,
    impl: str = "auto",
    check: bool | None = None,
    profile: Profile | None = None,
    out: DraftTree | None = None,
) -> DraftTree:
    """`build_tree` of candidates already selected, such as EAGLE's top_scores_index.

    selected: [B, total_tokens] int64, strictly ascending flat indices below F. An index out of range counts as the nearest in range
    for its token and is an orphan. Everything else as for `build_tree`.
    """
    check_tensor("selected", selected, (None, None), INT64)
    _check_candidates(tokens, parents, root_tokens, (selected.shape[0], None), selected)
    options = _Options(mask, mask_dtype, prefix_lens, row_order, max_depth, impl, check, profile, out)
    return _build(None, selected, selected.shape[1], tokens, parents, root_tokens, options)


def assemble_tree(
    draft_tokens: Tensor,
    parents: Tensor,
    *,
    mask: str = "bool",
    mask_dtype: torch.dtype = torch.float32,
    prefix_lens: Sequence[int] | Tensor | None = None,
    row_order: str = "leaf",
    max_depth: int | None = None,
    impl: str = "auto",
    check: bool | None = None,
    profile: Profile | None = None,
    out: DraftTree | None = None,
) -> DraftTree:
    """The tree of nodes whose parents are known, such as a static one.

    draft_tokens: [B, N] int64, the root's first; parents: [B, N] int64, -1 for the root, which is node 0, and a lower index for every
    other node. max_depth None: N - 1. Everything else as for `build_tree`.
    """
    check_tensor("draft_tokens", draft_tokens, (None, None), INT64)
    check_tensor("parents", parents, tuple(draft_tokens.shape), INT64, draft_tokens, "draft_tokens")
    options = _Options(mask, mask_dtype, prefix_lens, row_order, max_depth, impl, check, profile, out)
    batch, nodes = parents.shape
    columns = _columns(options.max_depth, nodes, None)
    native = _native("assemble", options, parents.device)
    checked = wants_check(check, parents.device)
    if checked and (native is None or parents.device.type != "cpu"):
        refuse_parents(parents, forest=False)
    with section(profile, "total", parents.device):
        with section(profile, "preallocation", parents.device):
            prefix = check_prefix(prefix_lens, mask, batch, parents.device)
            tree = _prepare(options, prefix, batch, nodes, columns, parents.device)
        tree.draft_tokens.copy_(draft_tokens)
        if native is None:
            tree.parents.copy_(valid_parents(parents))
            _fill(tree, prefix, options)
        else:
            with section(profile, "mask", parents.device):
                malformed = native(parents.contiguous(), *tree[1:], prefix, *_codes(options))
            if malformed and checked:
                refuse_parents(parents, forest=False)
                refuse_depth(tree, columns)
    if checked and native is None:
        refuse_depth(tree, columns)
    return tree


_OUT = tuple(f"out.{name}" for name in DraftTree._fields)


class _Options(NamedTuple):
    mask: str
    mask_dtype: torch.dtype
    prefix_lens: Sequence[int] | Tensor | None
    row_order: str
    max_depth: int | None
    impl: str
    check: bool | None
    profile: Profile | None
    out: DraftTree | None


def _build(
    scores: Tensor | None, selected: Tensor | None, total: int, tokens: Tensor, parents: Tensor, root_tokens: Tensor, options: _Options
) -> DraftTree:
    batch, candidates = tokens.shape
    device = tokens.device
    columns = _columns(options.max_depth, total + 1, (candidates, parents.shape[1]))
    native = _native("build", options, device)
    checked = wants_check(options.check, device)
    with section(options.profile, "total", device):
        with section(options.profile, "preallocation", device):
            prefix = check_prefix(options.prefix_lens, options.mask, batch, device)
            tree = _prepare(options, prefix, batch, total + 1, columns, device)
        if native is None:
            selected = select_reference(scores, total) if selected is None else selected
            _resolve(tree, selected, tokens, parents, root_tokens)
            _fill(tree, prefix, options)
            malformed = checked
        else:
            with section(options.profile, "mask", device):
                given = selected is not None
                selected = selected.contiguous() if given else tokens.new_empty(batch, total)
                ranked = None if given else scores.contiguous()
                inputs = (ranked, selected, tokens.contiguous(), parents.contiguous(), root_tokens.contiguous())
                malformed = native(*inputs, *tree, prefix, *_codes(options)) or device.type != "cpu"
    if checked and malformed:
        if scores is not None:
            refuse_nan(scores)
        refuse_selection(selected, tokens, parents)
        refuse_depth(tree, columns)
    return tree


def _resolve(tree: DraftTree, selected: Tensor, tokens: Tensor, parents: Tensor, root_tokens: Tensor) -> None:
    """Tokens, and parents as nodes: where the parent's flat index stands among the selected ones."""
    batch, total = selected.shape
    siblings = tokens.shape[1] // parents.shape[1]
    place = selected.clamp(0, tokens.shape[1] - 1)
    tree.draft_tokens[:, 0] = root_tokens
    tree.draft_tokens[:, 1:] = tokens.gather(1, place)
    above = parents.gather(1, place // siblings)  # 1 + the parent's flat index; 0: the root
    slot = torch.searchsorted(selected.contiguous(), (above - 1).contiguous()).clamp(max=total - 1)
    earlier = slot < torch.arange(total, device=selected.device)
    found = (above > 0) & earlier & (selected.gather(1, slot) == above - 1)
    node = torch.where(above == 0, 0, torch.where(found, slot + 1, -1))
    tree.parents[:, 0].fill_(-1)
    tree.parents[:, 1:] = torch.where(selected == place, node, -1)


def _fill(tree: DraftTree, prefix: Tensor | None, options: _Options) -> None:
    """Everything that follows from tree.parents, by PyTorch."""
    visible = sees(tree.parents, options.impl, options.profile)
    make = paths.looped if options.impl == "rebuild" else paths.vectorised
    columns = tree.retrieve_indices.shape[2]
    with section(options.profile, "retrieve_indices", visible.device):
        made = make(tree.parents, visible, columns, options.row_order)
        for name, value in made._asdict().items():
            getattr(tree, name).copy_(value)
    render(visible, options.mask, prefix, tree.tree_mask)


def _check_candidates(tokens: Tensor, parents: Tensor, root_tokens: Tensor, shape: tuple[int, int | None], like: Tensor) -> None:
    of = "scores" if shape[1] else "selected"
    check_tensor("tokens", tokens, shape, INT64, like, of)
    check_tensor("parents", parents, (shape[0], None), INT64, like, of)
    check_tensor("root_tokens", root_tokens, (shape[0],), INT64, like, of)
    if tokens.shape[1] % parents.shape[1]:
        given = f"{tuple(parents.shape)}, {parents.shape[1]} rows"
        raise ValueError(f"parents has shape {given}; expected a divisor of the {tokens.shape[1]} candidates of tokens")


def _columns(max_depth: int | None, nodes: int, candidates: tuple[int, int] | None) -> int:
    """W: from max_depth, or from the shape of EAGLE's candidates, (F, P)."""
    if max_depth is not None:
        return min(nodes, check_integer("max_depth", max_depth, 0) + 1)
    if candidates is None:
        return nodes
    siblings = candidates[0] // candidates[1]
    levels, rest = divmod(candidates[1] - 1, siblings)
    return nodes if rest else min(nodes, levels + 2)


def _native(name: str, options: _Options, device: torch.device) -> object:
    check_choice("mask", options.mask, MASK_FORMS)
    check_choice("row_order", options.row_order, ROW_ORDERS)
    check_choice("impl", options.impl, TREE_IMPLS)
    return engine(name, device, options.impl) if options.impl in ("auto", "native") else None


def _codes(options: _Options) -> tuple[int, bool]:
    return MASK_FORMS.index(options.mask), options.row_order == "sorted"


def _prepare(options: _Options, prefix: Tensor | None, batch: int, nodes: int, columns: int, device: torch.device) -> DraftTree:
    """The outputs: `out`, checked, or new tensors."""
    out = options.out
    if out is None:
        tree = empty_tree(batch, nodes, columns, mask="none", device=device)
        return tree._replace(tree_mask=prepare_mask(None, options.mask, options.mask_dtype, prefix, batch, nodes, device))
    if not isinstance(out, DraftTree):
        raise ValueError(f"out is {type(out).__name__}; expected a DraftTree, such as empty_tree makes")
    each, all_nodes = (batch,), (batch, nodes)
    shapes = (all_nodes, all_nodes, all_nodes, None, (batch, nodes, columns), each, each, all_nodes, all_nodes, each)
    for name, x, shape in zip(_OUT, out, shapes):
        if shape is not None:
            check_out(name, x, shape, device)
    if (out.tree_mask is None) != (options.mask == "none"):
        raise ValueError(f"out.tree_mask is {'None' if out.tree_mask is None else 'given'}; expected a tensor unless mask is 'none'")
    prepare_mask(out.tree_mask, options.mask, options.mask_dtype, prefix, batch, nodes, device)
    return out
