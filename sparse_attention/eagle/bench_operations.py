"""Every operation checked against its PyTorch reference and timed beside it, over batch, nodes, vocabulary and k."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_attention.eagle.build import build_tree
from sparse_attention.eagle.commit import commit
from sparse_attention.eagle.draft import cumulative_topk, logsoftmax_topk
from sparse_attention.eagle.kv_cache import append
from sparse_attention.eagle.outputs import DraftTree
from sparse_attention.eagle.verify_greedy import verify_greedy
from sparse_attention.eagle.verify_sampling import verify_sampling

_LAYERS, _HEADS, _ROWS, _HEAD_DIM, _HIDDEN = 8, 4, 512, 64, 256
_LEVELS = 5


class Row(NamedTuple):
    """One operation at one size."""

    operation: str
    sizes: dict[str, int]
    equal: bool
    seconds: float  # of impl="auto"
    reference_s: float

    def text(self) -> str:
        sizes = " ".join(f"{name} {value}" for name, value in self.sizes.items())
        verdict = "equal" if self.equal else "DIFFERS"
        ratio = self.reference_s / self.seconds
        times = f"{1e6 * self.seconds:>10.1f} us {1e6 * self.reference_s:>11.1f} us"
        return f"{self.operation:<16} {sizes:<36} {verdict:<8} {times} {ratio:>7.1f}x"


HEADER = f"{'operation':<16} {'sizes':<36} {'result':<8} {'auto':>13} {'reference':>14} {'ratio':>8}"


def rows(batches: Sequence[int], nodes: Sequence[int], vocabularies: Sequence[int], ks: Sequence[int], device: str) -> Iterator[Row]:
    """Results of every operation at every combination of the sizes that it has."""
    for batch, k, vocab in itertools.product(batches, ks, vocabularies):
        logits = _random(batch, k, vocab, device=device, seed=vocab + k)
        yield _row("logsoftmax_topk", {"batch": batch, "vocab": vocab, "k": k}, lambda impl: logsoftmax_topk(logits, k, impl=impl))
    for batch, k in itertools.product(batches, ks):
        log_probs = _random(batch, k, k, device=device, seed=k).log_softmax(-1)
        scores = _random(batch, k, device=device, seed=k + 1)
        sizes = {"batch": batch, "k": k}
        yield _row("cumulative_topk", sizes, lambda impl: cumulative_topk(log_probs, scores, k, level=1, impl=impl))
    for batch, k, count in itertools.product(batches, ks, nodes):
        drafted = candidates(batch, k, device)
        total = min(count - 1, drafted[0].shape[1])
        root = torch.zeros(batch, dtype=torch.int64, device=device)
        sizes = {"batch": batch, "nodes": total + 1, "k": k}
        yield _row("build_tree", sizes, lambda impl: build_tree(*drafted, total, root, impl=impl))
    for batch, count in itertools.product(batches, nodes):
        tree = _tree(batch, count, min(ks[-1], 10), device)
        for vocab in vocabularies:
            logits = _likely(tree, vocab, device)
            sizes = {"batch": batch, "nodes": count, "vocab": vocab}
            yield _row("verify_greedy", sizes, lambda impl: verify_greedy(_within(tree, vocab), logits, impl=impl))
            probs = logits.softmax(-1)
            yield _row("verify_sampling", sizes, lambda impl: verify_sampling(_within(tree, vocab), probs, seed=3, impl=impl))
        yield _cache_row(tree, batch, count, device)
        yield _append_row(batch, count, device)


def _cache_row(tree: DraftTree, batch: int, count: int, device: str) -> Row:
    """commit of the longest path of every tree, with hidden states."""
    hidden = _random(batch, count, _HIDDEN, device=device, seed=1)
    longest = (tree.retrieve_indices >= 0).sum(2).argmax(1)
    path = tree.retrieve_indices[torch.arange(batch, device=device), longest]
    lengths = torch.full((batch,), 100, device=device)
    accepted = (path >= 0).sum(1) - 1
    given = _random(2 * _LAYERS, batch, _HEADS, _ROWS + count, _HEAD_DIM, device=device, seed=2)
    caches = {impl: given.clone() for impl in ("auto", "reference")}
    return _row(
        "commit",
        {"batch": batch, "nodes": count, "layers": _LAYERS},
        lambda impl: (commit(caches[impl], lengths, path, accepted, hidden=hidden, impl=impl), caches[impl]),
    )


def _append_row(batch: int, count: int, device: str) -> Row:
    new = [_random(batch, _HEADS, count, _HEAD_DIM, device=device, seed=s) for s in (3, 4)]
    lengths = torch.full((batch,), 100, device=device)
    caches = {impl: [torch.zeros(batch, _HEADS, _ROWS + count, _HEAD_DIM, device=device) for _ in new] for impl in ("auto", "reference")}
    sizes = {"batch": batch, "nodes": count}
    return _row("append", sizes, lambda impl: (append(*caches[impl], *new, lengths, impl=impl), *caches[impl]))


def _row(operation: str, sizes: dict[str, int], call: Callable[[str], object]) -> Row:
    equal = _equal(call("auto"), call("reference"))
    return Row(operation, sizes, equal, _seconds(lambda: call("auto")), _seconds(lambda: call("reference")))


def _equal(a: object, b: object) -> bool:
    """Integers and masks exactly, floats as closely as their dtype allows."""
    if isinstance(a, Tensor):
        if not a.is_floating_point():
            return torch.equal(a, b)
        return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b


def _seconds(call: Callable[[], object], budget_s: float = 0.03) -> float:
    """Median time of a call with the device finished before and after, over at least 3 calls."""
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget_s and len(times) < 200):
        _finish()
        start = time.perf_counter()
        call()
        _finish()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _random(*shape: int, device: str, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def candidates(batch: int, k: int, device: str, levels: int = _LEVELS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """scores and tokens [batch, F] and parents [batch, P] of random drafting, `levels` after the first; about as sure as a real draft."""
    first = seed * (levels + 1)
    best = logsoftmax_topk(3 * _random(batch, 200 + k, device=device, seed=first), k)
    scores, tokens, nodes = [best.values], [best.tokens], best.values
    parents = [torch.zeros(batch, 1, dtype=torch.int64, device=device), torch.arange(1, k + 1, device=device).expand(batch, k)]
    for level in range(levels):
        best = logsoftmax_topk(3 * _random(batch, k, 200 + k, device=device, seed=first + level + 1), k)
        front = cumulative_topk(best.values, nodes, k, tokens=best.tokens, level=level)
        nodes = front.scores
        scores.append(front.cumulative.flatten(1))
        tokens.append(best.tokens.flatten(1))
        parents.append(front.parents)
    return torch.cat(scores, 1), torch.cat(tokens, 1), torch.cat(parents[:-1], 1)


def _tree(batch: int, count: int, k: int, device: str) -> DraftTree:
    drafted = candidates(batch, k, device)
    if count > drafted[0].shape[1]:
        raise ValueError(f"--nodes is {count}; expected at most {drafted[0].shape[1]} with --k {k}")
    return build_tree(*drafted, count - 1, torch.zeros(batch, dtype=torch.int64, device=device), row_order="sorted")


def _within(tree: DraftTree, vocab: int) -> DraftTree:
    """The tree with tokens below `vocab`."""
    return tree._replace(draft_tokens=tree.draft_tokens % vocab)


def _likely(tree: DraftTree, vocab: int, device: str) -> Tensor:
    """Logits [B, N, vocab] that favour the first child of every node, so that walks are long."""
    logits = _random(*tree.draft_tokens.shape, vocab, device=device, seed=6)
    follow = tree.draft_tokens.gather(1, tree.first_child.clamp(min=0)) % vocab
    return logits.scatter_add(2, follow[:, :, None], torch.full_like(follow, 8)[:, :, None].to(logits))
