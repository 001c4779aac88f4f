"""verify_sampling: EAGLE's walk with given coins, SGLang's golden vectors, the law of what is sampled, and the counter's numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from sparse_attention import eagle
from tests import eagle_upstream as upstream
from tests.eagle_trees import likely_logits, random_tree
from tests.test_eagle_greedy import golden_tree

IMPLS = ("native", "reference")
RULES = ("upstream", "target_only")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def coins_for(nodes, seed, batch=1):
    rng = torch.Generator().manual_seed(seed)
    return {"coins": torch.rand(batch, nodes, generator=rng), "final_coins": torch.rand(batch, generator=rng)}


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 50), st.integers(1, 12), st.integers(0, 10**6), st.sampled_from([0.0, 2.0, 6.0]))
def test_equals_upstream_with_given_coins(nodes, reach, seed, favour):
    tree = random_tree(nodes, seed, reach=reach)
    probs = likely_logits(tree, 40, seed, favour).softmax(2)
    coins = coins_for(nodes, seed)
    rows = eagle.trim_retrieve_indices(tree.retrieve_indices[0], tree.leaf_count[0], tree.width[0])
    best, length, sample_p, _ = upstream.evaluate_sampling(probs[0], tree.draft_tokens, rows, coins["coins"][0].tolist())
    for impl in IMPLS:
        got = eagle.upstream_view(eagle.verify_sampling(tree, probs, **coins, return_sample_p=True, impl=impl))
        assert (int(got[0]), int(got[1])) == (best, length)
        torch.testing.assert_close(got[2], sample_p)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(0, 10**6),
    st.sampled_from(RULES),
    st.sampled_from(DTYPES),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from([7, 1100]),
    st.integers(1, 20),
)
def test_native_equals_the_reference(nodes, seed, rule, dtype, single, acc, vocab, width):
    tree = random_tree(nodes, seed, reach=4, batch=3, vocab=max(vocab, 40))
    tree = tree._replace(draft_tokens=tree.draft_tokens % vocab)  # now some siblings hold the same token
    probs = likely_logits(tree, vocab, seed, 3.0).softmax(2).to(dtype)
    probs = torch.where(probs < 0.1 * probs.amax(2, keepdim=True), 0, probs)  # as top-p leaves it
    options = {"rule": rule, "threshold_single": single, "threshold_acc": acc, "width": min(width, nodes), "return_sample_p": True}
    for source in (coins_for(nodes, seed, 3), {"seed": seed, "offset": 2**33 + 5}):
        a, b = (eagle.verify_sampling(tree, probs, **source, **options, impl=impl) for impl in IMPLS)
        for field in ("accept_index", "accept_length", "predicts", "next_token", "best_candidate"):
            assert torch.equal(getattr(a, field), getattr(b, field)), field
        torch.testing.assert_close(a.sample_p, b.sample_p)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "threshold, predicts, accept_index, count",
    [
        (1.0, [3, -1, -1, 4, 5, 18, 11, -1, -1, -1, 12, 18], [[0, 3, 4, 5], [6, 10, 11, -1]], [3, 2]),
        (0.0, [1, 2, 18, -1, -1, -1, 11, -1, -1, -1, 12, 18], [[0, 1, 2, -1], [6, 10, 11, -1]], [2, 2]),
    ],
)
def test_sglang_golden_vectors(threshold, predicts, accept_index, count, impl):
    logits = torch.ones(2, 6, 20)
    likely = {(0, 0): 3, (0, 3): 4, (0, 4): 5, (1, 0): 11, (1, 4): 12}
    for b in range(2):
        for n in range(6):
            logits[b, n, likely.get((b, n), 18)] = 10
    probs = (logits / 0.01).softmax(2)
    thresholds = {"threshold_single": threshold, "threshold_acc": threshold}
    verified = eagle.verify_sampling(golden_tree(), probs, rule="target_only", **coins_for(6, 1, 2), **thresholds, width=4, impl=impl)
    got = eagle.engines_view(verified)
    assert [x.tolist() for x in got] == [predicts, accept_index, count]


@pytest.mark.parametrize("impl, requests", [("native", 40000), ("reference", 1500)])
@pytest.mark.parametrize("rule", RULES)
def test_what_is_sampled_has_the_law_of_the_target(rule, impl, requests):
    """The first token has the root's law; the second, where the first was a drafted one, has the law of its node."""
    vocab = 6
    single = eagle.assemble_tree(torch.tensor([[0, 2, 4, 1, 3, 4]]), torch.tensor([[-1, 0, 0, 1, 1, 2]]))
    tree = eagle.DraftTree(*(x.repeat(requests, *[1] * (x.dim() - 1)) for x in single))
    rows = torch.tensor([[0.1, 0.05, 0.3, 0.15, 0.25, 0.15], [0.2, 0.3, 0, 0.25, 0.05, 0.2], [0.5, 0, 0, 0.1, 0.4, 0]])
    probs = rows[[0, 1, 2, 0, 1, 2]].expand(requests, 6, vocab)
    verified = eagle.verify_sampling(tree, probs, rule=rule, seed=11, offset=1, impl=impl)
    first = verified.predicts[:, 0]

    def fits(tokens, law):
        counts = tokens.bincount(minlength=vocab)
        assert int(counts[law == 0].sum()) == 0
        return chisquare(counts[law > 0], law[law > 0].double() / law.double().sum() * len(tokens)).pvalue

    assert fits(first, rows[0]) > 1e-3
    for token, node in ((2, 1), (4, 2)):
        assert fits(verified.predicts[first == token, node], rows[node]) > 1e-3
    assert set(verified.accept_length.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("impl", IMPLS)
def test_coins_at_the_edges(impl):
    tree = eagle.assemble_tree(torch.tensor([[0, 1, 2]]), torch.tensor([[-1, 0, 0]]))
    probs = torch.tensor([[[0.5, 0.0, 0.5], [0.25, 0.75, 0.0], [1.0, 0.0, 0.0]]])

    def sample(coins, final=0.0, **kwargs):
        return eagle.verify_sampling(tree, probs, coins=torch.tensor([coins]), final_coins=torch.tensor([final]), impl=impl, **kwargs)

    assert sample([0.0, 0.5, 0.0]).accept_index.tolist() == [[0, 2, -1]]  # no coin accepts token 1, whose probability is 0
    assert sample([0.0, 0.6, 0.0]).accept_index.tolist() == [[0, -1, -1]]
    assert sample([0.0, 0.6, 0.0]).next_token.tolist() == [0]  # tokens 1 and 2 were rejected
    assert sample([0.0, 0.5, 0.0], rule="target_only").accept_index.tolist() == [[0, 2, -1]]
    plain = eagle.DraftTree(torch.tensor([[0]]), first_child=torch.tensor([[-1]]), next_sibling=torch.tensor([[-1]]))
    for final, token in ((0.0, 1), (0.25, 1), (0.5, 3), (0.75, 3), (1 - 2.0**-24, 3)):  # on a boundary the later token
        row = torch.tensor([[[0.0, 0.5, 0.0, 0.5, 0.0]]])
        coins = {"coins": torch.zeros(1, 1), "final_coins": torch.tensor([final])}
        assert eagle.verify_sampling(plain, row, **coins, impl=impl).next_token.tolist() == [token]
    last = sample([0.0, 0.6, 0.0], final=1 - 2.0**-24, return_sample_p=True)
    assert last.next_token.tolist() == [0] and last.sample_p.tolist() == [[1.0, 0.0, 0.0]]
    assert sample([1 - 2.0**-24] * 3, rule="target_only").next_token.tolist() == [0]
    with pytest.raises(ValueError, match=r"coins\[0, 1\] is 1.0; expected a number from 0 to less than 1"):
        sample([0.0, 1.0, 0.0])
    with pytest.raises(ValueError, match=r"final_coins\[0\] is -0.5; expected a number"):
        sample([0.0, 0.0, 0.0], final=-0.5)
    with pytest.raises(ValueError, match=r"coins\[0, 0\] is nan"):
        sample([torch.nan, 0.0, 0.0])
    clamped = sample([torch.nan, 7.0, -1.0], final=9.0, check=False)
    exact = sample([1 - 2.0**-24, 1 - 2.0**-24, 0.0], final=1 - 2.0**-24)
    assert all(x is None or torch.equal(x, y) for x, y in zip(clamped, exact))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rule", RULES)
def test_what_was_rejected_above_the_last_node_is_not_missing_there(rule, impl):
    tree = eagle.assemble_tree(torch.tensor([[0, 1, 2]]), torch.tensor([[-1, 0, 0]]))
    probs = torch.tensor([[[0.1, 0.1, 0.8], [1.0, 0, 0], [0.2, 0.7, 0.1]]])
    coins = {"coins": torch.tensor([[0.5, 0.5, 0.5]]), "final_coins": torch.tensor([0.5])}
    for width in (2, 3):  # the walk is full, or finds no child
        verified = eagle.verify_sampling(tree, probs, **coins, rule=rule, width=width, return_sample_p=True, impl=impl)
        assert verified.accept_index[0, :2].tolist() == [0, 2] and verified.next_token.tolist() == [1]
        assert torch.equal(verified.sample_p[0], probs[0, 2])


@pytest.mark.parametrize("impl", IMPLS)
def test_probabilities_that_are_none(impl):
    tree = eagle.assemble_tree(torch.tensor([[0, 1]]), torch.tensor([[-1, 0]]))
    coins = {"coins": torch.tensor([[0.9, 0.9]]), "final_coins": torch.tensor([0.9])}
    for bad, said in (([torch.nan, 0.2, 0.1], "nan"), ([0.5, 0.2, -0.1], "-0.1"), ([torch.inf, 0.2, 0.5], "inf")):
        probs = torch.tensor([[bad, [1.0, 0, 0]]])
        with pytest.raises(ValueError, match=rf"target_probs.*\] is {said}.*; expected a probability"):
            eagle.verify_sampling(tree, probs, **coins, impl=impl)
        free = eagle.verify_sampling(tree, probs, **coins, impl=impl, check=False)
        assert free.accept_length.tolist() == [0] and 0 <= int(free.next_token) < 3
    nothing = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=r"target_probs\[0, [01]\] has a row of zeros; expected"):
        eagle.verify_sampling(tree, nothing, **coins, impl=impl)
    assert eagle.verify_sampling(tree, nothing, **coins, impl=impl, check=False).next_token.tolist() == [0]
    certain = torch.tensor([[[0.0, 0.0, 1.0], [0, 0, 1]]])
    assert eagle.verify_sampling(tree, certain, **coins, impl=impl).next_token.tolist() == [2]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("impl", IMPLS)
