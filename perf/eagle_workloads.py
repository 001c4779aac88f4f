"""Builders of the cases of EAGLE's tree operations, on the device whose clock runs: ours against EAGLE's own formulas.

One request, as EAGLE has it. The formulas are those of the small model (`sparse_attention/eagle/small_model_*.py`).
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from perf.decode_workloads import FIRST_SEED, _device
from sparse_attention import eagle
from sparse_attention.breakeven import Workload
from sparse_attention.eagle import small_model_steps as steps
from sparse_attention.eagle.bench_operations import candidates
from sparse_attention.eagle.small_model_draft import tree_of

K = 10  # candidates of a node
PREFIX = 300  # rows in the cache before the tree's


class Tree(NamedTuple):
    """What a draft of `depth` levels leaves, and the sizes of the tree made of it."""

    scores: Tensor
    tokens: Tensor
    parents: Tensor
    root: Tensor
    nodes: int

    @classmethod
    def drawn(cls, nodes: int, depth: int, device: str) -> Tree:
        return cls(*candidates(1, K, device, depth, FIRST_SEED % 1000), torch.full((1,), 7, device=device), nodes)

    def draw(self, depth: int, seed: int) -> None:
        """Other candidates, in place."""
        for x, new in zip(self, candidates(1, K, self.scores.device.type, depth, seed % 1000)):
            x.copy_(new)

    def ours(self, **options) -> eagle.DraftTree:
        return eagle.build_tree(self.scores, self.tokens, self.parents, self.nodes - 1, self.root, **options)

    def eagles(self):
        return tree_of(self.scores[0], self.tokens[0], self.parents[0], self.root, self.nodes - 1, K, False)


def build(nodes: int = 60, depth: int = 7, mask: str = "float") -> Workload:
    """build_tree against EAGLE's sort, search, mask and rows; with a time limit nothing is raced, and `out` is given. mask: "float", which is
    EAGLE's, or "bits"."""
    device = _device()
    tree = Tree.drawn(nodes, depth, device)
    out = eagle.empty_tree(1, nodes, min(nodes, depth + 2), mask=mask, device=device)

    def check(found):
        draft_tokens, rows, float_mask, positions = tree.eagles()
        assert torch.equal(found.draft_tokens, draft_tokens) and torch.equal(found.depths[0], positions)
        assert torch.equal(eagle.trim_retrieve_indices(found.retrieve_indices[0], found.leaf_count[0], found.width[0]).cpu(), rows)
        ours = found.tree_mask.cpu()
        if mask == "bits":  # [1, nodes, words]
            ours = (ours[:, :, :, None] >> torch.arange(64) & 1).flatten(2)[:, None, :, :nodes].float()
        assert torch.equal(ours, float_mask)

    return Workload(
        candidate=lambda: tree.ours(mask=mask, out=out),
        baselines={"EAGLE's": tree.eagles},
        check=check,
        inputs=(tree.scores, tree.tokens, tree.parents),
        refresh=functools.partial(tree.draw, depth),
    )


def mask(nodes: int) -> Workload:
    """The mask of a tree whose nodes have two or three children: fused, against the loop over rows, levels, and doubling."""
    device = _device()
    parents = torch.empty(1, nodes, dtype=torch.int64, device=device)

    def refresh(seed: int) -> None:
        parents.copy_(bushy(nodes, seed))

    refresh(FIRST_SEED)
    ways = {"rebuild": "rebuild", "incremental": "incremental", "doubling": "reference"}
    calls = {name: functools.partial(eagle.tree_mask, parents, impl=impl) for name, impl in ways.items()}
    return Workload(
        candidate=lambda: eagle.tree_mask(parents, impl="native"),
        baselines=calls,
        check=lambda found: _same(found.cpu(), calls["rebuild"]().cpu()),
        inputs=(parents,),
        refresh=refresh,
        columns={name: lambda call=call: call for name, call in calls.items()},
    )


def bushy(nodes: int, seed: int) -> Tensor:
    """Parents [1, nodes] of a random tree, as deep as EAGLE's: nodes have two or three children."""
    rng = torch.Generator().manual_seed(seed % 1000)
    index = torch.arange(nodes)
    low, high = (index - 1) // 3, (index - 1) // 2
    parents = low + (torch.rand(nodes, generator=rng) * (high - low + 1)).long()
    return torch.where(index == 0, -1, parents)[None]


