"""The libraries for narrower vectors, compiled and tested where the processor has wider ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_attention import _build

TESTS = [
    "tests/test_engines.py::test_head_dim",
    "tests/test_engines.py::test_strides",
    "tests/test_engines.py::test_shared_keys[6-3]",  # how heads share does not depend on the vectors
    "tests/test_engines.py::test_lengths",
    "tests/test_poison.py::test_scattered_unseen_keys",
    "tests/test_metamorphic.py::test_half_precision_is_rounded_float32",
    "tests/test_decode.py::test_head_dims",
    "tests/test_decode.py::test_strides",
]


def test_narrower_vectors():
    """Both at once: each compiles first, about a minute, unless its library is in the cache."""
    order = list(_build.TIERS)
    narrower = order[: order.index(_build.tier())]
    if not narrower:
        pytest.skip("this processor, or SPARSE_ATTENTION_CPU, has the narrowest vectors")
    running = {}
    for tier in narrower:
        environment = {**os.environ, "SPARSE_ATTENTION_CPU": tier}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS]
        root = Path(__file__).resolve().parent.parent
        running[tier] = subprocess.Popen(
            command, cwd=root, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    for tier, process in running.items():
        output, _ = process.communicate()
        assert process.returncode == 0, f"{tier}:\n{output[-5000:]}"