def test_tokens_and_links_that_are_none(rule, impl):
    probs = torch.full((1, 4, 3), 1 / 3)
    coins = coins_for(4, 0)
    tree = eagle.assemble_tree(torch.tensor([[99, 1, 7, -2]]), torch.tensor([[-1, 0, 0, 0]]))
    with pytest.raises(ValueError, match=r"tree.draft_tokens\[0, 2\] is 7; expected a token from 0 to 2"):
        eagle.verify_sampling(tree, probs, **coins, rule=rule, impl=impl)
    for seed in range(20):
        verified = eagle.verify_sampling(tree, probs, **coins_for(4, seed), rule=rule, impl=impl, check=False)
        assert verified.accept_index.tolist() in ([[0, -1, -1, -1]], [[0, 1, -1, -1]]) and 0 <= int(verified.next_token) < 3
    circle = tree._replace(draft_tokens=torch.zeros(1, 4).long(), next_sibling=torch.tensor([[-1, 2, 1, -1]]))
    with pytest.raises(ValueError, match="lead to node 1 2 times"):
        eagle.verify_sampling(circle, probs, **coins, rule=rule, impl=impl)
    assert int(eagle.verify_sampling(circle, probs, **coins, rule=rule, impl=impl, check=False).accept_length) <= 3


