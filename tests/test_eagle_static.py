"""Static trees, the names that the package exports, and the seam to the kernels."""

import inspect
import subprocess
import sys

import pytest
import torch

from sparse_attention import eagle
from sparse_attention.eagle import native

CHOICES = eagle.EAGLE1_MC_SIM_7B_63


def test_the_tree_of_eagle_1():
    buffers = eagle.generate_tree_buffers(CHOICES)
    assert buffers.tree_attn_mask.shape == (1, 1, 26, 26) and int(buffers.tree_attn_mask.sum()) == 92
    assert buffers.retrieve_indices.shape == (15, 6)
    nodes = [(), *sorted(CHOICES, key=lambda path: (len(path), path))]
    expected = torch.tensor([[a == b[: len(a)] for a in nodes] for b in nodes]).float()
    assert torch.equal(buffers.tree_attn_mask[0, 0], expected)
    assert buffers.tree_position_ids.tolist() == [len(path) for path in nodes]
    leaves = sorted(path for path in CHOICES if not any(other[:-1] == path for other in CHOICES))
    paths = [[nodes.index(path[:depth]) for depth in range(len(path) + 1)] for path in leaves]
    padded = [p + [-1] * (6 - len(p)) for p in paths]
    assert buffers.retrieve_indices.tolist() == sorted(padded, key=lambda p: [n if n >= 0 else 99 for n in p])


def test_tree_indices_name_a_rank_of_an_expansion():
    buffers = eagle.generate_tree_buffers(CHOICES)
    nodes = [(), *sorted(CHOICES, key=lambda path: (len(path), path))]
    expanded = [path for path in nodes if any(other[:-1] == path for other in CHOICES)]
    expected = [0] + [1 + 10 * expanded.index(path[:-1]) + path[-1] for path in nodes[1:]]
    assert buffers.tree_indices.tolist() == expected
    assert eagle.generate_tree_buffers([(1,), (0,), (0, 2)], top_k=3).tree_indices.tolist() == [0, 1, 2, 6]


def test_a_static_tree_is_verified_like_a_drafted_one():
    buffers = eagle.generate_tree_buffers(CHOICES)
    tokens = torch.arange(26)[None]
    tree = eagle.assemble_tree(tokens, buffers.parents[None], row_order="sorted")
    assert torch.equal(eagle.trim_retrieve_indices(tree.retrieve_indices[0], tree.leaf_count[0], tree.width[0]), buffers.retrieve_indices)
    assert torch.equal(tree.first_child[0], buffers.first_child) and torch.equal(tree.next_sibling[0], buffers.next_sibling)
    links = {"first_child": buffers.first_child[None], "next_sibling": buffers.next_sibling[None]}
    bare = eagle.DraftTree(tokens, retrieve_indices=buffers.retrieve_indices[None], **links)
    targets = buffers.parents.new_full((1, 26), -1)
    targets[0, buffers.parents[1:]] = torch.arange(1, 26)  # each node wants its last child
    for impl in ("native", "reference"):
        verified = eagle.verify_greedy(bare, target_tokens=targets, impl=impl)
        assert verified.accept_index.shape == (1, 6)
        row = buffers.retrieve_indices[int(verified.best_candidate)]
        assert torch.equal(row[: int(verified.accept_length) + 1], verified.accept_index[0, : int(verified.accept_length) + 1])


def test_malformed_choices():
    def refused(message, choices, **kwargs):
        with pytest.raises(ValueError, match=message):
            eagle.generate_tree_buffers(choices, **kwargs)

    refused(r"choices has \(0, 1\) and not \(0,\); expected the path to the parent", [(1,), (0, 1)])
    refused(r"choices has \(0,\) twice", [(0,), (0,)])
    refused(r"choices has \(\); expected a path of ranks from 0 to 9", [()])
    refused(r"choices has \(10,\); expected a path of ranks from 0 to 9", [(10,)])
    refused(r"choices has \(-1,\)", [(-1,)])
    refused("top_k is 0; expected an integer of at least 1", [(0,)], top_k=0)
    assert eagle.generate_tree_buffers([]).retrieve_indices.tolist() == [[0]]


def test_exported_names():
    assert eagle.__all__ == sorted(eagle.__all__) and len(set(eagle.__all__)) == len(eagle.__all__)
    public = {name for name, value in vars(eagle).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert public == set(eagle.__all__)
    undocumented = [name for name in eagle.__all__ if name != "EAGLE1_MC_SIM_7B_63" and not inspect.getdoc(getattr(eagle, name))]
    assert undocumented == []


def test_the_package_does_not_import_eagle():
    script = "import sys, sparse_attention; print(any('eagle' in name for name in sys.modules))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


def test_a_named_impl_never_falls_back(monkeypatch):
    """A device without a compiled function: auto takes the reference, native says so."""

    class Kernels:
        @staticmethod
        def eagle_select(scores, out):
            out.zero_()
            return False

    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(native, "_cuda", lambda device: Kernels)
    assert native.engine("select", cuda, "native") is Kernels.eagle_select
    assert native.engine("commit", cuda, "auto") is None and native.engine("select", cuda, "reference") is None
    with pytest.raises(ValueError, match="impl is 'native'; expected 'auto' or 'reference' for commit on cuda:0"):
        native.engine("commit", cuda, "native")
    with pytest.raises(ValueError, match="impl is 'native'; expected 'auto' or 'reference' for select on meta"):
        native.engine("select", torch.device("meta"), "native")
