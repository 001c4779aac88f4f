"""What takes the place of EAGLE's drafting and of the steps of its loop: the same results, by the tree operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparse_attention.eagle.build import build_tree
from sparse_attention.eagle.commit import commit
from sparse_attention.eagle.draft import cumulative_topk, logsoftmax_topk
from sparse_attention.eagle.host_known import extended
from sparse_attention.eagle.native import engine
from sparse_attention.eagle.optimize_model import Found, unwrapped
from sparse_attention.eagle.outputs import DraftTree, TopK, Verified
from sparse_attention.eagle.paths import trim_retrieve_indices
from sparse_attention.eagle.static import generate_tree_buffers
from sparse_attention.eagle.verify_greedy import verify_greedy
from sparse_attention.eagle.verify_sampling import verify_sampling
from sparse_attention.eagle.views import accepted_tokens

OPERATIONS = {  # what is counted, and the compiled function that it runs
    logsoftmax_topk: "logsoftmax_topk",
    cumulative_topk: "cumulative_topk",
    build_tree: "build",
    verify_greedy: "verify_greedy",
    verify_sampling: "verify_sampling",
    commit: "commit",
}


class Steps:
    """Drafting and the steps of one model. `hits` counts the calls, under "<name>/reference" those that no compiled kernel ran."""

    def __init__(self, model: nn.Module, found: Found, impl: str):
        self.layer, self.impl, self.found = model.ea_layer, impl, found
        self.drafting = model.ea_layer.topK_genrate
        self.hits: Counter[str] = Counter()
        self.compiled = {f: engine(kernel, found.device, impl) is not None for f, kernel in OPERATIONS.items()}
        self.tree: DraftTree | None = None

    def run(self, operation: Callable, *args, **kwargs):
        """Calls an operation and counts it."""
        result = operation(*args, impl=self.impl, **kwargs)
        self.hits[operation.__name__ if self.compiled[operation] else f"{operation.__name__}/reference"] += 1
        return result

    def tree_decoding(self, model, tree_candidates, past_key_values, tree_position_ids, input_ids, retrieve_indices):
        """Upstream's, but the logits stay [N, V] instead of being gathered into [leaves, W, V]."""
        self.candidates(model, tree_candidates)
        return self.found.steps["tree_decoding"](
            model, tree_candidates, past_key_values, tree_position_ids, input_ids, slice(None)
        )

    def commit(self, verified: Verified, input_ids: Tensor, caches: list[Tensor], current_length_data: Tensor, hidden: Tensor):
        """(input_ids with the accepted tokens, their hidden states, how many they are with the root). The step's one wait for the device:
        the accepted tokens go to the host, which needs their number for the shapes that follow, and themselves for the end token."""
        length = input_ids.shape[1]
        done = self.run(commit, caches, length, verified.accept_index, verified.accept_length, hidden=hidden)
        *tokens, _ = accepted_tokens(self.tree, verified)[0]
        count = len(tokens)
        current_length_data.fill_(length + count)
        accepted = self.tree.draft_tokens.gather(1, verified.accept_index[:, :count])
        return extended(input_ids, accepted.to(input_ids.device), tokens), done.hidden[:, :count], count

    def next_draft(self, model, input_ids: Tensor, token: Tensor, hidden: Tensor, logits_processor):
        return model.ea_layer.topK_genrate(
            hidden,
            input_ids=torch.cat([input_ids, token.to(input_ids.device)], 1),
            head=model.base_model.lm_head,
            logits_processor=logits_processor,
        )


