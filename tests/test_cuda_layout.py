"""Which layout the CUDA engine takes, and that each one it may take means the pattern."""

from __future__ import annotations

from hypothesis import given, settings

from sparse_attention import cuda_layout, cuda_tables
from sparse_attention.layout import layout
from sparse_attention.patterns import BigBird, Causal, Dilated, MultiScale
from sparse_attention.patterns.base import Lengths, Tile
from sparse_attention.patterns.grouping import ALL, grouped_parts
from tests.strategies import calls
from tests.test_cuda_tables import check_layout


def test_block_patterns_take_narrow_tiles_unless_one_long_row_is_what_takes_time():
    assert cuda_layout.best_layout(BigBird(64), 4096, 4096, 16, 128).tile_k == cuda_tables.NARROW
    assert cuda_layout.best_layout(BigBird(64), 4096, 4096, 2, 128).tile_k == cuda_tables.WIDE
    assert cuda_layout.best_layout(BigBird(64), 4096, 4096, 2, 128, batch=8).tile_k == cuda_tables.NARROW
    assert cuda_layout.best_layout(BigBird(64), 4096, 4096, 2, 128, wide=False).tile_k == cuda_tables.NARROW
    assert cuda_layout.best_layout(Causal(), 4096, 4096, 2, 128).tile_k == cuda_tables.WIDE
    assert cuda_layout.best_layout(Causal(), 4096, 4096, 2, 256).tile_k == cuda_tables.NARROW


def test_parts_are_launched_apart_where_that_saves_more_than_it_costs():
    def launches(pattern, length, **sizes):
        return len(cuda_layout.best_layout(pattern, length, length, 16, 128, **sizes).parts)

    assert launches(MultiScale(16), 256) == launches(MultiScale(64), 16384) == launches(MultiScale(1024), 1024) == 1
    assert launches(MultiScale(1024), 16384) == 2
    assert launches(MultiScale(1024, (1, 8, 64)), 131072) == 3
    assert [part.stride for part in cuda_layout.best_layout(Dilated(64, (1, 2)), 512, 512, 2, 128).parts] == [1]
    assert [part.stride for part in cuda_layout.best_layout(Dilated(1024, 4), 16384, 16384, 16, 128).parts] == [4]


def test_neighbours_of_a_union_share_the_stride_that_divides_theirs():
    def strides(pattern, together):
        return [part.stride for part in grouped_parts(pattern, Lengths(790, 800), together)]

    union = Dilated(64, 4) | Dilated(64, 6) | Dilated(64, 9)
    assert strides(MultiScale(64), 1) == [1, 2, 4, 8] and strides(MultiScale(64), 2) == [1, 4] and strides(MultiScale(64), ALL) == [1]
    assert strides(union, 1) == [4, 6, 9] and strides(union, 2) == [2, 9] and strides(union, 3) == [1]
    for together in (2, 3):
        check_layout(layout(union, 790, 800, 2, Tile(128, 64), together), union.mask(790, 800, 2).numpy())


@settings(max_examples=40, deadline=None)
@given(calls())
def test_no_layout_takes_longer_than_its_spans_say(call):
    pattern, q_len, kv_len, heads = call
    for together in (1, 2, ALL):
        found = layout(pattern, q_len, kv_len, heads, Tile(cuda_tables.QUERIES, cuda_tables.WIDE), together)
        if len({part.stride for part in found.parts} - {0}) == len(found.parts):  # heads of one part have one stride, and share its launch
            bound = cuda_layout.time_at_most(pattern, q_len, kv_len, heads, 2, 8, together)
            assert cuda_layout.finishing_time(found, 2, 8) <= bound * (1 + 1e-9)
