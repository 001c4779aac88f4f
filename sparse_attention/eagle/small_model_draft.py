"""The draft layers of the small model: EAGLE-3's (cnets.py) and EAGLE-2's (cnets1.py), with topK_genrate by upstream's formulas."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_attention.eagle.small_model_layers import MLP, Attention, Config, RMSNorm, causal_mask, hide_by_tree


class DraftLayer(nn.Module):
    """A decoder layer. EAGLE-3's (`embedded`) reads the token's embedding beside the hidden state."""

    def __init__(self, config: Config, embedded: bool):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.embedded = embedded
        self.self_attn = Attention(config, 2 * size if embedded else size)
        self.mlp = MLP(config)
        if embedded:
            self.hidden_norm = RMSNorm(size, eps)
            self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)

    def forward(self, embeddings: Tensor, hidden_states: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_value):
        x = hidden_states
        if self.embedded:
            x = torch.cat([self.input_layernorm(embeddings), self.hidden_norm(hidden_states)], -1)
        attended, present = self.self_attn(x, attention_mask, position_ids, past_key_value)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), present


class Model(nn.Module):
    """The draft model: `midlayer` and its own lm_head over the draft vocabulary (EAGLE-3), or `layers` and the base's head (EAGLE-2)."""

    def __init__(self, config: Config, use_eagle3: bool, total_tokens: int, depth: int, top_k: int):
        super().__init__()
        size = config.hidden_size
        self.config, self.use_eagle3 = config, use_eagle3
        self.top_k, self.total_tokens, self.depth = top_k, total_tokens - 1, depth
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.embed_tokens.weight.requires_grad = False
        if use_eagle3:
            self.midlayer = DraftLayer(config, embedded=True)
            self.fc = nn.Linear(3 * size, size, bias=False)
            self.norm = RMSNorm(size, config.rms_norm_eps)
            self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
        else:
            self.layers = nn.ModuleList([DraftLayer(config, embedded=False)])
            self.fc = nn.Linear(2 * size, size)
            self.diff_device = False
        self.logsoftmax = nn.LogSoftmax(dim=-1)
        self.init_tree()

    def init_tree(self) -> None:
        device = self.embed_tokens.weight.device
        self.tree_mask_init = torch.eye(self.top_k, device=device)[None, None]
        self.position_ids = torch.zeros(self.top_k, device=device, dtype=torch.long)

    def reset(self) -> None:
        self.tree_mask = None

    def reset_kv(self) -> None:
        self.stable_kv = None

    def forward(self, hidden_states: Tensor, input_ids: Tensor, past_key_values=None, position_ids=None, use_cache: bool = False):
        """hidden_states [B, n, 3 * size] of the base or [B, n, size] of the draft, input_ids [B, n]: (hidden [B, n, size], caches)."""
        rows = hidden_states.shape[1]
        past = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        if position_ids is None:
            position_ids = torch.arange(past, past + rows, device=hidden_states.device)
        position_ids = position_ids.view(-1, rows).long()
        mask = hide_by_tree(causal_mask(rows, past, hidden_states.device), self.tree_mask)
        embeddings = self.embed_tokens(input_ids).to(hidden_states.dtype)
        if not self.use_eagle3:
            hidden_states = self.fc(torch.cat([embeddings, hidden_states], -1))
        elif hidden_states.shape[-1] != embeddings.shape[-1]:
            hidden_states = self.fc(hidden_states)
        layer = self.midlayer if self.use_eagle3 else self.layers[0]
        past_key_value = None if past_key_values is None else past_key_values[0]
        out, present = layer(embeddings, hidden_states, mask, position_ids, past_key_value)
        return (out, (present,)) if use_cache else out

    def logits(self, hidden: Tensor, head: nn.Module) -> Tensor:
        """[..., draft vocabulary] of EAGLE-3, [..., vocabulary] of EAGLE-2."""
        return self.lm_head(self.norm(hidden)) if self.use_eagle3 else head(hidden)

    def to_target(self, tokens: Tensor) -> Tensor:
        """Tokens of the draft vocabulary as the base numbers them."""
        if self.use_eagle3 and self.config.draft_vocab_size != self.config.vocab_size:
            return tokens + self.d2t[tokens]
        return tokens

    @torch.no_grad()
    def topK_genrate(self, hidden_states, input_ids, head, logits_processor):  # noqa: N802 (upstream's name)
        """(draft_tokens [1, N], retrieve_indices [leaves, W], tree_mask [1, 1, N, N], tree_position_ids [N])."""
        sample_token, input_ids = input_ids[:, -1], input_ids[:, 1:]
        position = input_ids.shape[1]
        top_k = self.top_k
        self.reset()
        if getattr(self, "stable_kv", None) is not None:
            known = self.stable_kv[0][0].shape[2]
            hidden, past = self(hidden_states, input_ids[:, known:], past_key_values=self.stable_kv, use_cache=True)
        else:
            hidden, past = self(hidden_states, input_ids, use_cache=True)
        self.stable_kv = past
        last_hidden = hidden[:, -1]
        best = self.logsoftmax(self.logits(last_hidden, head)).topk(top_k)
        scores = best.values[0]
        scores_list, tokens_list = [scores], [self.to_target(best.indices[0])]
        parents_list = [torch.zeros(1, dtype=torch.long, device=scores.device)]
        drafted = tokens_list[0][None]
        node_hidden = last_hidden[None].repeat(1, top_k, 1)
        tree_mask = self.tree_mask_init
        expanded = torch.arange(top_k, device=scores.device)
        for i in range(self.depth):
            self.tree_mask = tree_mask
            out, past = self(node_hidden, drafted, past_key_values=past, position_ids=position + self.position_ids, use_cache=True)
            position += 1
            parents_list.append(expanded + 1 + top_k**2 * max(0, i - 1) + (top_k if i > 0 else 0))
            best = self.logsoftmax(self.logits(out[0], head)).topk(top_k)
            cumulative = best.values + scores[:, None]
            scores, expanded = cumulative.view(-1).topk(top_k)
            rows = expanded // top_k
            node_hidden = out[:, rows]
            tokens = self.to_target(best.indices)
            drafted = tokens.view(-1)[expanded][None]
            tokens_list.append(tokens.view(-1))
            scores_list.append(cumulative.view(-1))
            tree_mask = torch.cat([tree_mask[:, :, rows], self.tree_mask_init], 3)
        candidates = torch.cat(scores_list), torch.cat(tokens_list), torch.cat(parents_list)
        return tree_of(*candidates, sample_token, self.total_tokens, top_k, logits_processor is not None)


