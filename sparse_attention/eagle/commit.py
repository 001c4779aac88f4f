"""After a verification: the accepted rows of every layer's cache move to the end of the committed ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_attention.eagle.checks import FLOATS, INT64, at, check_tensor, first, short, wants_check
from sparse_attention.eagle.kv_cache import as_lengths, check_rows
from sparse_attention.eagle.native import engine
from sparse_attention.eagle.outputs import Committed


def commit(
    caches: Tensor | Sequence[Tensor],
    lengths: Tensor | int,
    accept_index: Tensor,
    accept_length: Tensor,
    *,
    block_table: Tensor | None = None,
    hidden: Tensor | None = None,
    impl: str = "auto",
    check: bool | None = None,
) -> Committed:
    """Moves row lengths + accept_index[j] to row lengths + j, for j up to accept_length, in every layer, in place.

    caches: [L, B, H, S, D], or a list of such or of [B, H, S, D], any strides with D contiguous, all of one dtype (L counts keys and
    values: EAGLE's past_key_values_data_list is such a list). Paged: [L, pages, H, page size, D], or a list of such or of 4 dimensions, and
    block_table [B, most pages of a request] int32 or int64; row r of request b is row r % page size of page block_table[b, r // page size].
    Other orders are views of these: transpose them.

    lengths: [B] int64 or one number, the committed rows, before the tree's, which lie at lengths + node. accept_index: [B, S'] and
    accept_length: [B] int64, from a verification; accept_length -1 commits nothing for a request. Rows may overlap in any order: a
    request's rows are read before they are written. hidden: [B, N, hidden size], the target's hidden states at the nodes; the accepted
    ones come back as [B, S', hidden size], zeros after them.

    Returns Committed(lengths + accept_length + 1, hidden). ValueError, and nothing is moved, if a row or a page is outside the cache, if an
    accepted index is not a node, or if accept_length is not from -1 to S' - 1. With check=False (the default on CUDA) such a request is
    left as it is, keeps its length, and its hidden rows are zeros.
    """
    layers = _as_layers(caches)
    check_tensor("accept_index", accept_index, (None, None), INT64, layers[0], "caches")
    batch, width = accept_index.shape
    check_tensor("accept_length", accept_length, (batch,), INT64, accept_index, "accept_index")
    if block_table is None:
        if layers[0].shape[1] != batch:
            raise ValueError(f"caches have batch {layers[0].shape[1]}; expected {batch}, that of accept_index")
    else:
        check_tensor("block_table", block_table, (batch, None), (torch.int32, torch.int64), accept_index, "accept_index")
        block_table = block_table.to(torch.int64).contiguous()
    if hidden is not None:
        check_tensor("hidden", hidden, (batch, None, None), FLOATS, accept_index, "accept_index")
        hidden = hidden.contiguous()
    lengths = as_lengths(lengths, batch, layers[0])
    native = engine("commit", layers[0].device, impl)
    checked = wants_check(check, layers[0].device)
    move = (layers, lengths, accept_index.contiguous(), accept_length.contiguous(), block_table, hidden)
    if checked and (native is None or layers[0].device.type != "cpu"):
        _refuse(*move)
    if native is None:
        return _reference(*move)
    result = torch.empty_like(lengths)
    rows = None if hidden is None else hidden.new_empty(batch, width, hidden.shape[2])
    if native(*move, result, rows, checked):
        _refuse(*move)
    return Committed(result, rows)


def _reference(
    layers: list[Tensor], lengths: Tensor, accept_index: Tensor, accept_length: Tensor, block_table: Tensor | None, hidden: Tensor | None
) -> Committed:
    """Request after request, by index_select and index_copy."""
    ends = lengths.clone()
    batch, width = accept_index.shape
    rows = None if hidden is None else hidden.new_zeros(batch, width, hidden.shape[2])
    valid = _problems(layers, lengths, accept_index, accept_length, block_table, hidden)[0].tolist()
    for b, count in enumerate((accept_length + 1).tolist()):
        if not valid[b] or count == 0:
            continue
        source = lengths[b] + accept_index[b, :count]
        target = lengths[b] + torch.arange(count, device=lengths.device)
        for layer in layers:
            if block_table is None:
                layer[:, b].index_copy_(2, target, layer[:, b].index_select(2, source))
            else:
                size = layer.shape[3]
                taken = layer[:, block_table[b, source // size], :, source % size].clone()
                layer[:, block_table[b, target // size], :, target % size] = taken
        ends[b] += count
        if hidden is not None:
            rows[b, :count] = hidden[b, accept_index[b, :count]]
    return Committed(ends, rows)


def _problems(
    layers: list[Tensor], lengths: Tensor, accept_index: Tensor, accept_length: Tensor, block_table: Tensor | None, hidden: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """[B] bool, which requests are well formed; of the others what is wrong, accept_length [B], accept_index [B, S'] or pages [B, S'];
    and how many rows a request can have."""
    width = accept_index.shape[1]
    page = layers[0].shape[3]
    rows = page if block_table is None else page * block_table.shape[1]
    used = torch.arange(width, device=lengths.device) <= accept_length[:, None]
    counts_bad = (accept_length < -1) | (accept_length >= width)
    limit = (rows - lengths)[:, None] if hidden is None else (rows - lengths).clamp(max=hidden.shape[1])[:, None]
    length_bad = (lengths < 0) | (lengths + accept_length + 1 > rows)
    index_bad = used & ((accept_index < 0) | (accept_index >= limit) | length_bad[:, None])
    pages_bad = torch.zeros_like(index_bad)
    if block_table is not None:
        for row in (accept_index, torch.arange(width, device=lengths.device).expand_as(accept_index)):
            block = ((lengths[:, None] + row) // page).clamp(0, block_table.shape[1] - 1)
            number = block_table.gather(1, block)
            pages_bad |= used & ((number < 0) | (number >= layers[0].shape[1]))
    return ~(counts_bad | index_bad.any(1) | pages_bad.any(1)), counts_bad, index_bad, pages_bad, rows


def _refuse(
    layers: list[Tensor], lengths: Tensor, accept_index: Tensor, accept_length: Tensor, block_table: Tensor | None, hidden: Tensor | None
) -> None:
    _, counts_bad, index_bad, pages_bad, rows = _problems(layers, lengths, accept_index, accept_length, block_table, hidden)
    found = first(counts_bad)
    if found is not None:
        raise ValueError(f"{at('accept_length', found)} is {int(accept_length[found])}; expected -1 to {accept_index.shape[1] - 1}")
    ends = lengths + accept_length + 1
    found = first((accept_length >= 0) & (lengths >= 0) & (ends > rows))
    if found is not None:
        given = f"{at('lengths', found)} is {int(lengths[found])} and {int(accept_length[found]) + 1} rows are accepted"
        raise ValueError(f"{given}; expected room for them: the cache has {rows}")
    found = first(index_bad)
    if found is not None:
        nodes = "" if hidden is None else f", a node below {hidden.shape[1]}"
        start = f"lengths[{found[0]}] is {int(lengths[found[0]])}"
        raise ValueError(
            f"{at('accept_index', found)} is {int(accept_index[found])} and {start}; expected a row of the cache, which has {rows}{nodes}"
        )
    found = first(pages_bad)
    if found is not None:
        b = found[0]
        raise ValueError(
            f"block_table[{b}] is {short(block_table[b].tolist())}; expected pages from 0 to {layers[0].shape[1] - 1} for rows "
            f"{int(lengths[b])} and on"
        )


def _as_layers(caches: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The caches as a list of [L, B or pages, H, S or page size, D]."""
    given = [caches] if isinstance(caches, Tensor) else list(caches)
    if not given:
        raise ValueError("caches is empty; expected at least one tensor")
    layers, checked = [], None
    for n, x in enumerate(given):
        kind = (x.shape, x.dtype, x.device, x.stride()[-1:]) if isinstance(x, Tensor) else None
        if kind is None or kind != checked:  # what the one before it was needs no check
            _check_layer("caches" if caches is x else f"caches[{n}]", x, given[0], caches is x)
            checked = kind
        layers.append(x if x.dim() == 5 else x.unsqueeze(0))
    return layers


def _check_layer(name: str, x: object, like: Tensor, alone: bool) -> None:
    """That `x` is a cache, of 5 dimensions if it is `alone`, and of the batch, rows, dtype and device of `like`."""
    dims = x.dim() if isinstance(x, Tensor) and x.dim() in (4, 5) and not alone else 5
    check_rows(name, x, dims)
    for place in (-4, -2):
        if x.shape[place] != like.shape[place]:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected the batch and rows of caches[0], {tuple(like.shape)}")
    if x.dtype != like.dtype or x.device != like.device:
        raise ValueError(f"{name} is {x.dtype} on {x.device}; expected {like.dtype} on {like.device}, as caches[0]")