class DynamicSteps(Steps):
    """EAGLE-2 and 3 (cnets1.py, cnets.py, utils.py)."""

    def draft_topk(self, hidden: Tensor, head: Callable) -> TopK:
        """The best tokens after hidden [n, size]: log-probabilities [n, K] and the target's tokens."""
        layer = self.layer
        if self.found.version == 2:
            return self.run(logsoftmax_topk, head(hidden), layer.top_k)
        d2t = layer.d2t if layer.config.vocab_size != layer.config.draft_vocab_size else None
        return self.run(logsoftmax_topk, layer.lm_head(layer.norm(hidden)), layer.top_k, d2t=d2t)

    @torch.no_grad()
    def topK_genrate(self, hidden_states, input_ids, head, logits_processor):  # noqa: N802 (upstream's name)
        """(draft_tokens [1, N], retrieve_indices, tree_mask [1, 1, N, N], tree_position_ids [N]).

        retrieve_indices is upstream's [leaves, W] on the CPU. On CUDA it keeps the fixed shape [N, depth + 2], whose last rows and columns
        may be -1 throughout: cutting it would wait for the device.
        """
        layer, top_k = self.layer, self.layer.top_k
        input_ids = input_ids.to(hidden_states.device)
        root, input_ids = input_ids[:, -1], input_ids[:, 1:]
        position = input_ids.shape[1]
        layer.reset()
        past = getattr(layer, "stable_kv", None)
        known = 0 if past is None else past[0][0].shape[2]
        out, past = layer(hidden_states, input_ids=input_ids[:, known:], past_key_values=past, use_cache=True)
        layer.stable_kv = past
        last = out[:, -1]
        best = self.draft_topk(last, head)
        drafted, nodes = best.tokens, best.values
        scores, tokens = [best.values], [best.tokens]
        parents = [torch.zeros(1, 1, dtype=torch.int64, device=last.device), torch.arange(1, top_k + 1, device=last.device)[None]]
        hidden, tree_mask = last[None].expand(1, top_k, -1), layer.tree_mask_init
        for level in range(layer.depth):
            layer.tree_mask = tree_mask
            positions = position + level + layer.position_ids
            out, past = layer(hidden, input_ids=drafted, past_key_values=past, position_ids=positions, use_cache=True)
            best = self.draft_topk(out[0], head)
            front = self.run(cumulative_topk, best.values[None], nodes, top_k, tokens=best.tokens[None], level=level)
            scores.append(front.cumulative.flatten(1))
            tokens.append(best.tokens.reshape(1, -1))
            if level + 1 == layer.depth:
                break
            nodes, drafted, rows = front.scores, front.tokens, front.rows[0]
            parents.append(front.parents)
            hidden = out[:, rows]
            tree_mask = torch.cat([tree_mask[:, :, rows], layer.tree_mask_init], 3)
        candidates = torch.cat(scores, 1), torch.cat(tokens, 1), torch.cat(parents[: layer.depth + 1], 1)
        order = "leaf" if logits_processor is None else "sorted"
        self.tree = tree = self.run(build_tree, *candidates, layer.total_tokens, root, mask="float", row_order=order)
        retrieve_indices = tree.retrieve_indices[0]
        if retrieve_indices.device.type == "cpu":
            retrieve_indices = trim_retrieve_indices(retrieve_indices, tree.leaf_count[0], tree.width[0])
        return tree.draft_tokens, retrieve_indices, tree.tree_mask, tree.depths[0]

    def candidates(self, model, tree_candidates: Tensor) -> None:
        if self.tree is None or tree_candidates is not self.tree.draft_tokens:
            raise ValueError("tree_candidates are not the last tree that model.ea_layer.topK_genrate made; expected one model and one loop")

    def evaluate_posterior(self, logits, candidates, logits_processor):
        """(best_candidate, accept_length, Verified): the last goes to update_inference_inputs in the place of sample_p."""
        if logits_processor is None:
            verified = self.run(verify_greedy, self.tree, logits[None])
        else:
            probs = logits_processor(None, logits).softmax(-1, dtype=torch.float32)[None]
            coins = torch.rand(1, probs.shape[1] + 1, device=probs.device)
            verified = self.run(verify_sampling, self.tree, probs, coins=coins[:, :-1], final_coins=coins[:, -1])
        return verified.best_candidate[0], verified.accept_length[0], verified

    def update_inference_inputs(
        self,
        input_ids,
        candidates,
        best_candidate,
        accept_length,
        retrieve_indices,
        logits_processor,
        new_token,
        past_key_values_data_list,
        current_length_data,
        model,
        hidden_state_new,
        sample_p,
    ):
        verified = sample_p
        committed = self.commit(verified, input_ids, past_key_values_data_list, current_length_data, hidden_state_new)
        input_ids, hidden, count = committed
        token = verified.next_token[None]
        return input_ids, *self.next_draft(model, input_ids, token, hidden, logits_processor), new_token + count, None, token


