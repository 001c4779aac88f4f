"""The mask of EAGLE's base at the nodes of a tree, without the wait for the device that EAGLE's own has."""

from __future__ import annotations

import functools
import inspect
from types import MethodType

import torch
from torch import nn

NAME = "_prepare_decoder_attention_mask"
_PARAMETERS = ("attention_mask", "input_shape", "inputs_embeds", "past_key_values_length")


def has_mask(decoder: nn.Module) -> bool:
    """Whether this is a base that makes its mask as EAGLE's modeling_*_kv.py do."""
    return tuple(inspect.signature(getattr(decoder, NAME, lambda: None)).parameters) == _PARAMETERS


def without_wait(method: MethodType) -> MethodType:
    """EAGLE writes `mask[..., -N:, -N:][tree_mask == 0] = mask.min()`, an index that must be counted on the host. This is the same mask."""

    @functools.wraps(method.__func__)
    def prepare(self, attention_mask, input_shape, inputs_embeds, past_key_values_length):
        tree_mask = getattr(self, "tree_mask", None)
        if tree_mask is None:
            return method(attention_mask, input_shape, inputs_embeds, past_key_values_length)
        self.tree_mask = None
        try:
            mask = method(attention_mask, input_shape, inputs_embeds, past_key_values_length)
        finally:
            self.tree_mask = tree_mask
        nodes = tree_mask.shape[-1]
        own = mask[:, :, -nodes:, -nodes:]
        own.copy_(torch.where(tree_mask.to(mask.device) == 0, mask.min(), own))
        return mask

    return MethodType(prepare, method.__self__)
