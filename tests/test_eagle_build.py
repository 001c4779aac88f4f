"""build_tree, select_tree and build: equal to EAGLE's formulas, closed under ancestors where EAGLE's are not, and strict about inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attention import eagle
from tests import eagle_upstream as upstream
from tests.eagle_trees import leaf_paths, parent_lists, path

IMPLS = ("native", "reference", "incremental", "rebuild")
SIZES = [(7, 10, 59), (5, 10, 59), (3, 4, 20), (1, 3, 12), (4, 1, 5), (2, 2, 1), (0, 6, 6)]  # depth, top_k, total_tokens


def batch_of(depth, top_k, seeds, **kwargs):
    return [torch.stack(x) for x in zip(*(upstream.draft_candidates(depth, top_k, seed, **kwargs) for seed in seeds))]


def equal_trees(a, b):
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("depth, top_k, total", SIZES)
@pytest.mark.parametrize("row_order", ["leaf", "sorted"])
def test_equals_upstream(depth, top_k, total, row_order, impl):
    scores, tokens, parents = batch_of(depth, top_k, range(4))
    roots = torch.tensor([5, 6, 7, 8])
    tree = eagle.build_tree(scores, tokens, parents, total, roots, mask="float", row_order=row_order, impl=impl)
    assert tree.retrieve_indices.shape == (4, total + 1, min(total + 1, depth + 2))
    for b in range(4):
        selected = upstream.select(scores[b], total)
        draft, rows, mask, positions, above = upstream.build(selected, tokens[b], parents[b], int(roots[b]), top_k, row_order == "sorted")
        assert torch.equal(tree.draft_tokens[b], draft[0])
        assert torch.equal(tree.tree_mask[b], mask[0])
        assert torch.equal(tree.depths[b], positions)
        assert tree.parents[b].tolist() == [-1, *above]
        assert torch.equal(eagle.trim_retrieve_indices(tree.retrieve_indices[b], tree.leaf_count[b], tree.width[b]), rows)
        assert bool((tree.retrieve_indices[b, len(rows) :] == -1).all())
        assert bool((tree.retrieve_indices[b, :, rows.shape[1] :] == -1).all())
    assert tree.orphans.tolist() == [0] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_build_takes_upstreams_selection_in_half_precision(dtype):
    compared = 0
    for seed in range(8):
        scores, tokens, parents = upstream.draft_candidates(5, 10, seed, dtype=dtype)
        selected = upstream.select(scores, 59)
        _, rows, mask, positions, above = upstream.build(selected, tokens, parents, 1, 10, False)
        if any(a > n for n, a in enumerate(above)):
            continue  # upstream attached an orphan to a wrong node
        tree = eagle.build(selected[None], tokens[None], parents[None], torch.tensor([1]), mask="float")
        assert torch.equal(tree.tree_mask, mask) and torch.equal(tree.depths[0], positions)
        assert torch.equal(eagle.trim_retrieve_indices(tree.retrieve_indices[0], tree.leaf_count[0], tree.width[0]), rows)
        compared += 1
    assert compared > 0


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_selection_orders_ties_by_index_and_keeps_ancestors(dtype, impl):
    tied = 0
    for seed in range(6):
        # A draft this sure of itself gives log-probabilities of exactly 0, so that children tie with their parents.
        scores, tokens, parents = upstream.draft_candidates(6, 8, seed, dtype=dtype, peak=8.0)
        expected = sorted(sorted(range(len(scores)), key=lambda f: (-float(scores[f]), f))[:40])
        selected = eagle.select_tree(scores[None], 40, impl=impl)
        assert selected[0].tolist() == expected
        tree = eagle.build_tree(scores[None], tokens[None], parents[None], 40, torch.tensor([0]), impl=impl)
        assert int(tree.orphans) == 0
        ranked = scores.sort(descending=True).values
        tied += bool(ranked[39] == ranked[40])
        if ranked[39] != ranked[40]:
            assert torch.equal(selected[0], upstream.select(scores, 40))
    if dtype in (torch.bfloat16, torch.float16):
        assert tied > 0


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_selection_of_special_scores(impl):
    scores = torch.tensor([[0.0, -0.0, -torch.inf, -1.0, 0.0, -torch.inf]])
    assert eagle.select_tree(scores, 2, impl=impl).tolist() == [[0, 1]]
    assert eagle.select_tree(scores, 5, impl=impl).tolist() == [[0, 1, 2, 3, 4]]
    assert eagle.select_tree(scores, 6, impl=impl).tolist() == [[0, 1, 2, 3, 4, 5]]
    scores[0, 1] = torch.nan
    assert eagle.select_tree(scores, 4, impl=impl, check=False).tolist() == [[0, 1, 3, 4]]
    with pytest.raises(ValueError, match=r"scores\[0, 1\] is nan; expected a number"):
        eagle.select_tree(scores, 4, impl=impl)
    with pytest.raises(ValueError, match=r"scores\[0, 1\] is nan"):
        eagle.build_tree(scores, torch.zeros(1, 6).long(), torch.zeros(1, 1).long(), 3, torch.tensor([0]), impl=impl)


@settings(max_examples=60, deadline=None)
@given(parent_lists(), st.sampled_from(["leaf", "sorted"]), st.sampled_from(IMPLS))
def test_any_tree_against_lists_and_sets(parents, row_order, impl):
    nodes = len(parents)
    tree = eagle.assemble_tree(torch.arange(nodes)[None], torch.tensor([parents]), row_order=row_order, impl=impl)
    paths = leaf_paths(parents, row_order)
    assert int(tree.leaf_count) == len(paths) and int(tree.width) == max(map(len, paths))
    padded = [p + [-1] * (nodes - len(p)) for p in paths] + [[-1] * nodes] * (nodes - len(paths))
    assert tree.retrieve_indices[0].tolist() == padded
    assert tree.depths[0].tolist() == [len(path(parents, n)) - 1 for n in range(nodes)]
    children = [[c for c in range(nodes) if parents[c] == n] for n in range(nodes)]
    assert tree.first_child[0].tolist() == [c[0] if c else -1 for c in children]
    after = {c: d for cs in children for c, d in zip(cs, cs[1:])}
    assert tree.next_sibling[0].tolist() == [after.get(n, -1) for n in range(nodes)]
    assert tree.parents[0].tolist() == parents


# SGLang's golden trees (test_build_eagle_tree.py): its parent_list is EAGLE's parents less 1, its selection as given there.
SGLANG_PARENTS = [[-1, 0, 1, 2, 3, 4, 8, 9, 10, 20, 24, 21, 28], [-1, 0, 1, 2, 3, 4, 5, 6, 7, 24, 28, 20, 21]]
SGLANG_SELECTED = [[0, 1, 4, 8, 20, 24, 36], [0, 4, 5, 6, 7, 24, 36]]


@pytest.mark.parametrize("impl", IMPLS)
def test_sglang_golden_trees(impl):
    parents = torch.tensor(SGLANG_PARENTS) + 1
    tokens = torch.arange(104).view(2, 52)
    tree = eagle.build(torch.tensor(SGLANG_SELECTED), tokens, parents, torch.tensor([29974, 13]), impl=impl)
    positions = (tree.depths + torch.tensor([[5], [10]])).flatten().tolist()
    assert positions == [5, 6, 6, 7, 7, 8, 8, 9, 10, 11, 12, 12, 12, 12, 13, 14]
    assert tree.first_child.tolist() == [[1, 3, 4, 5, 6, 7, -1, -1], [1, 2, -1, 6, -1, -1, 7, -1]]
    assert tree.next_sibling.tolist() == [[-1, 2, -1, -1, -1, -1, -1, -1], [-1, -1, 3, 4, 5, -1, -1, -1]]


@pytest.mark.parametrize("impl", IMPLS)
def test_one_node_and_all_nodes(impl):
    root = eagle.assemble_tree(torch.tensor([[9]]), torch.tensor([[-1]]), impl=impl)
    assert root.retrieve_indices.tolist() == [[[0]]] and root.leaf_count.tolist() == [1] and root.width.tolist() == [1]
    assert root.first_child.tolist() == [[-1]] and root.tree_mask.tolist() == [[[True]]]
    scores, tokens, parents = (x[None] for x in upstream.draft_candidates(2, 3, 0))
    everything = eagle.build_tree(scores, tokens, parents, scores.shape[1], torch.tensor([1]), impl=impl)
    assert everything.draft_tokens[0, 1:].tolist() == tokens[0].tolist() and int(everything.orphans) == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_out_is_filled_and_returned(impl):
    scores, tokens, parents = batch_of(3, 4, (1, 2))
    roots = torch.tensor([0, 1])
    for mask in ("bool", "bits", "none"):
        out = eagle.empty_tree(2, 13, 5, mask=mask)
        for x in out:
            if x is not None:
                x.fill_(True if x.dtype == torch.bool else 77)
        tree = eagle.build_tree(scores, tokens, parents, 12, roots, mask=mask, impl=impl, out=out)
        assert tree is out
        assert equal_trees(tree, eagle.build_tree(scores, tokens, parents, 12, roots, mask=mask, impl="reference"))


@pytest.mark.parametrize("impl", IMPLS)
def test_an_orphan_is_refused_or_left_out(impl):
    scores, tokens, parents = (x[None] for x in upstream.draft_candidates(3, 4, 3))
    selected = torch.tensor([[0, 4, 5, 36]])  # candidate 36 continues one that is not selected; 4 and 5 continue candidate 0
    with pytest.raises(ValueError, match=r"selected\[0, 3\] is 36, a child of candidate \d+; expected that candidate to be selected too"):
        eagle.build(selected, tokens, parents, torch.tensor([0]), impl=impl)
    tree = eagle.build(selected, tokens, parents, torch.tensor([0]), impl=impl, check=False)
    assert tree.parents.tolist() == [[-1, 0, 1, 1, -1]] and tree.orphans.tolist() == [1]
    assert tree.depths.tolist() == [[0, 1, 2, 2, 0]]
    assert tree.tree_mask[0, 4].tolist() == [False, False, False, False, True]
    assert tree.leaf_count.tolist() == [2] and tree.retrieve_indices[0, :3, :3].tolist() == [[0, 1, 2], [0, 1, 3], [-1, -1, -1]]
    assert tree.first_child.tolist() == [[1, 2, -1, -1, -1]] and tree.next_sibling.tolist() == [[-1, -1, 3, -1, -1]]


@pytest.mark.parametrize("impl", IMPLS)
def test_malformed_selections(impl):
    scores, tokens, parents = (x[None] for x in upstream.draft_candidates(3, 4, 3))
    root = torch.tensor([0])

    def refused(message, selected=((0, 1),), parents=parents):
        with pytest.raises(ValueError, match=message):
            eagle.build(torch.tensor(selected), tokens, parents, root, impl=impl)
        tree = eagle.build(torch.tensor(selected), tokens, parents, root, impl=impl, check=False)
        assert int(tree.width) <= len(selected[0]) + 1
        return tree

    refused(r"selected\[0, 1\] is 99; expected a candidate from 0 to 51", ((0, 99),))
    refused(r"selected\[0, 0\] is -5; expected a candidate", ((-5, 0),))
    refused(r"selected\[0, 1\] is 2; expected more than 2", ((2, 2),))
    late, negative = parents.clone(), parents.clone()
    late[0, 1] = 9  # candidates 4 to 7 continue candidate 8
    refused(r"parents\[0, 1\] is 9; expected 0 for the root, or 1 \+ the index of a candidate before 4", ((0, 4, 8),), late)
    own = parents.clone()
    own[0, 1] = 5  # candidate 4 continues itself
    refused(r"parents\[0, 1\] is 5; .* parents precede their children", ((0, 4),), own)
    negative[0, 1] = -3
    refused(r"parents\[0, 1\] is -3; expected 0 for the root", ((0, 4),), negative)
    huge = parents.clone()
    huge[0, 1] = 2**62
    refused(r"parents\[0, 1\] is 4611686018427387904", ((0, 4),), huge)


@pytest.mark.parametrize("impl", IMPLS)
def test_max_depth_bounds_the_rows(impl):
    chain = torch.tensor([[-1, 0, 1, 2, 0]])
    with pytest.raises(ValueError, match="max_depth is 1; expected at least 3, the depth of the deepest node"):
        eagle.assemble_tree(torch.zeros(1, 5).long(), chain, max_depth=1, impl=impl)
    tree = eagle.assemble_tree(torch.zeros(1, 5).long(), chain, max_depth=1, impl=impl, check=False)
    assert tree.retrieve_indices[0, :2].tolist() == [[0, 1], [0, 4]] and tree.width.tolist() == [4]
    assert eagle.assemble_tree(torch.zeros(1, 5).long(), chain, max_depth=3, impl=impl).retrieve_indices.shape == (1, 5, 4)


def test_wrong_arguments_are_named():
    scores, tokens, parents = (x[None] for x in upstream.draft_candidates(2, 3, 0))
    root = torch.tensor([0])

    def refused(message, **changed):
        arguments = {"scores": scores, "tokens": tokens, "parents": parents, "total_tokens": 8, "root_tokens": root, **changed}
        with pytest.raises(ValueError, match=message):
            eagle.build_tree(**arguments)

    refused(r"scores has dtype torch.int64; expected torch.float32 or", scores=tokens)
    refused(r"scores has shape \(21,\); expected \[\*, \*\]", scores=scores[0])
    refused(r"scores is None; expected a tensor", scores=None)
    refused(r"tokens has dtype torch.int32; expected torch.int64", tokens=tokens.int())
    refused(r"tokens has shape \(1, 20\); expected \[1, 21\]", tokens=tokens[:, :20])
    refused(r"parents has shape \(1, 4\), 4 rows; expected a divisor of the 21 candidates", parents=parents[:, :4])
    refused(r"root_tokens has shape \(2,\); expected \[1\]", root_tokens=torch.tensor([0, 1]))
    refused(r"total_tokens is 22; expected an integer from 1 to 21", total_tokens=22)
    refused(r"total_tokens is 0; expected an integer from 1", total_tokens=0)
    refused(r"mask is 'bits128'; expected one of 'bool'", mask="bits128")
    refused(r"row_order is 'depth'; expected one of 'leaf', 'sorted'", row_order="depth")
    refused(r"impl is 'cuda'; expected one of 'auto', 'native'", impl="cuda")
    refused(r"max_depth is -1; expected an integer of at least 0", max_depth=-1)
    refused(r"out is list; expected a DraftTree", out=[])
    refused(r"out.draft_tokens is \(1, 8\); expected a tensor of shape \(1, 9\)", out=eagle.empty_tree(1, 8, 4))
    refused(r"out.tree_mask is given; expected a tensor unless mask is 'none'", out=eagle.empty_tree(1, 9, 4), mask="none")
    refused(r"tokens is on meta; expected cpu, the device of scores", tokens=tokens.to("meta"))


def test_profile_has_the_sections_and_keeps_them():
    scores, tokens, parents = (x[None] for x in upstream.draft_candidates(3, 4, 0))
    expected = {
        "native": {"total", "preallocation", "mask"},
        "incremental": {"total", "preallocation", "mask", "retrieve_indices"},
        "rebuild": {"total", "preallocation", "mask", "tolist", "retrieve_indices"},
    }
    for impl, sections in expected.items():
        profile = eagle.Profile()
        for _ in range(3):
            eagle.build_tree(scores, tokens, parents, 20, torch.tensor([0]), impl=impl, profile=profile)
        report = profile.report()
        assert set(report) == sections and profile.report() == report
        parts = sum(report[name]["sum"] for name in sections - {"total"})
        assert report["total"]["calls"] == 3 and 0 < parts <= report["total"]["sum"]
        profile.clear()
        assert profile.report() == {}