class Target(NamedTuple):
    """Logits [1, N, V] of the target at the nodes of a tree, which favour one child of most nodes."""

    tree: eagle.DraftTree
    logits: Tensor

    @classmethod
    def drawn(cls, tree: eagle.DraftTree, vocab: int, dtype: torch.dtype) -> Target:
        tree = tree._replace(draft_tokens=tree.draft_tokens % vocab)
        made = cls(tree, torch.empty(*tree.draft_tokens.shape, vocab, dtype=dtype, device=tree.draft_tokens.device))
        made.draw(FIRST_SEED)
        return made

    def draw(self, seed: int) -> None:
        rng = torch.Generator(self.logits.device).manual_seed(seed)
        self.logits.normal_(generator=rng)
        liked = torch.rand(self.tree.draft_tokens.shape, generator=torch.Generator().manual_seed(seed)).to(self.logits.device) < 0.8
        child = self.tree.first_child.clamp(min=0)
        token = self.tree.draft_tokens.gather(1, child)
        more = torch.where(liked & (self.tree.first_child >= 0), 12.0, 0.0).to(self.logits.dtype)
        self.logits.scatter_add_(2, token[:, :, None], more[:, :, None])

    def eagles(self):
        """EAGLE's tree_decoding after the model, and evaluate_posterior: gathers [leaves, W, V]."""
        rows = eagle.trim_retrieve_indices(self.tree.retrieve_indices[0], self.tree.leaf_count[0], self.tree.width[0])
        padded = torch.cat([self.tree.draft_tokens[0], self.tree.draft_tokens.new_full((1,), -1)])
        return functools.partial(self._evaluate, rows.contiguous(), padded[rows])

    def _evaluate(self, rows: Tensor, paths: Tensor):
        return steps.evaluate_posterior(self.logits[0, rows], paths, None)


def verify(vocab: int, dtype: str, nodes: int = 60, batch: int = 1, rival: str = "EAGLE's") -> Workload:
    """verify_greedy from logits, against EAGLE's formula (one request), torch's argmax, or, in bytes read, a copy of 512 MiB."""
    device = _device()
    tree = Tree.drawn(nodes, 7, device).ours()
    many = eagle.DraftTree(*(x.repeat(batch, *[1] * (x.dim() - 1)) for x in tree))
    target = Target.drawn(many, vocab, getattr(torch, dtype))
    logits = target.logits
    found = {"argmax": lambda: logits.argmax(2)} if rival == "argmax" else {}
    scale, size = 1.0, logits.numel() * logits.element_size()
    if rival == "EAGLE's":
        found = {rival: target.eagles()}
    elif rival == "copy":
        block = torch.empty(1 << 29, dtype=torch.uint8, device=device)
        into = torch.empty_like(block)
        found, scale = {"copy": lambda: into.copy_(block)}, size / (2 * block.numel())

    def check(verified):
        best = logits.argmax(2)
        _same(verified, eagle.verify_greedy(many, target_tokens=best, impl="reference", check=False))

    return Workload(
        candidate=lambda: eagle.verify_greedy(many, logits),
        baselines=found,
        check=check,
        inputs=(logits,),
        refresh=target.draw,
        work={} if device == "cpu" else {"bytes": size},
        scale=scale,
        note=f"{size / 1e6:.1f} MB of logits",
    )


class Cache(NamedTuple):
    """The cache [2 * layers, 1, heads, rows, D] and the hidden states [1, N, size] of a step."""

    rows: Tensor
    hidden: Tensor

    @classmethod
    def drawn(cls, nodes: int, layers: int, rows: int, dtype: str, device: str, hidden: int = 4096) -> Cache:
        kind = getattr(torch, dtype)
        made = cls(
            torch.empty(2 * layers, 1, 8, rows, 128, dtype=kind, device=device),
            torch.empty(1, nodes, hidden, dtype=kind, device=device),
        )
        made.draw(FIRST_SEED)
        return made

    def draw(self, seed: int) -> None:
        for x in self:
            x.normal_(generator=torch.Generator(x.device).manual_seed(seed))

    def fresh(self, nodes: int) -> Tensor:
        """The rows of the tree, drawn anew: many commits of one path leave rows that a further one does not change."""
        return self.rows[..., PREFIX : PREFIX + nodes, :].normal_()