def test_uniforms_are_philox():
    """The known answers of Random123's kat_vectors for philox4x32-10, less their lowest 8 bits."""

    def words(seed, offset, batch, count):
        numbers = eagle.uniforms(torch.tensor([seed]), torch.tensor([offset]), batch, count)
        assert numbers.dtype == torch.float32 and bool(((numbers >= 0) & (numbers < 1)).all())
        return (numbers.double() * 2**24).long()

    assert words(0, 0, 1, 4).tolist() == [[x >> 8 for x in (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)]]
    many = words(123, 45, 300, 70)
    assert torch.equal(words(123, 45, 2, 9), many[:2, :9])  # for any batch and count
    assert not torch.equal(words(123, 46, 2, 9), many[:2, :9])
    assert many.unique().numel() > 0.99 * many.numel()
    assert abs(float(many.double().mean()) / 2**24 - 0.5) < 0.01


def test_wrong_arguments_are_named():
    tree = random_tree(5, 0)
    probs = torch.full((1, 5, 40), 1 / 40)
    coins = coins_for(5, 0)

    def refused(message, **kwargs):
        with pytest.raises(ValueError, match=message):
            eagle.verify_sampling(tree, probs, **kwargs)

    refused("coins is None; expected coins and final_coins, or seed")
    refused("final_coins is None; expected", coins=coins["coins"])
    refused("coins and seed are both given", seed=1, **coins)
    refused("seed is -1; expected an integer from 0", seed=-1)
    refused("offset is 1.5; expected an integer", seed=1, offset=1.5)
    refused(r"seed is a torch.int32 tensor of shape \(\) on cpu; expected one int64 on cpu", seed=torch.tensor(1, dtype=torch.int32))
    refused(r"coins has shape \(1, 4\); expected \[1, 5\]", coins=torch.zeros(1, 4), final_coins=coins["final_coins"])
    half = {**coins, "coins": coins["coins"].half()}
    refused("coins has dtype torch.float16; expected torch.float32 or torch.float64", **half)
    refused("rule is 'typical'; expected one of 'upstream', 'target_only'", rule="typical", seed=1)
    refused("threshold_single is 1.5; expected a number from 0 to 1", seed=1, threshold_single=1.5)
    refused("threshold_acc is nan; expected a number", seed=1, threshold_acc=float("nan"))
