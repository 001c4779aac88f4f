"""verify_greedy: EAGLE's evaluate_posterior, SGLang's golden vectors, every dtype, and links that are no tree."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attention import eagle
from tests import eagle_upstream as upstream
from tests.eagle_trees import likely_logits, path, random_tree

IMPLS = ("native", "reference")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def rows_of(tree, b):
    return eagle.trim_retrieve_indices(tree.retrieve_indices[b], tree.leaf_count[b], tree.width[b])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 8), st.integers(0, 10**6), st.sampled_from(["leaf", "sorted"]), st.sampled_from(DTYPES))
def test_equals_upstream(nodes, reach, seed, row_order, dtype):
    tree = random_tree(nodes, seed, reach=reach, row_order=row_order)
    logits = likely_logits(tree, 40, seed).to(dtype)
    best, length, sample_p = upstream.evaluate_greedy(logits[0], tree.draft_tokens, rows_of(tree, 0))
    for impl in IMPLS:
        verified = eagle.verify_greedy(tree, logits, return_sample_p=True, impl=impl)
        got = eagle.upstream_view(verified)
        assert (int(got[0]), int(got[1])) == (best, length) and torch.equal(got[2], sample_p)
        assert int(verified.next_token) == int(sample_p.argmax())
        by_tokens = eagle.verify_greedy(tree, target_tokens=logits.argmax(2), impl=impl)
        for field in ("accept_index", "accept_length", "predicts", "next_token", "best_candidate"):
            assert torch.equal(getattr(by_tokens, field), getattr(verified, field))
        parents = tree.parents[0].tolist()
        taken = [n for n in verified.accept_index[0].tolist() if n >= 0]
        assert taken == path(parents, taken[-1]) and len(taken) == length + 1
        follows = [int(tree.draft_tokens[0, n]) for n in taken[1:]] + [int(verified.next_token)]
        assert [int(verified.predicts[0, n]) for n in taken] == follows
        assert int((verified.predicts >= 0).sum()) == len(taken)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_batch_is_its_requests(impl):
    tree = random_tree(30, 3, batch=5)
    logits = likely_logits(tree, 40, 4)
    together = eagle.verify_greedy(tree, logits, return_sample_p=True, impl=impl)
    assert together.accept_length.unique().numel() > 1
    for b in range(5):
        one = eagle.DraftTree(*(x[b : b + 1] for x in tree))
        alone = eagle.verify_greedy(one, logits[b : b + 1], return_sample_p=True, impl=impl)
        assert all(torch.equal(x, y[b : b + 1]) for x, y in zip(alone, together))


@pytest.mark.parametrize("impl", IMPLS)
def test_everything_and_nothing_accepted(impl):
    tree = random_tree(12, 1, reach=1)  # a chain
    logits = torch.zeros(1, 12, 40)
    for n in range(1, 12):
        logits[0, n - 1, tree.draft_tokens[0, n]] = 1
    logits[0, 11, 7] = 1
    everything = eagle.verify_greedy(tree, logits, impl=impl)
    assert everything.accept_index.tolist() == [list(range(12))] and everything.next_token.tolist() == [7]
    capped = eagle.verify_greedy(tree, logits, width=4, impl=impl)
    assert capped.accept_index.tolist() == [[0, 1, 2, 3]] and capped.next_token.tolist() == [int(tree.draft_tokens[0, 4])]
    none = eagle.verify_greedy(tree, target_tokens=torch.full((1, 12), -7), impl=impl)
    assert none.accept_index.tolist() == [[0] + [-1] * 11] and none.next_token.tolist() == [-7] and none.best_candidate.tolist() == [0]
    root = eagle.assemble_tree(torch.tensor([[3]]), torch.tensor([[-1]]))
    alone = eagle.verify_greedy(root, torch.eye(9)[None, 4:5], impl=impl)
    assert alone.accept_index.tolist() == [[0]] and alone.next_token.tolist() == [4]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 7, 64, 1023, 1025, 5000])
def test_best_token(vocab, dtype, impl):
    root = eagle.assemble_tree(torch.zeros(3, 1).long(), torch.full((3, 1), -1))
    logits = torch.randn(3, 1, vocab, generator=torch.Generator().manual_seed(vocab)).to(dtype)
    logits[1] = logits[1].round()  # ties
    logits[2, 0, : vocab // 2] = torch.nan
    expected = torch.where(logits.isnan(), -torch.inf, logits).argmax(2)[:, 0]
    assert torch.equal(eagle.verify_greedy(root, logits, impl=impl).next_token, expected)
    for empty in (torch.nan, -torch.inf):
        assert eagle.verify_greedy(root, torch.full_like(logits, empty), impl=impl).next_token.tolist() == [0, 0, 0]


def golden_tree():
    """SGLang's test_speculative_decoding trees; siblings of the second do not ascend."""
    return eagle.DraftTree(
        draft_tokens=torch.arange(6).repeat(2, 1) + torch.tensor([[0], [7]]),
        first_child=torch.tensor([[1, 2, -1, 4, 5, -1], [4, 2, 3, -1, 5, -1]]),
        next_sibling=torch.tensor([[-1, 3, -1, -1, -1, -1], [-1, -1, -1, -1, 1, -1]]),
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_sglang_golden_vectors(impl):
    targets = torch.full((2, 6), 18)
    targets[0, 0], targets[0, 3], targets[0, 4], targets[1, 0], targets[1, 4] = 3, 4, 5, 11, 12
    verified = eagle.verify_greedy(golden_tree(), target_tokens=targets, width=4, impl=impl)
    predicts, accept_index, accept_token_num = eagle.engines_view(verified)
    assert predicts.tolist() == [3, -1, -1, 4, 5, 18, 11, -1, -1, -1, 12, 18]
    assert accept_index.tolist() == [[0, 3, 4, 5], [6, 10, 11, -1]] and accept_token_num.tolist() == [3, 2]
    assert {x.dtype for x in (predicts, accept_index, accept_token_num)} == {torch.int32}
    assert eagle.accepted_tokens(golden_tree(), verified) == [[0, 3, 4, 5, 18], [7, 11, 12, 18]]
    assert verified.best_candidate is None
    with pytest.raises(ValueError, match="verified.best_candidate is None"):
        eagle.upstream_view(verified)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "first_child, next_sibling, message",
    [
        ([1, -1, -1, -1], [-1, 2, 1, -1], "lead to node 1 2 times; expected one way to it"),  # siblings in a circle
        ([1, 2, 1, -1], [-1, -1, -1, -1], "lead to node 1 2 times"),  # a child is its grandparent
        ([1, 0, -1, -1], [-1, -1, -1, -1], "lead to node 0 1 times; expected none, it is the root"),
        ([1, -1, -1, -1], [-1, 1, -1, -1], "lead to node 1 2 times"),  # its own sibling
        ([9, -1, -1, -1], [-1, -1, -1, -1], r"tree.first_child\[0, 0\] is 9; expected -1 or a node from 1 to 3"),
        ([1, -1, -1, -1], [-1, -5, -1, -1], r"tree.next_sibling\[0, 1\] is -5; expected -1 or a node"),
        ([1, -1, -1, -1], [-1, 2**60, -1, -1], r"tree.next_sibling\[0, 1\] is 1152921504606846976"),
    ],
)
def test_links_that_are_no_tree_end(first_child, next_sibling, message, impl):
    tree = eagle.DraftTree(torch.tensor([[5, 5, 6, 7]]), first_child=torch.tensor([first_child]), next_sibling=torch.tensor([next_sibling]))
    for target in (5, 6, 8):  # accepted again and again, later, never
        targets = torch.full((1, 4), target)
        with pytest.raises(ValueError, match=message):
            eagle.verify_greedy(tree, target_tokens=targets, impl=impl)
        verified = eagle.verify_greedy(tree, target_tokens=targets, impl=impl, check=False)
        reference = eagle.verify_greedy(tree, target_tokens=targets, impl="reference", check=False)
        assert torch.equal(verified.accept_index, reference.accept_index) and int(verified.accept_length) <= 3


