"""The public surface: what the package exports, and what importing it costs."""

import inspect
import subprocess
import sys

import sparse_attention
from sparse_attention import patterns

NAMES = [
    "BigBird",
    "BlockSparse",
    "BuildError",
    "Causal",
    "Csr",
    "Dense",
    "Dilated",
    "Documents",
    "Fixed",
    "LiveBlocks",
    "LogSparse",
    "Longformer",
    "MultiScale",
    "Pattern",
    "Predicate",
    "Sinks",
    "SlidingWindow",
    "Strided",
    "Tree",
    "attention",
    "decode",
    "explain",
    "longnet",
    "merge",
    "plan",
]


def test_exported_names():
    assert sparse_attention.__all__ == NAMES


def test_every_name_is_documented():
    undocumented = [name for name in NAMES if not inspect.getdoc(getattr(sparse_attention, name))]
    assert undocumented == []


def test_every_pattern_is_exported_at_the_top():
    classes = {name for name in patterns.__all__ if inspect.isclass(getattr(patterns, name))}
    kinds = {name for name in classes if issubclass(getattr(patterns, name), patterns.Pattern)}
    assert kinds <= set(NAMES)


def test_call_signatures():
    assert str(inspect.signature(sparse_attention.attention)).split(" ->")[0] == (
        "(q: 'Tensor', k: 'Tensor', v: 'Tensor', pattern: 'Pattern', *, scale: 'float | None' = None, "
        "impl: 'str' = 'auto', return_lse: 'bool' = False)"
    )
    for function in (sparse_attention.plan, sparse_attention.explain):
        assert list(inspect.signature(function).parameters) == ["q", "k", "v", "pattern", "impl"]
    assert list(inspect.signature(sparse_attention.longnet).parameters)[:5] == ["q", "k", "v", "segments", "dilations"]


def test_import_compiles_nothing_and_loads_little(tmp_path):
    script = """
import sys, torch
before = set(sys.modules)
import sparse_attention
sparse_attention.attention
from sparse_attention import _build
new = {name.split(".")[0] for name in set(sys.modules) - before}
heavy = {"torch._dynamo", "torch._inductor", "torch.utils.cpp_extension", "setuptools"} & (set(sys.modules) - before)
print(_build._load.cache_info().currsize, len(heavy), len(new - {"sparse_attention"}))
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    compiled, heavy, foreign = map(int, answer.stdout.split())
    assert (compiled, heavy) == (0, 0)
    assert foreign < 10  # packages that importing torch had not loaded
    assert "compiling" not in answer.stderr