class StaticSteps(Steps):
    """EAGLE-1 (eagle-llm): a fixed tree, whose tokens are drawn when it samples. Its rule for accepting those stays upstream's."""

    def __init__(self, model: nn.Module, found: Found, impl: str):
        super().__init__(model, found, impl)
        self.top_k = unwrapped(self.drafting).__globals__["top_k"]
        self.choices, self.buffers = None, None

    @torch.no_grad()
    def topK_genrate(self, hidden_states, input_ids, head, logits_processor, max_length=4, use_cache=True):  # noqa: N802 (upstream's name)
        """(tokens [rows, K], their logits, a list of None); upstream's own where it samples."""
        if logits_processor is not None or not use_cache:
            return self.drafting(hidden_states, input_ids, head, logits_processor, max_length, use_cache)
        layer, buffers = self.layer, self.layer.tree_buffer
        input_ids = input_ids[:, 1:].to(hidden_states.device)
        position = input_ids.shape[1]
        layer.reset()
        past = getattr(layer, "stable_kv", None)
        known = 0 if past is None else past[0][0].shape[2]
        out, past = layer(hidden_states, input_ids=input_ids[:, known:], past_key_values=past, use_cache=True)
        layer.stable_kv = past
        out = out[:, -1:]
        all_tokens, all_logits = [], []
        for level in range(len(buffers["tree_indices"]) + 1):
            logits = head(out[0])
            tokens = self.run(logsoftmax_topk, logits, self.top_k).tokens
            all_tokens.append(tokens)
            all_logits.append(logits.gather(1, tokens))
            if level == len(buffers["tree_indices"]):
                break
            hidden = layer.repeat_hidden(out, buffers["repeat_nums"][level])
            drafted = tokens.view(-1)[buffers["tree_indices"][level]][None]
            layer.tree_mask = buffers["attn_mask"][level]
            positions = position + level + buffers["position_ids"][level]
            out, past = layer(hidden, input_ids=drafted, past_key_values=past, position_ids=positions, use_cache=True)
        return torch.cat(all_tokens), torch.cat(all_logits), [None] * len(all_tokens)

    def candidates(self, model, tree_candidates: Tensor) -> None:
        """Keeps the tree, whose links are those of model.tree_choices."""
        if self.choices != model.tree_choices:
            buffers = generate_tree_buffers(model.tree_choices, top_k=self.top_k, device=tree_candidates.device)
            for name in ("tree_indices", "tree_position_ids", "retrieve_indices"):
                if not torch.equal(getattr(buffers, name), model.tree_buffers[name].to(tree_candidates.device)):
                    raise ValueError(f"model.tree_buffers['{name}'] is not that of model.tree_choices; expected EAGLE-1's")
            self.choices, self.buffers = [list(path) for path in model.tree_choices], buffers
        links = self.buffers
        self.tree = DraftTree(
            tree_candidates,
            retrieve_indices=links.retrieve_indices[None],
            first_child=links.first_child.view(1, -1),
            next_sibling=links.next_sibling.view(1, -1),
        )

    def evaluate_posterior(self, logits, candidates, logits_processor, *drafted):
        if logits_processor is not None:
            gathered = logits[self.buffers.retrieve_indices]
            return self.found.steps["evaluate_posterior"](gathered, candidates, logits_processor, *drafted)
        verified = self.run(verify_greedy, self.tree, logits[None])
        return verified.best_candidate[0], verified.accept_length[0], verified

    def update_inference_inputs(
        self,
        input_ids,
        candidates,
        best_candidate,
        accept_length,
        retrieve_indices,
        logits_processor,
        logits,
        tree_logits,
        new_token,
        past_key_values_data_list,
        current_length_data,
        model,
        hidden_state,
        hidden_state_new,
        sample_p,
    ):
        if logits_processor is None:
            verified, token = sample_p, sample_p.next_token[None]
        else:
            token = torch.multinomial(sample_p, 1)[None]
            path = self.buffers.retrieve_indices[best_candidate][None]
            verified = Verified(path, torch.tensor([accept_length], device=path.device), None, token[0])
        committed = self.commit(verified, input_ids, past_key_values_data_list, current_length_data, hidden_state_new)
        input_ids, hidden, count = committed
        return input_ids, self.next_draft(model, input_ids, token, hidden, logits_processor), new_token + count, None, token
