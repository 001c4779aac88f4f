"""What patterns mean, refuse and promise."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attention import patterns as sp
from sparse_attention.layout import count_pairs
from sparse_attention.patterns.base import Lengths, Rects, quotient_lengths
from tests.cases import CASES, TREE, block_mask, csr
from tests.strategies import calls

BLOCKS = block_mask(5, 5)


def ancestors(node: int) -> set[int]:
    return set() if node < 0 else {node} | ancestors(TREE[node])


def power_of_two(n: int) -> bool:
    return n in {1 << p for p in range(40)}


# (pattern, q_len, kv_len, the table's definition: i and j as plain ints)
MEANINGS = [
    (sp.Dense(), 40, 50, lambda i, j: True),
    (sp.Causal(), 40, 50, lambda i, j: j <= i),
    (sp.Causal(), 50, 40, lambda i, j: j <= i),
    (sp.SlidingWindow(7), 40, 50, lambda i, j: 0 <= i - j < 7),
    (sp.SlidingWindow(7, causal=False), 50, 40, lambda i, j: abs(i - j) <= 7),
    (sp.Dilated(5, 3), 50, 60, lambda i, j: i - j in {0, 3, 6, 9, 12}),
    (sp.Dilated(2, 3, causal=False), 50, 60, lambda i, j: i - j in {-6, -3, 0, 3, 6}),
    (sp.MultiScale(3, (1, 2, 4)), 50, 60, lambda i, j: i - j in {0, 1, 2, 4, 8}),
    (sp.MultiScale(2, (1, 3), causal=False), 50, 60, lambda i, j: abs(i - j) in {0, 1, 2, 3, 6}),
    (sp.Strided(6), 60, 60, lambda i, j: i >= j and (i - j < 6 or (i - j) % 6 == 0)),
    (sp.Fixed(8, 2), 60, 60, lambda i, j: i >= j and (i // 8 == j // 8 or j % 8 in {6, 7})),
    (sp.LogSparse(), 70, 80, lambda i, j: i == j or power_of_two(i - j)),
    (sp.LogSparse(5), 70, 80, lambda i, j: 0 <= i - j < 5 or power_of_two(i - j)),
    (sp.BlockSparse(BLOCKS, 16), 70, 80, lambda i, j: bool(BLOCKS[(i - 10) // 16, j // 16])),
    (sp.Longformer(4, 3), 60, 60, lambda i, j: abs(i - j) <= 4 or i < 3 or j < 3),
    (sp.Longformer(4, 1, 5), 60, 70, lambda i, j: i - j in range(-20, 21, 5) or i < 1 or j < 1),
    (sp.Sinks(4), 40, 50, lambda i, j: j < 4),
    (sp.Documents((3, 20, 7)), 25, 30, lambda i, j: [i < 3, 3 <= i < 23, i >= 23] == [j < 3, 3 <= j < 23, j >= 23]),
    (sp.Tree(TREE), 13, 33, lambda i, j: j < 20 or j - 20 in ancestors(i - 20)),
    (sp.Tree(TREE), 25, 33, lambda i, j: j <= i if i < 20 else j < 20 or j - 20 in ancestors(i - 20)),
    (sp.Predicate(lambda i, j: (i + j) % 3 == 0), 20, 30, lambda i, j: (i + j) % 3 == 0),
    (sp.SlidingWindow(9) & sp.Dilated(9, 2), 40, 40, lambda i, j: i - j in {0, 2, 4, 6, 8}),
    (sp.SlidingWindow(9) | sp.Sinks(2), 40, 40, lambda i, j: 0 <= i - j < 9 or j < 2),
]


@pytest.mark.parametrize("pattern, q_len, kv_len, allowed", MEANINGS, ids=[repr(row[0]) for row in MEANINGS])
def test_mask_is_the_definition(pattern, q_len, kv_len, allowed):
    positions = range(kv_len - q_len, kv_len)
    expected = torch.tensor([[allowed(i, j) for j in range(kv_len)] for i in positions])
    mask = pattern.mask(q_len, kv_len)
    assert torch.equal(mask, expected)
    assert mask.dtype == torch.bool and mask.is_contiguous()
    assert pattern.pairs(q_len, kv_len) == int(expected.sum())
    assert pattern.sparsity(q_len, kv_len) == pytest.approx(1 - expected.double().mean().item())


def test_the_table_of_cases_has_every_pattern():
    kinds = {kind for kind in vars(sp).values() if isinstance(kind, type) and issubclass(kind, sp.Pattern)} - {sp.Pattern}
    told = " ".join(repr(case.make()) for case in CASES)
    assert not [kind.__name__ for kind in kinds if f"{kind.__name__}(" not in told]


def test_csr_takes_unsorted_and_duplicate_columns_and_empty_rows():
    pattern = sp.Csr(torch.tensor([0, 3, 3, 5]), torch.tensor([4, 0, 4, 2, 1], dtype=torch.int32))
    expected = torch.zeros(3, 5, dtype=torch.bool)
    expected[0, [0, 4]] = expected[2, [1, 2]] = True
    assert torch.equal(pattern.mask(3, 5), expected)
    assert pattern.pairs(3, 5, heads=2) == 8


def test_multiscale_counts_a_key_once():
    per_row = sp.MultiScale(1024).mask(1, 8192).sum().item()
    assert per_row == 2560


def test_per_head_patterns():
    dilations = (1, 3, 2)
    mask = sp.Dilated(4, dilations).mask(20, 30, heads=3)
    assert all(torch.equal(mask[h], sp.Dilated(4, d).mask(20, 30)) for h, d in enumerate(dilations))
    blocks = block_mask(3, 2, 2)
    mask = sp.BlockSparse(blocks, 16).mask(20, 30, heads=3)
    assert all(torch.equal(mask[h], sp.BlockSparse(blocks[h], 16).mask(20, 30)) for h in range(3))
    assert sp.Dilated(4, dilations).pairs(20, 30, 3) == sp.Dilated(4, dilations).mask(20, 30, 3).sum()


def bigbird_blocks(pattern, kv_len, heads):
    mask = pattern.mask(kv_len, kv_len, heads)
    blocks = mask.unflatten(1, (-1, pattern.block)).unflatten(3, (-1, pattern.block)).transpose(2, 3).flatten(3)
    assert torch.equal(blocks.any(-1), blocks.all(-1)), "blocks are allowed whole"
    return blocks.any(-1)


def test_bigbird_blocks():
    pattern = sp.BigBird(16, window=3, globals=2, random=3, seed=5)
    blocks = bigbird_blocks(pattern, 16 * 20, heads=4)
    assert blocks[:, :2].all() and blocks[:, :, :2].all()
    row = torch.arange(20)
    near = (row[:, None] - row).abs() <= 1
    assert blocks[:, near].all()
    drawn = blocks & ~near
    drawn[:, :2] = drawn[:, :, :2] = False
    assert (drawn[:, 2:].sum(2) == 3).all()
    assert len({tuple(head.flatten().tolist()) for head in drawn}) == 4
    assert torch.equal(blocks, bigbird_blocks(pattern, 16 * 20, heads=4))
    assert not torch.equal(blocks, bigbird_blocks(sp.BigBird(16, 3, 2, 3, seed=6), 16 * 20, heads=4))


def test_bigbird_draws_every_block_equally_often():
    drawn = bigbird_blocks(sp.BigBird(16, window=1, globals=0, random=2), 16 * 9, heads=600)[:, 4].double().mean(0)
    others = torch.cat([drawn[:4], drawn[5:]])
    assert (others - 2 / 8).abs().max() < 0.08


def test_bigbird_takes_all_blocks_when_few_are_left():
    assert bigbird_blocks(sp.BigBird(16, window=1, globals=1, random=3), 16 * 5, heads=2).all()
    assert bigbird_blocks(sp.BigBird(16, window=1, globals=1, random=3), 16 * 6, heads=2).sum() == 2 * (6 + 5 * 5)


@pytest.mark.parametrize("case", [case for case in CASES if not case.make().live], ids=lambda case: case.id)
def test_equal_by_value(case):
    a = case.make()
    assert a == copy.deepcopy(a) and hash(a) == hash(copy.deepcopy(a))
    if "predicate" not in case.id:
        b = pickle.loads(pickle.dumps(a))
        assert a == case.make() == b and hash(a) == hash(b)
        assert torch.equal(a.mask(*case[2:]), b.mask(*case[2:]))
    with pytest.raises(FrozenInstanceError):
        setattr(a, fields(a)[0].name if fields(a) else "window", 3)
    assert len(repr(a)) < 200


def test_different_patterns_differ():
    made = [sp.Dense(), sp.Causal(), sp.SlidingWindow(4), sp.SlidingWindow(5), sp.SlidingWindow(4, causal=False)]
    made += [sp.Csr(torch.tensor([0, 1]), torch.tensor([n])) for n in (0, 1)] + [csr(9, 9), csr(9, 9, seed=1)]
    made += [sp.BlockSparse(block_mask(2, 2, seed=n), 16) for n in (0, 1)] + [sp.BlockSparse(block_mask(2, 2), 32)]
    made += [sp.Tree((-1, 0)), sp.Tree((-1, -1)), sp.Documents((2, 2)), sp.Documents((1, 3))]
    made += [sp.Dense() & sp.Causal(), sp.Causal() & sp.Dense(), sp.Dense() | sp.Causal()]
    assert len(set(made)) == len(made)


def test_changing_a_tensor_later_changes_nothing():
    mask = block_mask(2, 2)
    pattern = sp.BlockSparse(mask, 16)
    before = pattern.mask(20, 20)
    mask.logical_not_()
    assert torch.equal(pattern.mask(20, 20), before)


def test_repr():
    assert repr(sp.SlidingWindow(4096)) == "SlidingWindow(window=4096, causal=True)"
    both = (sp.SlidingWindow(8) | sp.Sinks(4)) & sp.Causal()
    assert repr(both) == "((SlidingWindow(window=8, causal=True) | Sinks(n=4)) & Causal())"
    shown = block_mask(16, 16)
    assert repr(sp.BlockSparse(shown, 64)) == f"BlockSparse(block_mask=<16x16, {int(shown.sum())} of 256>, block=64)"
    assert repr(sp.Csr(torch.tensor([0, 1]), torch.tensor([0]))) == "Csr(row_ptr=<2>, col_idx=<1>)"


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_text_form(case):
    pattern = case.make()
    if any(name in repr(pattern) for name in ("Csr", "BlockSparse", "LiveBlocks", "Predicate")):
        with pytest.raises(ValueError, match="pattern holds .*no text form"):
            sp.text(pattern)
    else:
        assert sp.parse(sp.text(pattern)) == pattern


def test_parse_reads_what_people_write():
    assert sp.parse("(SlidingWindow(64) | Sinks(4)) & Causal()") == (sp.SlidingWindow(64) | sp.Sinks(4)) & sp.Causal()


@pytest.mark.parametrize(
    "source",
    ["", "3", "SlidingWindow", "SlidingWindow(", "SlidingWindow(1, 2, 3, 4)", "SlidingWindow(width=3)", "Window(3)", "Sinks(x)",
     "Sinks(1) + Sinks(2)", "Sinks(__import__('os'))", "Sinks(n=0)", "Sinks(*[1])", "Sinks(**{'n': 1})", "Band(0, 3)"],
)
def test_parse_refuses(source):
    with pytest.raises(ValueError):
        sp.parse(source)


INT = "expected an int of at least 1"
CONSTRUCTORS = [
    (lambda: sp.SlidingWindow(0), f"window is 0; {INT}"),
    (lambda: sp.SlidingWindow(-4), f"window is -4; {INT}"),
    (lambda: sp.SlidingWindow(4.0), f"window is 4.0; {INT}"),
    (lambda: sp.SlidingWindow(math.nan), f"window is nan; {INT}"),
    (lambda: sp.SlidingWindow(True), f"window is True; {INT}"),
    (lambda: sp.SlidingWindow(None), f"window is None; {INT}"),
    (lambda: sp.SlidingWindow("4"), f"window is '4'; {INT}"),
    (lambda: sp.SlidingWindow(10**30), f"window is {10**30}; expected at most 2147483648"),
    (lambda: sp.Sinks(2**40), "n is 1099511627776; expected at most 2147483648"),
    (lambda: sp.SlidingWindow(4, causal=1), "causal is 1; expected True or False"),
    (lambda: sp.Dilated(0, 1), f"window is 0; {INT}"),
    (lambda: sp.Dilated(4, 0), f"dilation is 0; {INT}"),
    (lambda: sp.Dilated(4, 1.5), "dilation is 1.5; expected"),
    (lambda: sp.Dilated(4, None), "dilation is None; expected"),
    (lambda: sp.Dilated(4, ()), "dilation is (); expected at least one entry"),
    (lambda: sp.Dilated(4, (1, 0)), f"dilation[1] is 0; {INT}"),
    (lambda: sp.Dilated(4, (1, 2.0)), f"dilation[1] is 2.0; {INT}"),
    (lambda: sp.Dilated(4, "12"), "dilation is '12'; expected"),
    (lambda: sp.MultiScale(0), f"window is 0; {INT}"),
    (lambda: sp.MultiScale(4, ()), "strides is (); expected at least one entry"),
    (lambda: sp.MultiScale(4, 2), "strides is 2; expected a tuple of ints"),
    (lambda: sp.MultiScale(4, (1, -2)), f"strides[1] is -2; {INT}"),
    (lambda: sp.Strided(0), f"stride is 0; {INT}"),
    (lambda: sp.Fixed(0, 1), f"block is 0; {INT}"),
    (lambda: sp.Fixed(8, 0), f"summary is 0; {INT}"),
    (lambda: sp.Fixed(8, 9), "summary is 9; expected at most block, 8"),
    (lambda: sp.LogSparse(0), f"window is 0; {INT}"),
    (lambda: sp.BlockSparse([[True]], 64), "block_mask is [[True]]; expected a bool tensor"),
    (lambda: sp.BlockSparse(torch.ones(2, 2), 64), "block_mask is torch.float32 tensor of shape (2, 2); expected a bool tensor"),
    (lambda: sp.BlockSparse(block_mask(4), 64), "block_mask is torch.bool tensor of shape (4,); expected"),
    (lambda: sp.BlockSparse(block_mask(0, 4), 64), "block_mask is torch.bool tensor of shape (0, 4); expected"),
    (lambda: sp.BlockSparse(block_mask(2, 2), 48), "block is 48; expected one of (16, 32, 64, 128)"),
    (lambda: sp.BlockSparse(block_mask(2, 2), 64.0), "block is 64.0; expected one of"),
    (lambda: sp.BigBird(block=0), "block is 0; expected one of"),
    (lambda: sp.BigBird(window=2), "window is 2; expected an odd number of blocks"),
    (lambda: sp.BigBird(globals=-1), "globals is -1; expected an int of at least 0"),
    (lambda: sp.BigBird(random=1.0), "random is 1.0; expected an int of at least 0"),
    (lambda: sp.BigBird(seed=-1), "seed is -1; expected an int of at least 0"),
    (lambda: sp.Longformer(0, 1), f"window is 0; {INT}"),
    (lambda: sp.Longformer(4, -1), "global_tokens is -1; expected an int of at least 0"),
    (lambda: sp.Longformer(4, 1, 0), f"dilation is 0; {INT}"),
    (lambda: sp.Sinks(0), f"n is 0; {INT}"),
    (lambda: sp.Documents(()), "lengths is (); expected at least one entry"),
    (lambda: sp.Documents((3, 0)), f"lengths[1] is 0; {INT}"),
    (lambda: sp.Documents(12), "lengths is 12; expected a tuple of ints"),
    (lambda: sp.Csr([0, 1], torch.tensor([0])), "row_ptr is [0, 1]; expected a one-dimensional int32 or int64 tensor"),
    (lambda: sp.Csr(torch.tensor([0.0, 1.0]), torch.tensor([0])), "row_ptr is torch.float32 tensor of shape (2,); expected"),
    (lambda: sp.Csr(torch.tensor([0, 1]), torch.tensor([[0]])), "col_idx is torch.int64 tensor of shape (1, 1); expected"),
    (lambda: sp.Csr(torch.tensor([0]), torch.tensor([0])), "row_ptr has 1 entries; expected q_len + 1, at least 2"),
    (lambda: sp.Csr(torch.tensor([1, 1]), torch.tensor([0])), "row_ptr runs from 1 to 1; expected 0 to len(col_idx), 1"),
    (lambda: sp.Csr(torch.tensor([0, 2]), torch.tensor([0])), "row_ptr runs from 0 to 2; expected 0 to len(col_idx), 1"),
    (lambda: sp.Csr(torch.tensor([0, 2, 1]), torch.tensor([0])), "row_ptr[2] is 1; expected at least row_ptr[1], 2"),
    (lambda: sp.Csr(torch.tensor([0, 1]), torch.tensor([-1])), "col_idx[0] is -1; expected at least 0"),
    (lambda: sp.Tree(()), "parents is (); expected at least one entry"),
    (lambda: sp.Tree((-1, 1)), "parents[1] is 1; expected less than 1: parents precede their children"),
    (lambda: sp.Tree((2, -1, -1)), "parents[0] is 2; expected less than 0"),
    (lambda: sp.Tree((-2,)), "parents[0] is -2; expected an int of at least -1"),
    (lambda: sp.Tree((-1, 0.0)), "parents[1] is 0.0; expected an int of at least -1"),
    (lambda: sp.Predicate(3), "fn is 3; expected a function of two int64 tensors"),
]


@pytest.mark.parametrize("make, message", CONSTRUCTORS, ids=[message for _, message in CONSTRUCTORS])
def test_constructors_refuse(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


MISFITS = [
    (sp.Dilated(4, (1, 2)), (9, 9, 3), "dilation is (1, 2), one for each of 2 heads; expected 3 heads"),
    (sp.BlockSparse(block_mask(2, 2), 16), (33, 32, 1), "block_mask has shape (2, 2); expected (3, 2) blocks of 16"),
    (sp.BlockSparse(block_mask(2, 2), 16), (32, 16, 1), "block_mask has shape (2, 2); expected (2, 1) blocks of 16"),
    (sp.BlockSparse(block_mask(3, 2, 2), 16), (32, 32, 2), "a mask for each of 3 heads; expected 2 heads"),
    (sp.BigBird(), (200, 100, 1), "q_len is 200; expected at most kv_len, 100"),
    (sp.Documents((3, 4)), (8, 8, 1), "lengths sum to 7; expected kv_len, 8"),
    (sp.Csr(torch.tensor([0, 1]), torch.tensor([5])), (2, 9, 1), "row_ptr has 2 entries; expected q_len + 1, 3"),
    (sp.Csr(torch.tensor([0, 1]), torch.tensor([5])), (1, 5, 1), "col_idx holds 5; expected less than kv_len, 5"),
    (sp.Tree((-1, 0, 1)), (2, 9, 1), "parents has 3 nodes; expected at most q_len, 2"),
    (sp.Tree((-1, 0, 1)), (4, 2, 1), "parents has 3 nodes; expected at most kv_len, 2"),
    (sp.Causal(), (0, 5, 1), "q_len is 0; expected at least 1"),
    (sp.Causal(), (5, 5, 0), "heads is 0; expected at least 1"),
]


@pytest.mark.parametrize("pattern, sizes, message", MISFITS, ids=[message for *_, message in MISFITS])
@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: p & sp.Dense(), lambda p: sp.Sinks(1) | p], ids=["alone", "and", "or"])
def test_sizes_that_do_not_fit(pattern, sizes, message, wrap):
    for ask in (wrap(pattern).mask, wrap(pattern).pairs):
        with pytest.raises(ValueError) as error:
            ask(*sizes)
        assert message in str(error.value)


@pytest.mark.parametrize(
    "fn, message",
    [
        (lambda i, j: i - j, "fn returned a torch.int64 tensor; expected a bool tensor"),
        (lambda i, j: True, "fn returned a bool; expected a bool tensor"),
        (lambda i, j: torch.ones(3, 7, dtype=torch.bool), "fn returned shape (3, 7); expected one that broadcasts to (5, 5)"),
    ],
)
def test_predicates_that_return_no_mask(fn, message):
    with pytest.raises(ValueError) as error:
        sp.Predicate(fn).mask(5, 5)
    assert message in str(error.value)


def test_patterns_compose_with_patterns_only():
    for other in (3, torch.ones(2, 2, dtype=torch.bool), None):
        with pytest.raises(TypeError):
            sp.Causal() & other
        with pytest.raises(TypeError):
            other | sp.Causal()


def test_a_pattern_needs_only_allows():
    class Odd(sp.Pattern):
        def allows(self, i, j, lengths):
            return (i + j) % 2 == 1

    assert (Odd() & sp.Causal()).pairs(70, 90) == int((Odd().mask(70, 90) & sp.Causal().mask(70, 90)).sum())


LARGE = 2**31
LARGEST = [
    (sp.SlidingWindow(LARGE), sp.Causal()),
    (sp.SlidingWindow(LARGE, causal=False), sp.Dense()),
    (sp.Dilated(LARGE, 1), sp.Causal()),
    (sp.Dilated(LARGE, LARGE), sp.SlidingWindow(1)),
    (sp.MultiScale(LARGE, (1, LARGE)), sp.Causal()),
    (sp.Strided(LARGE), sp.Causal()),
    (sp.Fixed(LARGE, 1), sp.Causal()),
    (sp.Fixed(LARGE, LARGE), sp.Causal()),
    (sp.LogSparse(LARGE), sp.Causal()),
    (sp.Longformer(LARGE, LARGE), sp.Dense()),
    (sp.Longformer(LARGE, 0, LARGE), sp.SlidingWindow(1)),
    (sp.Sinks(LARGE), sp.Dense()),
    (sp.BigBird(16, globals=LARGE), sp.Dense()),
    (sp.BigBird(16, window=LARGE - 1), sp.Dense()),
    (sp.BigBird(16, random=LARGE), sp.Dense()),
]


@pytest.mark.parametrize("pattern, same", LARGEST, ids=[repr(row[0]) for row in LARGEST])
def test_the_largest_arguments(pattern, same):
    assert torch.equal(pattern.mask(150, 170), same.mask(150, 170))
    assert count_pairs(pattern.for_head(0), Lengths(150, 170)) == pattern.pairs(150, 170) == same.pairs(150, 170)


COUNTED = [
    sp.Causal(),
    sp.SlidingWindow(700),
    sp.SlidingWindow(300, causal=False),
    sp.Dilated(40, 3),
    sp.Dilated(7, 90, causal=False),
    sp.Fixed(70, 9),
    sp.LogSparse(21),
    sp.Sinks(5),
    sp.Documents((1500, 1, 500, 1999)),
    sp.BlockSparse(block_mask(24, 32), 128),
    csr(3000, 4000, density=0.001),
]


@pytest.mark.parametrize("pattern", COUNTED, ids=repr)
def test_formulas_for_pairs_agree_with_the_layout(pattern):
    assert pattern.pairs(3000, 4000) == count_pairs(pattern, Lengths(3000, 4000))


@pytest.mark.parametrize("pattern", COUNTED[:8], ids=repr)
def test_formulas_for_pairs_when_queries_come_before_keys(pattern):
    assert pattern.pairs(4000, 3000) == count_pairs(pattern, Lengths(4000, 3000))


def check_promises(pattern, q_len, kv_len, heads, height, width, seed):
    """Spans, full, empty and signature of random rectangles of one size tell the truth about the mask."""
    one, lengths = pattern.for_head(heads - 1), Lengths(q_len, kv_len)
    mask = pattern.mask(q_len, kv_len, heads)[heads - 1].numpy()
    height, width = min(height, q_len), min(width, kv_len)
    rng = np.random.default_rng(seed)
    row = rng.integers(0, q_len - height + 1, 200)
    column = rng.integers(0, kv_len - width + 1, 200)
    rects = Rects(row + lengths.offset, row + lengths.offset + height, column, column + width)
    tiles = mask[row[:, None, None] + np.arange(height)[:, None], column[:, None, None] + np.arange(width)]
    assert tiles[one.full(rects, lengths)].all()
    assert not tiles[one.empty(rects, lengths)].any()
    by_signature = {}
    for tile, signature in zip(tiles, one.signature(rects, lengths).tolist()):
        assert np.array_equal(tile, by_signature.setdefault(signature, tile))
    covered = np.zeros((len(tiles), kv_len + 1), dtype=np.int64)
    group, start, stop = one.spans(rects.i0, rects.i1 - 1, lengths)
    some = start < stop
    np.add.at(covered, (group[some], start[some].clip(0, kv_len)), 1)
    np.add.at(covered, (group[some], stop[some].clip(0, kv_len)), -1)
    needed = mask[row[:, None] + np.arange(height)].any(axis=1)
    assert not (needed & (covered.cumsum(1)[:, :-1] == 0)).any()


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
@pytest.mark.parametrize("height, width", [(1, 1), (1, 5), (4, 1), (3, 2), (8, 16), (16, 16), (23, 9), (64, 64), (90, 130)])
def test_promises_of_every_case(case, height, width):
    check_promises(case.make(), *case[2:], height, width, seed=height)


@settings(deadline=None, max_examples=150)
@given(calls(), st.integers(1, 70), st.integers(1, 70), st.integers(0, 99))
def test_promises_of_any_composition(call, height, width, seed):
    check_promises(*call, height, width, seed)


def test_an_intersection_asks_for_the_fewer_keys():
    first = np.arange(5000, 5100)
    total = [
        sum(stop - start for _, start, stop in zip(*pattern.spans(first, first, Lengths(8000, 8000))))
        for pattern in (sp.LogSparse(), sp.LogSparse() & sp.SlidingWindow(4000), sp.SlidingWindow(4000) & sp.LogSparse())
    ]
    assert total[1] <= total[0] and total[2] <= total[0]


@settings(deadline=None, max_examples=100)
@given(calls(), st.integers(1, 7), st.data())
def test_quotient(call, stride, data):
    pattern, q_len, kv_len, heads = call
    residue = data.draw(st.integers(0, stride - 1))
    one, lengths = pattern.for_head(0), Lengths(q_len, kv_len)
    inner = quotient_lengths(lengths, stride, residue)
    i = torch.arange(inner.offset, inner.kv_len).unsqueeze(1)
    j = torch.arange(inner.kv_len).unsqueeze(0)
    if i.numel() == 0 or j.numel() == 0:
        return
    seen = one.quotient(stride, residue, lengths).allows(i, j, inner).expand(inner)
    mask = pattern.mask(q_len, kv_len, heads)[0]
    queries = (i.flatten() * stride + residue - lengths.offset).tolist()
    assert torch.equal(seen, mask[queries][:, residue::stride])


@settings(deadline=None, max_examples=100)
@given(calls())
def test_parts_are_disjoint_and_complete(call):
    pattern, q_len, kv_len, heads = call
    one, lengths = pattern.for_head(0), Lengths(q_len, kv_len)
    counts = torch.zeros(q_len, kv_len, dtype=torch.int64)
    for part in one.parts(lengths):
        for residue in range(part.stride):
            inner = quotient_lengths(lengths, part.stride, residue)
            if min(inner) < 1:
                continue
            i = torch.arange(inner.offset, inner.kv_len).unsqueeze(1)
            seen = part.of_residue(residue).allows(i, torch.arange(inner.kv_len).unsqueeze(0), inner).expand(inner)
            first = inner.offset * part.stride + residue - lengths.offset
            counts[first :: part.stride, residue :: part.stride] += seen
    assert torch.equal(counts, pattern.mask(q_len, kv_len, heads)[0].long())