def commit(layers: int, rows: int, dtype: str, accepted: int = 5, nodes: int = 60) -> Workload:
    """commit of one path, with its hidden states, against EAGLE's select and copy, and its gather of all paths' hidden states."""
    device = _device()
    cache = Cache.drawn(nodes, layers, rows, dtype, device)
    tree = Tree.drawn(nodes, 7, device).ours()
    retrieve = eagle.trim_retrieve_indices(tree.retrieve_indices[0], tree.leaf_count[0], tree.width[0])
    best = int((retrieve >= 0).sum(1).argmax())
    path = retrieve[best, : accepted + 1].contiguous()
    lengths = torch.full((1,), PREFIX, device=device)
    index = torch.nn.functional.pad(path, (0, retrieve.shape[1] - len(path)), value=-1)[None]
    count = torch.full((1,), accepted, device=device)

    def eagles():
        moved = cache.rows[..., path + PREFIX, :]
        cache.rows[..., PREFIX : PREFIX + accepted + 1, :].copy_(moved)
        return cache.hidden[:, retrieve][:, best, : accepted + 1]

    def ours():
        return eagle.commit(cache.rows, lengths, index, count, hidden=cache.hidden)

    def check(found):
        assert found.lengths.tolist() == [PREFIX + accepted + 1]
        _same(found.hidden[:, : accepted + 1], cache.hidden[:, path])
        after = cache.fresh(nodes)
        before = after.clone()
        ours()
        _same(after[..., : accepted + 1, :], before[..., path, :])
        _same(after[..., accepted + 1 :, :], before[..., accepted + 1 :, :])

    return Workload(ours, {"EAGLE's": eagles}, check, inputs=tuple(cache), refresh=cache.draw)


def step(vocab: int, layers: int, rows: int, dtype: str, nodes: int = 60, depth: int = 7) -> Workload:
    """All of a step but the two models: build, verify, commit, and the one wait for the accepted tokens; against EAGLE's functions."""
    device = _device()
    tree, cache = Tree.drawn(nodes, depth, device), Cache.drawn(nodes, layers, rows, dtype, device)
    target = Target.drawn(tree.ours(), vocab, getattr(torch, dtype))
    lengths, ids = torch.full((1,), PREFIX, device=device), torch.zeros(1, PREFIX, dtype=torch.int64, device=device)
    padding, length_data = torch.full((1, 1), -1, device=device), torch.zeros(1, dtype=torch.int64)
    drafting = SimpleNamespace(topK_genrate=lambda hidden, **inputs: (hidden,))
    model = SimpleNamespace(ea_layer=drafting, base_model=SimpleNamespace(lm_head=None))

    def ours():
        made = tree.ours(mask="float")
        verified = eagle.verify_greedy(made, target.logits)
        done = eagle.commit(cache.rows, lengths, verified.accept_index, verified.accept_length, hidden=cache.hidden)
        return eagle.accepted_tokens(made, verified)[0], done.hidden

    def eagles():
        draft_tokens, retrieve, mask, _ = tree.eagles()
        mask.to(device)
        logits = target.logits[0, retrieve]
        paths = torch.cat([draft_tokens, padding], 1)[0, retrieve]
        best, accepted, p = steps.evaluate_posterior(logits, paths, None)
        every = ids, paths, best, accepted, retrieve, None, 0, [cache.rows], length_data, model, cache.hidden, p
        tokens, hidden, *_, token = steps.update_inference_inputs(*every)
        return [*tokens[0, PREFIX:].tolist(), int(token)], hidden

    def check(found):
        window = cache.fresh(nodes)
        before = window.clone()
        tokens, hidden = eagles()
        expected = window.clone()
        window.copy_(before)
        assert found[0] == tokens, f"{found[0]} are accepted, EAGLE accepts {tokens}"
        _same(found[1][:, : hidden.shape[1]], hidden)
        ours()
        _same(window, expected)

    def refresh(seed: int) -> None:
        cache.draw(seed)
        target.draw(seed)

    note = f"{len(ours()[0]) - 2} drafts accepted"
    return Workload(ours, {"EAGLE's": eagles}, check, (target.logits, *cache), refresh, note=note)


def draft(vocab: int, dtype: str) -> Workload:
    """logsoftmax_topk of one level of drafting against PyTorch's two calls."""
    device = _device()
    logits = torch.randn(K, vocab, device=device).to(getattr(torch, dtype))

    def eagles():
        return torch.log_softmax(logits, -1).topk(K)

    def check(found):
        exact = logits.double().log_softmax(-1)
        torch.testing.assert_close(found.values.double(), exact.topk(K).values, atol=1e-2, rtol=1e-3)
        _same(logits.gather(1, found.tokens), logits.sort(descending=True).values[:, :K])

    return Workload(lambda: eagle.logsoftmax_topk(logits, K), {"PyTorch's": eagles}, check, inputs=(logits,))


def _same(found, expected) -> None:
    """AssertionError unless equal bit for bit, field by field where they are tuples."""
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected.to(found.device)), f"{found.flatten()[:8].tolist()} is not {expected.flatten()[:8].tolist()}"
    elif isinstance(expected, tuple):
        for one, other in zip(found, expected):
            _same(one, other)
