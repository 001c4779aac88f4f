"""Verification when the target samples: children are accepted by coins, so that the tokens have the target's law."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparse_attention.eagle.checks import FLOATS, at, check_choice, check_tensor, first, short, wants_check
from sparse_attention.eagle.native import engine
from sparse_attention.eagle.outputs import DraftTree, Verified
from sparse_attention.eagle.philox import as_counter, uniforms
from sparse_attention.eagle.verify_greedy import Walks, check_tree, empty_verified, links_of, refuse_links

RULES = ("upstream", "target_only")


def verify_sampling(
    tree: DraftTree,
    target_probs: Tensor,
    *,
    rule: str = "upstream",
    coins: Tensor | None = None,
    final_coins: Tensor | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    width: int | None = None,
    return_sample_p: bool = False,
    impl: str = "auto",
    check: bool | None = None,
) -> Verified:
    """A path accepted by coins, and the token sampled after it.

    target_probs: [B, N, V] float, the target's probabilities at every node, after temperature, top-k and top-p. tree, width: as for
    `verify_greedy`. At a node the children are tried in the order of their links; p is the node's row of target_probs.

    rule "upstream" (EAGLE's evaluate_posterior, B4, which wants siblings in ascending order: its sorted rows): each child tried takes the
    next coin of its request and is accepted if coin <= p[token] / what is left, where what is left is 1, and after a rejection the
    sum of p without the rejected tokens. A token that a rejected sibling had is skipped without a coin.
    rule "target_only" (SGLang's tree_speculative_sampling_target_only): one coin for a node, coins[b, node]; a child is accepted if
    coin <= (p summed over the children tried) / threshold_acc or p[token] >= threshold_single.
    By both rules a coin accepts no token of probability 0. With thresholds 1 both keep the law of the target.

    Where no child is accepted the next token is drawn from p without the rejected tokens: the first whose cumulative sum is more than
    final_coin * total. If nothing is left, from p. sample_p is p where nothing was rejected, else the rest divided by its sum.

    coins: [B, N], final_coins: [B], float32 or float64 in [0, 1); or seed, for coins and final_coins from Philox (`uniforms`: numbers 0
    to N - 1 of a request are its coins and number N its final coin), with `offset` counting the calls. seed and offset may be int64
    tensors of one element on the device, which a CUDA graph reads at each replay. Arithmetic is in float64 on the CPU and in the
    reference; EAGLE's is in the dtype of its logits.

    ValueError: as for `verify_greedy`; coins outside [0, 1); draft tokens outside [0, V) ; probabilities that are negative or not
    finite, or a row without any, where they are read. With check=False (the default on CUDA) coins are clamped to [0, 1 - 2^-24], such
    tokens are never accepted, such probabilities count as 0 and from a row without any comes token 0.
    """
    batch, nodes, columns = check_tree(tree, width)
    draft = tree.draft_tokens
    check_tensor("target_probs", target_probs, (batch, nodes, None), FLOATS, draft, "tree")
    check_choice("rule", rule, RULES)
    for name, value in (("threshold_single", threshold_single), ("threshold_acc", threshold_acc)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"{name} is {short(value)}; expected a number from 0 to 1")
    checked = wants_check(check, draft.device)
    native = engine("verify_sampling", draft.device, impl)
    if seed is None:
        coins, final_coins = _check_coins(coins, final_coins, draft)
        counters = (None, None)
    elif coins is not None or final_coins is not None:
        raise ValueError("coins and seed are both given; expected coins and final_coins, or seed")
    else:
        counters = as_counter("seed", seed, draft.device), as_counter("offset", offset, draft.device)
    if checked and (native is None or draft.device.type != "cpu"):
        refuse_links(tree)
        _refuse_coins(coins, final_coins)
        _refuse_tokens(draft, target_probs.shape[2])
    if native is None:
        if seed is not None:
            drawn = uniforms(*counters, batch, nodes + 1)
            coins, final_coins = drawn[:, :nodes], drawn[:, nodes]
        return _reference(tree, columns, target_probs, rule, coins, final_coins, threshold_single, threshold_acc, return_sample_p, checked)
    probs = target_probs.contiguous()
    result = empty_verified(tree, columns, probs if return_sample_p else None)
    numbers = (RULES.index(rule), float(threshold_single), float(threshold_acc))
    if native(*links_of(tree), probs, coins, final_coins, *counters, *numbers, *result) and checked:
        refuse_links(tree)
        _refuse_coins(coins, final_coins)
        _refuse_tokens(draft, target_probs.shape[2])
        _refuse_probs("target_probs", target_probs)
    return result


def _reference(
    tree: DraftTree,
    columns: int,
    target_probs: Tensor,
    rule: str,
    coins: Tensor,
    final_coins: Tensor,
    threshold_single: float,
    threshold_acc: float,
    return_sample_p: bool,
    checked: bool,
) -> Verified:
    walks = Walks(tree, columns)
    vocab = target_probs.shape[2]
    sample_p = []
    for b, (own, final) in enumerate(zip(_clamped(coins), _clamped(final_coins[:, None]))):
        tokens, used = walks.tokens[b], 0
        rejected: list[int] = []

        def choose(node: int, children: Iterator[int], b=b, own=own, tokens=tokens, rejected=rejected) -> int | None:
            nonlocal used
            p = _usable(target_probs[b, node].double().cpu())
            rejected.clear()
            left, tried = 1.0, 0.0
            for child in children:
                token = tokens[child]
                if rule == "upstream" and token in rejected:
                    continue
                chance = float(p[token]) if 0 <= token < vocab else 0.0
                if rule == "upstream":
                    coin, used = own[used], used + 1
                    accepted = chance > 0 and coin <= chance / left
                else:
                    tried += chance
                    accepted = chance > 0 and own[node] <= tried / max(threshold_acc, 1e-9)
                    accepted = accepted or (0 <= token < vocab and chance >= threshold_single)
                if accepted:
                    rejected.clear()
                    return child
                rejected.append(token)
                if rule == "target_only":
                    continue
                if checked:
                    _refuse_probs(at("target_probs", (b, node)), target_probs[b, node])
                left = float(p.sum()) - float(p[[t for t in set(rejected) if 0 <= t < vocab]].sum())
                if left <= 0:
                    return None
            return None

        path = walks.walk(b, choose)
        row = target_probs[b, path[-1]]
        if checked:
            _refuse_probs(at("target_probs", (b, path[-1])), row)
        p = _usable(row.double().cpu())
        rest = p.clone()
        rest[[t for t in rejected if 0 <= t < vocab]] = 0
        total = float(rest.sum())
        if rejected and total > 0:
            sample_p.append((rest / total).to(row))
        else:
            rest = p
            sample_p.append(row.clone())
        walks.finish(b, path, _draw(rest, final[0]))
    return walks.verified(torch.stack(sample_p) if return_sample_p else None)


def _draw(p: Tensor, coin: float) -> int:
    """The first token whose cumulative sum is more than coin * total; 0 if there is no probability."""
    sums = p.cumsum(0)
    token = int(torch.searchsorted(sums, coin * sums[-1], right=True))
    if token == len(p):  # the product rounded up to the total
        token = int(p.nonzero()[-1]) if bool(p.any()) else 0
    return token


def _usable(p: Tensor) -> Tensor:
    return torch.where((p > 0) & p.isfinite(), p, 0.0)


def _clamped(coins: Tensor) -> list[list[float]]:
    """Coins as lists of numbers in [0, 1 - 2^-24] where they were outside [0, 1); NaN becomes the upper end."""
    top = 1 - 2.0**-24
    return torch.where(coins < 1, coins.clamp(min=0), top).tolist()


def _check_coins(coins: object, final_coins: object, draft: Tensor) -> tuple[Tensor, Tensor]:
    if coins is None or final_coins is None:
        raise ValueError(f"{'coins' if coins is None else 'final_coins'} is None; expected coins and final_coins, or seed")
    dtypes = (torch.float32, torch.float64)
    check_tensor("coins", coins, tuple(draft.shape), dtypes, draft, "tree")
    check_tensor("final_coins", final_coins, (draft.shape[0],), dtypes, draft, "tree")
    return coins.double().contiguous(), final_coins.double().contiguous()


def _refuse_coins(coins: Tensor | None, final_coins: Tensor | None) -> None:
    for name, x in (("coins", coins), ("final_coins", final_coins)):
        found = None if x is None else first(~((x >= 0) & (x < 1)))
        if found is not None:
            raise ValueError(f"{at(name, found)} is {float(x[found])}; expected a number from 0 to less than 1")


def _refuse_tokens(draft: Tensor, vocab: int) -> None:
    below = draft[:, 1:]  # the root's token is not looked up
    found = first((below < 0) | (below >= vocab))
    if found is not None:
        place = at("tree.draft_tokens", (found[0], found[1] + 1))
        raise ValueError(f"{place} is {int(below[found])}; expected a token from 0 to {vocab - 1}")


def _refuse_probs(name: str, p: Tensor) -> None:
    found = first(~((p >= 0) & p.isfinite()))
    if found is not None:
        raise ValueError(f"{at(name, found)} is {float(p[found])}; expected a probability")
    found = first(p.double().sum(-1, keepdim=True) <= 0)
    if found is not None:
        place = at(name, found[:-1]) if p.dim() > 1 else name
        raise ValueError(f"{place} has a row of zeros; expected probabilities that sum to 1")
