"""Bit-equal results: on repeat, for any number of threads, and from several Python threads at once."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sparse_attention import BigBird, Causal, Dilated, LogSparse, MultiScale, Predicate, Sinks, SlidingWindow
from tests.calls import DTYPES, SPARSE, run, same_bits
from tests.oracle import inputs

PATTERNS = [
    Causal(),
    SlidingWindow(70) | Sinks(3),
    MultiScale(16),
    Dilated(20, (1, 2, 3, 2)),
    BigBird(16),
    LogSparse(),
    Predicate(lambda i, j: (i * j) % 5 < 2),
]


@pytest.fixture
def threads():
    """Sets torch's number of threads; puts it back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("impl", SPARSE)
def test_repeat(impl, threads):
    """200 times, forward and backward, with keys that heads share: the sums that threads could race for."""
    threads(2)
    pattern = SlidingWindow(40) | Sinks(3)
    x = inputs(pattern.mask(150, 150, 4), batch=2, kv_heads=2, head_dim=16)
    first = run(x, pattern, impl)
    for _ in range(200):
        assert same_bits(run(x, pattern, impl), first)


@pytest.mark.parametrize("impl", SPARSE)
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: type(pattern).__name__)
def test_number_of_threads(pattern, impl, threads):
    for dtype in DTYPES:
        x = inputs(pattern.mask(210, 230, 4), batch=2, kv_heads=2, head_dim=24, dtype=dtype)
        threads(1)
        one = run(x, pattern, impl)
        for count in (2, 3, 7):
            threads(count)
            assert same_bits(run(x, pattern, impl), one), count


@pytest.mark.parametrize("impl", SPARSE)
def test_several_python_threads(impl):
    """Calls of different patterns side by side do not meet in any table or scratch."""
    problems = [(inputs(p.mask(150, 150, 4), kv_heads=2, head_dim=16, seed=n), p) for n, p in enumerate(PATTERNS)]
    alone = [run(x, pattern, impl) for x, pattern in problems]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda n: run(*problems[n % len(problems)], impl), range(200)))
    assert all(same_bits(got, alone[n % len(problems)]) for n, got in enumerate(together))


POOL = """
import os, torch
from sparse_attention import SlidingWindow, attention

def tasks():
    return len(os.listdir("/proc/self/task"))

q = torch.randn(1, 4, 2048, 32)
attention(q[:, :, :8], q[:, :, :8], q[:, :, :8], SlidingWindow(4), impl="tile")
for threads in (1, 3):
    torch.set_num_threads(threads)
    before = tasks()
    for impl in ("tile", "gather"):
        attention(q, q, q, SlidingWindow(100), impl=impl)
    engines = tasks() - before
    torch.softmax(torch.randn(4000, 1000), -1)
    print(engines, tasks() - before - engines)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts the entries of /proc/self/task")
def test_threads_are_torchs():
    """torch.set_num_threads holds for the engines, and they and torch share one pool."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    done = subprocess.run([sys.executable, "-c", POOL], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "0", "2", "0"], "threads that engines and torch started, first for 1, then for 3"