def tree_of(scores: Tensor, tokens: Tensor, parents: Tensor, root: Tensor, total_tokens: int, top_k: int, sort_rows: bool):
    """(draft_tokens [1, N], retrieve_indices [leaves, W], tree_mask [1, 1, N, N], tree_position_ids [N]) of candidates: scores and tokens
    [F], parents [P], root [1]. The mask and the rows are made on the host and stay there."""
    selected = scores.topk(total_tokens).indices.sort().values
    draft_tokens = torch.cat([root, tokens[selected]])
    above = parents[selected // top_k]
    nodes = torch.searchsorted(selected, above - 1)
    nodes = torch.where(above == 0, -1, nodes) + 1
    mask, retrieve_indices = _layout(nodes.tolist(), sort_rows)
    positions = mask.sum(1) - 1
    return draft_tokens[None], retrieve_indices, mask.float()[None, None], positions.to(scores.device)


def _layout(parents: list[int], sort_rows: bool) -> tuple[Tensor, Tensor]:
    """Mask [N, N] and retrieve_indices [leaves, W], row by row on the host, from the parents of nodes 1 to N - 1."""
    nodes = len(parents) + 1
    mask = torch.eye(nodes).bool()
    mask[:, 0] = True
    for i, parent in enumerate(parents):
        mask[i + 1].add_(mask[parent])
    depths = (mask.sum(1) - 1).tolist()
    inner = set(parents)
    rows = []
    for leaf in range(nodes):
        if leaf in inner:
            continue
        path, node = [], leaf
        for _ in range(depths[leaf] + 1):
            path.append(node)
            node = parents[node - 1]
        rows.append(path[::-1] + [-1] * (max(depths) - depths[leaf]))
    if sort_rows:
        rows.sort(key=lambda row: [node if node >= 0 else nodes + 4 for node in row])
    return mask, torch.tensor(rows)
