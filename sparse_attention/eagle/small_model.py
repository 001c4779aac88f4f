"""A small model of EAGLE's shape that trains itself in seconds: for tests, and for `python -m sparse_attention.eagle bench`.

Attribute and function names are those of SafeAILab/EAGLE (ea_model.py), so that `optimize_eagle` patches it as it patches EAGLE. Pure
PyTorch. The base is a Llama with random weights; the draft is overfitted on the base's own greedy output.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from sparse_attention.eagle.small_model_draft import Model
from sparse_attention.eagle.small_model_layers import MLP, Attention, Config, RMSNorm, causal_mask, hide_by_tree, initialize_past_key_values
from sparse_attention.eagle.small_model_steps import (
    evaluate_posterior,
    initialize_tree,
    prepare_logits_processor,
    reset_tree_mode,
    tree_decoding,
    update_inference_inputs,
)


class Outputs(SimpleNamespace):
    """last_hidden_state [1, n, size] and hidden_states, three of them; the first is outputs[0] too."""

    def __getitem__(self, key):
        return self.last_hidden_state if key == 0 else getattr(self, key)


class DecoderLayer(nn.Module):
    """A Llama layer over a KVCache pair."""

    def __init__(self, config: Config):
        super().__init__()
        self.self_attn = Attention(config, config.hidden_size)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_value) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), attention_mask, position_ids, past_key_value)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Decoder(nn.Module):
    """The base without its head."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.tree_mask = None

    def forward(self, input_ids: Tensor, past_key_values=None, position_ids: Tensor | None = None) -> Outputs:
        rows = input_ids.shape[1]
        past = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        if position_ids is None:
            position_ids = torch.arange(past, past + rows, device=input_ids.device)[None]
        mask = hide_by_tree(causal_mask(rows, past, input_ids.device), self.tree_mask)
        hidden, captured = self.embed_tokens(input_ids), []
        for i, layer in enumerate(self.layers):
            if i in self.config.captured_layers:
                captured.append(hidden)
            hidden = layer(hidden, mask, position_ids, None if past_key_values is None else past_key_values[i])
        return Outputs(last_hidden_state=self.norm(hidden), hidden_states=captured)


class CausalLM(nn.Module):
    """The base: `model` and `lm_head`."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor, past_key_values=None) -> Tensor:
        """Logits [1, n, V]."""
        return self.lm_head(self.model(input_ids, past_key_values)[0])


class EaModel(nn.Module):
    """Base and draft with EAGLE's ways to generate. Batch 1, as EAGLE."""

    def __init__(self, config: Config = Config(), use_eagle3: bool = True, total_token: int = 60, depth: int = 5, top_k: int = 10):
        super().__init__()
        self.config, self.use_eagle3 = config, use_eagle3
        self.base_model = CausalLM(config)
        self.ea_layer = Model(config, use_eagle3, total_token, depth, top_k)
        self.tokenizer = SimpleNamespace(eos_token_id=None)

    def forward(self, input_ids=None, past_key_values=None, output_orig=False, position_ids=None):
        with torch.inference_mode():
            outputs = self.base_model.model(input_ids, past_key_values=past_key_values, position_ids=position_ids)
            if output_orig:
                return outputs, self.base_model.lm_head(outputs[0]), outputs[0]
            return outputs, outputs[0]

    @torch.no_grad()
    def eagenerate(self, input_ids, temperature=0.0, top_p=0.0, top_k=0.0, max_new_tokens=512, max_length=2048, log=False):
        """input_ids [1, L] and what follows; with log also the number of new tokens and the index of the last step."""
        logits_processor = prepare_logits_processor(temperature, top_p, top_k) if temperature > 1e-5 else None
        padding = torch.full((1, 1), -1, device=input_ids.device)
        past_key_values, past_key_values_data, current_length_data = self._reset_cache(max_length)
        input_len = input_ids.shape[1]
        reset_tree_mode(self)
        draft_tokens, retrieve_indices, tree_mask, tree_position_ids, _, _, _ = initialize_tree(
            input_ids, self, past_key_values, logits_processor
        )
        new_token = 0
        max_length = max_length - self.ea_layer.total_tokens - 10
        for idx in range(max_length):  # noqa: B007 (returned)
            self.base_model.model.tree_mask = tree_mask
            draft_tokens = draft_tokens.to(input_ids.device)
            logits, hidden_state_new, _ = tree_decoding(
                self, draft_tokens, past_key_values, tree_position_ids, input_ids, retrieve_indices
            )
            draft_tokens = torch.cat([draft_tokens, padding], 1)
            candidates = draft_tokens[0, retrieve_indices]
            best_candidate, accept_length, sample_p = evaluate_posterior(logits, candidates, logits_processor)
            input_ids, draft_tokens, retrieve_indices, tree_mask, tree_position_ids, new_token, _, _ = update_inference_inputs(
                input_ids,
                candidates,
                best_candidate,
                accept_length,
                retrieve_indices,
                logits_processor,
                new_token,
                past_key_values_data,
                current_length_data,
                self,
                hidden_state_new,
                sample_p,
            )
            if self.tokenizer.eos_token_id in input_ids[0, input_len:].tolist():
                break
            if new_token > max_new_tokens or input_ids.shape[1] > max_length:
                break
        return (input_ids, new_token, idx) if log else input_ids

    @torch.no_grad()
    def naivegenerate(self, input_ids, max_new_tokens=512, max_length=2048):
        """Plain greedy decoding, one token a step."""
        past_key_values, _, _ = self._reset_cache(max_length)
        reset_tree_mode(self)
        logits = self.base_model(input_ids, past_key_values)
        for _ in range(min(max_new_tokens, max_length - input_ids.shape[1] - 1)):
            token = logits[:, -1:].argmax(-1)
            input_ids = torch.cat([input_ids, token], 1)
            logits = self.base_model(token, past_key_values)
        return input_ids

    def _reset_cache(self, max_length: int) -> tuple[list, list[Tensor], Tensor]:
        """The cache, made at the first call and kept as EAGLE keeps it; a longer one is made anew."""
        self.ea_layer.reset_kv()
        if not hasattr(self, "past_key_values") or self.past_key_values_data[0].shape[3] < max_length:
            made = initialize_past_key_values(self.base_model, max_length)
            self.past_key_values, self.past_key_values_data, self.current_length_data = made
        self.current_length_data.zero_()
        return self.past_key_values, self.past_key_values_data, self.current_length_data
