"""tree_mask in every form, by every way, against sets of ancestors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attention import Tree, eagle
from sparse_attention.patterns.base import Lengths
from tests.eagle_trees import parent_lists, path

IMPLS = ("native", "reference", "incremental", "rebuild")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def sees(parents: list[int]) -> torch.Tensor:
    """From sets of ancestors."""
    ancestors = [set(path(parents, node)) for node in range(len(parents))]
    return torch.tensor([[column in row for column in range(len(parents))] for row in ancestors])


@settings(max_examples=80, deadline=None)
@given(parent_lists(most=140, forest=True), st.sampled_from(IMPLS))
def test_equals_the_sets_of_ancestors(parents, impl):
    assert torch.equal(eagle.tree_mask(torch.tensor([parents]), impl=impl)[0], sees(parents))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("nodes", [1, 31, 32, 33, 63, 64, 65, 130])
def test_every_form_of_deep_trees(nodes, impl):
    rng = torch.Generator().manual_seed(nodes)
    lists = [[-1] + [int(torch.randint(max(0, n - 3), n, (), generator=rng)) for n in range(1, nodes)] for _ in range(2)]
    visible = torch.stack([sees(parents) for parents in lists])
    assert nodes < 31 or visible.sum(2).max() > 10
    parents = torch.tensor(lists)
    assert torch.equal(eagle.tree_mask(parents, "float", impl=impl), visible[:, None].float())
    for dtype in DTYPES:
        additive = eagle.tree_mask(parents, "additive", dtype=dtype, impl=impl)
        assert additive.dtype == dtype and additive.shape == (2, 1, nodes, nodes)
        assert torch.equal(additive[:, 0] == 0, visible)
        assert bool((additive[:, 0][~visible] == torch.finfo(dtype).min).all())
    for form, width in (("bits", 64), ("bits32", 32)):
        words = eagle.tree_mask(parents, form, impl=impl)
        assert words.shape == (2, nodes, -(-nodes // width))
        rows = [[sum((word % 2**width) << i * width for i, word in enumerate(row)) for row in tree] for tree in words.tolist()]
        assert rows == [[sum(1 << c for c in range(nodes) if tree[n][c]) for n in range(nodes)] for tree in visible.tolist()]
    flat = eagle.tree_mask(parents, "full", prefix_lens=[3, 0], impl=impl)
    first = torch.cat([torch.ones(nodes, 3, dtype=torch.bool), visible[0]], 1)
    assert torch.equal(flat, torch.cat([first.flatten(), visible[1].flatten()]))
    assert torch.equal(eagle.tree_mask(parents, "full", prefix_lens=torch.tensor([3, 0]), impl=impl), flat)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_parent_that_is_no_lower_node(impl):
    for bad, said in ((3, "3"), (7, "7"), (-2, "-2"), (2**40, str(2**40))):
        parents = torch.tensor([[-1, 0, 1, bad, 1]])
        with pytest.raises(ValueError, match=rf"parents\[0, 3\] is {said}; expected a node from -1 to 2: parents precede"):
            eagle.tree_mask(parents, impl=impl)
        assert torch.equal(eagle.tree_mask(parents, impl=impl, check=False)[0], sees([-1, 0, 1, -1, 1]))
    cycle = torch.tensor([[-1, 2, 1]])
    with pytest.raises(ValueError, match=r"parents\[0, 1\] is 2; expected a node from -1 to 0"):
        eagle.tree_mask(cycle, impl=impl)
    assert torch.equal(eagle.tree_mask(cycle, impl=impl, check=False)[0], sees([-1, -1, 1]))
    with pytest.raises(ValueError, match=r"parents\[0, 0\] is 0; expected -1: node 0 is the root"):
        eagle.tree_mask(torch.tensor([[0, 0]]), impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_out(impl):
    parents = torch.tensor([[-1, 0, 0, 2], [-1, 0, 1, 2]])
    for form, dtype in (("bool", torch.bool), ("float", torch.float32), ("bits", torch.int64), ("bits32", torch.int32)):
        expected = eagle.tree_mask(parents, form, impl="reference")
        out = torch.ones_like(expected)
        assert eagle.tree_mask(parents, form, impl=impl, out=out) is out and torch.equal(out, expected) and out.dtype == dtype
    roomy = torch.zeros(100, dtype=torch.bool)
    eagle.tree_mask(parents, "full", prefix_lens=[1, 2], impl=impl, out=roomy)
    exact = eagle.tree_mask(parents, "full", prefix_lens=[1, 2], impl="reference")
    assert torch.equal(roomy[: len(exact)], exact) and not roomy[len(exact) :].any()


def test_wrong_arguments_are_named():
    parents = torch.tensor([[-1, 0, 0]])

    def refused(message, *args, **kwargs):
        with pytest.raises(ValueError, match=message):
            eagle.tree_mask(*args, **kwargs)

    refused(r"parents has dtype torch.int32; expected torch.int64", parents.int())
    refused(r"parents has shape \(3,\); expected \[\*, \*\]", parents[0])
    refused(r"parents has shape \(0, 3\)", parents[:0])
    refused(r"form is 'none'; expected one of 'bool'", parents, "none")
    refused(r"impl is 'fused'; expected one of", parents, impl="fused")
    refused(r"mask dtype is torch.int8; expected torch.float32", parents, "additive", dtype=torch.int8)
    refused(r"prefix_lens is None; expected 1 lengths", parents, "full")
    refused(r"prefix_lens is \[-1\]; expected lengths of at least 0", parents, "full", prefix_lens=[-1])
    refused(r"prefix_lens is .* of shape \(2,\) on cpu; expected 1 int64 lengths", parents, "full", prefix_lens=[1, 2])
    refused(r"has 8 elements; expected at least 12", parents, "full", prefix_lens=[1], out=torch.zeros(8, dtype=torch.bool))
    refused(r"the mask of out is \(1, 2, 3\); expected a tensor of shape \(1, 3, 3\)", parents, out=torch.zeros(1, 2, 3, dtype=torch.bool))
    refused(r"the mask of out has dtype torch.float32; expected torch.bool", parents, out=torch.zeros(1, 3, 3))
    refused(r"the mask of out has strides", parents, out=torch.zeros(1, 3, 3, dtype=torch.bool).transpose(1, 2))


def test_a_tree_as_a_pattern_and_as_a_mask_agree():
    parents = (-1, 0, 0, 1, 3, 2, 4, 4)
    index = torch.arange(len(parents))
    allowed = Tree(parents).allows(index[:, None], index[None, :], Lengths(len(parents), len(parents)))
    assert torch.equal(eagle.tree_mask(torch.tensor([parents]))[0], allowed)