def test_wrong_arguments_are_named():
    tree = random_tree(5, 0)
    logits = torch.zeros(1, 5, 40)

    def refused(message, *args, **kwargs):
        with pytest.raises(ValueError, match=message):
            eagle.verify_greedy(*args, **kwargs)

    refused("tree is Tensor; expected a DraftTree", logits, logits)
    refused("logits and target_tokens are neither given", tree)
    refused("logits and target_tokens are both given", tree, logits, target_tokens=torch.zeros(1, 5).long())
    refused(r"logits has shape \(1, 4, 40\); expected \[1, 5, \*\]", tree, logits[:, :4])
    refused("logits has dtype torch.int64", tree, logits.long())
    refused("logits is on meta; expected cpu, the device of tree", tree, logits.to("meta"))
    refused("target_tokens has dtype torch.int32; expected torch.int64", tree, target_tokens=torch.zeros(1, 5).int())
    refused("width is 6; expected an integer from 1 to 5", tree, logits, width=6)
    refused("tree.first_child is None; expected a tensor", tree._replace(first_child=None), logits)
    tokens = torch.zeros(1, 5).long()
    refused("return_sample_p is True; expected False with target_tokens", tree, target_tokens=tokens, return_sample_p=True)
    refused("impl is 'rebuild'; expected one of 'auto', 'native', 'reference'", tree, logits, impl="rebuild")
