"""Hypothesis strategies: sizes, and patterns that fit them, compositions included."""

from __future__ import annotations

from hypothesis import strategies as st

from sparse_attention.patterns import (
    BigBird,
    BlockSparse,
    Causal,
    Dense,
    Dilated,
    Documents,
    Fixed,
    LogSparse,
    Longformer,
    MultiScale,
    Predicate,
    Sinks,
    SlidingWindow,
    Strided,
    Tree,
)
from tests.cases import block_mask, csr

LENGTHS = st.one_of(st.integers(1, 12), st.integers(1, 200), st.sampled_from([63, 64, 65, 127, 128, 129, 192]))
SIZES = st.tuples(LENGTHS, LENGTHS, st.integers(1, 3))

_STEP = st.one_of(st.integers(1, 9), st.integers(1, 80))
_WINDOW = st.one_of(st.integers(1, 20), st.integers(1, 250))
_PREDICATES = [
    Predicate(lambda i, j: (i * j) % 5 == 1),
    Predicate(lambda i, j: (i ^ j) < 40),
    Predicate(lambda i, j: (i > 70) & (j % 3 == 0)),
]


@st.composite
def _documents(draw, kv_len):
    ends = sorted({draw(st.integers(1, kv_len)) for _ in range(draw(st.integers(0, 6)))} | {kv_len})
    return Documents(tuple(stop - start for start, stop in zip([0] + ends, ends)))


@st.composite
def _tree(draw, longest):
    return Tree(tuple(draw(st.integers(-1, n - 1)) for n in range(draw(st.integers(1, longest)))))


@st.composite
def _fixed(draw):
    block = draw(st.integers(1, 100))
    return Fixed(block, draw(st.integers(1, block)))


def _block_sparse(q_len, kv_len, heads):
    def make(block, density, seed, per_head):
        shape = (-(-q_len // block), -(-kv_len // block))
        return BlockSparse(block_mask(*((heads,) if per_head else ()), *shape, density=density, seed=seed), block)

    return st.builds(make, st.sampled_from([16, 32, 64, 128]), st.floats(0, 1), st.integers(0, 99), st.booleans())


def leaves(q_len: int, kv_len: int, heads: int) -> st.SearchStrategy:
    """Single patterns that fit these sizes."""
    options = [
        st.just(Dense()),
        st.just(Causal()),
        st.builds(SlidingWindow, _WINDOW, st.booleans()),
        st.builds(Dilated, _WINDOW, _STEP, st.booleans()),
        st.builds(Dilated, _WINDOW, st.tuples(*[_STEP] * heads), st.booleans()),
        st.builds(MultiScale, _WINDOW, st.lists(_STEP, min_size=1, max_size=4).map(tuple), st.booleans()),
        st.builds(Strided, _STEP),
        _fixed(),
        st.builds(LogSparse, _WINDOW),
        st.builds(Longformer, _WINDOW, st.integers(0, 80), _STEP),
        st.builds(Sinks, st.integers(1, 250)),
        _documents(kv_len),
        _tree(min(q_len, kv_len, 30)),
        st.builds(csr, st.just(q_len), st.just(kv_len), st.floats(0, 1), st.integers(0, 99)),
        _block_sparse(q_len, kv_len, heads),
        st.sampled_from(_PREDICATES),
    ]
    if q_len <= kv_len:
        few = st.integers(0, 3)
        options.append(st.builds(BigBird, st.sampled_from([16, 32, 64]), st.sampled_from([1, 3, 5]), few, few, few))
    return st.one_of(options)


def patterns(q_len: int, kv_len: int, heads: int) -> st.SearchStrategy:
    """Patterns that fit these sizes, and their unions and intersections."""

    def combined(inner):
        pair = st.tuples(inner, inner)
        return st.one_of(pair.map(lambda p: p[0] & p[1]), pair.map(lambda p: p[0] | p[1]))

    return st.recursive(leaves(q_len, kv_len, heads), combined, max_leaves=4)


@st.composite
def calls(draw):
    """(pattern, q_len, kv_len, heads)."""
    sizes = draw(SIZES)
    return draw(patterns(*sizes)), *sizes
