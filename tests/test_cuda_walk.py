"""The walk over an item's key tiles (csrc/cuda/walk.cuh), compiled for the host, against what runs and bits say tile by tile."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_attention._build import compiler, source_folder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="host threads are fibers of ucontext, on Linux")
HERE = Path(__file__).parent / "cuda_on_host"
LAST, FULL, MASKS = 1 << 30, (1 << 29) - 1, 3


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    target = tmp_path_factory.mktemp("walk") / "walk.so"
    command = [*compiler(), "-std=c++20", "-O2", "-w", "-fPIC", "-shared", f"-I{HERE}", f"-I{source_folder() / 'cuda'}"]
    done = subprocess.run([*command, str(HERE / "walk.cpp"), "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return ctypes.CDLL(str(target))


def walked(library, runs, halves=None, passing=False):
    """[(tile, mark)], or how many with `passing`. runs: [(first, count, mask)]; halves: bool [2, tiles], what each half may see."""
    runs = np.array(runs, np.int32).reshape(-1, 3)
    found = np.zeros((int(runs[:, 1].sum()) + 1, 2), np.int32)
    bits = used = marks = None
    words = 0
    if halves is not None:
        words = halves.shape[1] // 64
        bits = np.packbits(halves, axis=1, bitorder="little").view(np.uint64)
        some = np.zeros(-(-words // 64) * 64, bool)
        some[:words] = bits.any(0)
        used = np.packbits(some, bitorder="little").view(np.uint64)
        marks = np.arange(3 * (MASKS + 1), dtype=np.int32)
        marks[MASKS] = FULL
    pointers = [None if x is None else ctypes.c_void_p(x.ctypes.data) for x in (runs, bits, used, marks, found)]
    count = library.walk(pointers[0], len(runs), *pointers[1:3], words, pointers[3], MASKS, int(passing), pointers[4])
    return count if passing else [tuple(map(int, pair)) for pair in found[:count]]


def expected(runs, halves=None):
    tiles = [(first + n, mask) for first, count, mask in runs for n in range(count)]
    if halves is not None:
        seen = [(tile, mask, *halves[:, tile]) for tile, mask in tiles if halves[:, tile].any()]
        half = {(True, True): 0, (True, False): 1, (False, True): 2}
        tiles = []
        for tile, mask, upper, lower in seen:
            mark = half[bool(upper), bool(lower)] * (MASKS + 1) + (MASKS if mask == FULL else mask)
            tiles.append((tile, FULL if mark == MASKS else mark))
    return [(tile, mark | (LAST if n == len(tiles) - 1 else 0)) for n, (tile, mark) in enumerate(tiles)]


@st.composite
def run_lists(draw, most_tiles):
    """Runs in ascending order, some without tiles, with gaps or without."""
    at, runs = 0, []
    for _ in range(draw(st.integers(0, 6))):
        first = at + draw(st.sampled_from((0, 0, 1, 5, 64, 700)))
        count = draw(st.sampled_from((0, 1, 2, 63, 64, 65, 300)))
        if first + count > most_tiles:
            break
        runs.append((first, count, draw(st.sampled_from((FULL, 0, 1, 2)))))
        at = first + count
    return runs


@given(runs=run_lists(3000))
def test_runs(library, runs):
    assert walked(library, runs) == expected(runs)
    assert walked(library, runs, passing=True) == sum(count for _, count, _ in runs)


@given(
    data=st.data(),
    words=st.sampled_from((1, 2, 63, 64, 65, 130)),
    density=st.sampled_from((0.0, 0.0005, 0.02, 0.5, 1.0)),
    seed=st.integers(0, 2**32 - 1),
)
def test_runs_under_a_filter(library, data, words, density, seed):
    random = np.random.default_rng(seed)
    halves = random.random((2, 64 * words)) < density
    halves[:, random.random(64 * words) < 0.3] = False
    runs = data.draw(run_lists(64 * words))
    assert walked(library, runs, halves) == expected(runs, halves)
    whole = [(0, 64 * words, FULL)]
    assert walked(library, whole, halves) == expected(whole, halves)


def test_every_tile_of_a_filter_alone(library):
    for tile in (0, 1, 63, 64, 127, 4095, 4096, 8319):
        for half in (0, 1):
            halves = np.zeros((2, 64 * 130), bool)
            halves[half, tile] = True
            assert walked(library, [(0, 64 * 130, FULL)], halves) == expected([(0, 64 * 130, FULL)], halves)
