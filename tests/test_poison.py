"""What nobody may see changes nothing: NaN and infinities in unseen keys and values, around the tensors, and in fresh memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sparse_attention import Causal, Dilated, Predicate, Sinks, SlidingWindow, attention
from tests.calls import DTYPES, IMPLS, SPARSE, STRIDES, restride, run, same_bits
from tests.cases import CASES
from tests.oracle import inputs

NAMES = {dtype: str(dtype)[6:] for dtype in DTYPES}


def unseen(mask, kv_heads):
    """bool [kv_heads, kv_len]: keys that no query of any head that shares them sees."""
    return ~mask.any(1).unflatten(0, (kv_heads, -1)).any(1)


def poisoned(x, bad):
    hidden = unseen(x.mask, x.k.shape[1])[None, :, :, None]
    return x._replace(k=torch.where(hidden, bad, x.k), v=torch.where(hidden, bad, x.v))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.id for case in CASES])
def test_unseen_keys(number, impl):
    """Bit-identical results and gradients; the unseen keys' own gradients are 0."""
    case = CASES[number]
    pattern = case.make()
    dtype = DTYPES[number % 4]
    mask = pattern.mask(case.q_len, case.kv_len, case.heads)
    x = inputs(mask, kv_heads=1 if number % 2 else case.heads, head_dim=(8, 24, 40, 64)[number // 2 % 4], dtype=dtype)
    hidden = unseen(mask, x.k.shape[1])
    clean = run(x, pattern, impl)
    assert (clean.dk[:, hidden] == 0).all() and (clean.dv[:, hidden] == 0).all()
    for bad in (torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).max):
        assert same_bits(run(poisoned(x, bad), pattern, impl), clean), bad
        if not hidden.any():
            break


def test_some_cases_have_unseen_keys():
    """The test above would pass on anything if no key were ever hidden."""
    hidden = [unseen(c.make().mask(c.q_len, c.kv_len, c.heads), c.heads).any() for c in CASES]
    assert sum(hidden) >= 8


@pytest.mark.parametrize("impl", SPARSE)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_scattered_unseen_keys(dtype, impl):
    """Holes inside every tile, for each head its own, where whole tiles cannot be left out."""
    for step in (2, 3, 7):
        pattern = Predicate(lambda i, j, step=step: (j % step == 0) & (i - j < 90))
        x = inputs(pattern.mask(200, 230, 2), head_dim=16, dtype=dtype)
        clean = run(x, pattern, impl)
        for bad in (torch.nan, torch.inf):
            assert same_bits(run(poisoned(x, bad), pattern, impl), clean)


@pytest.mark.parametrize("impl", SPARSE)
@pytest.mark.parametrize("kind", STRIDES)
def test_around_the_tensors(kind, impl):
    """NaN before, between and after the rows of strided tensors, and beyond the last row of a view."""
    for pattern in (SlidingWindow(20), Dilated(9, 5), Causal()):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            plain = inputs(pattern.mask(67, 75, 2), batch=2, kv_heads=1, head_dim=24, dtype=dtype)
            assert same_bits(run(restride(plain, kind, kind, kind, kind), pattern, impl), run(plain, pattern, impl))


@pytest.mark.parametrize("impl", SPARSE)
def test_seen_by_others_only(impl):
    """A NaN key of one batch entry or one head reaches nobody else's results."""
    pattern = SlidingWindow(20) | Sinks(2)
    x = inputs(pattern.mask(100, 100, 4), batch=2, kv_heads=2, head_dim=16)
    k, v = x.k.clone(), x.v.clone()
    k[1, 0, 50], v[1, 0, 50] = torch.nan, torch.nan
    clean, dirty = run(x, pattern, impl), run(x._replace(k=k, v=v), pattern, impl)
    for name in ("out", "lse", "dq"):
        a, b = getattr(clean, name), getattr(dirty, name)
        assert torch.equal(a[0], b[0]) and torch.equal(a[1, 2:], b[1, 2:])
        assert b[1, :2, 50:70].isnan().all(), "the queries that see it must not hide it"
    for name in ("dk", "dv"):
        a, b = getattr(clean, name), getattr(dirty, name)
        assert torch.equal(a[0], b[0]) and torch.equal(a[1, 1], b[1, 1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("impl", SPARSE)
def test_queries_that_see_nothing(impl, bad):
    """Their q, and the gradients of their results, reach no gradient of a key."""
    pattern = Predicate(lambda i, j: (i % 3 > 0) & (i - j < 70))
    x = inputs(pattern.mask(150, 150, 2), kv_heads=1, head_dim=16)
    clean = run(x, pattern, impl)
    q, dout, dlse = x.q.clone(), x.dout.clone(), x.dlse.clone()
    q[:, :, ::3], dout[:, :, ::3], dlse[:, :, ::3] = bad, bad, bad
    assert same_bits(run(x._replace(q=q, dout=dout, dlse=dlse), pattern, impl), clean)


@pytest.fixture
def nan_memory():
    """Makes torch fill new tensors with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1000).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.parametrize("impl", SPARSE)
@pytest.mark.parametrize("number", range(0, len(CASES), 2), ids=[case.id for case in CASES[::2]])
def test_outputs_start_as_nan(number, impl, nan_memory):
    """Every element of every result is written."""
    case = CASES[number]
    pattern = case.make()
    mask = pattern.mask(case.q_len, case.kv_len, case.heads)
    x = inputs(mask, kv_heads=1, head_dim=24, dtype=DTYPES[number // 2 % 4])
    torch.use_deterministic_algorithms(False)
    clean = run(x, pattern, impl)
    torch.use_deterministic_algorithms(True)
    filled = run(x, pattern, impl)
    assert not any(part.isnan().any() for part in filled)
    assert same_bits(filled, clean)


SCRATCH = """
import torch
from sparse_attention import Dilated, Predicate, Sinks, SlidingWindow
from tests.calls import DTYPES, SPARSE, run
from tests.oracle import inputs

for pattern in (SlidingWindow(20), Dilated(5, 3) | Sinks(2), Predicate(lambda i, j: (j % 3 == 1) & (i % 5 > 0))):
    for dtype in DTYPES:
        x = inputs(pattern.mask(90, 100, 2), kv_heads=1, head_dim=24, dtype=dtype)
        for impl in SPARSE:
            for part in run(x, pattern, impl):
                print(part.double().sum().item().hex(), part.double().abs().sum().item().hex())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="MALLOC_PERTURB_ is glibc's")
def test_scratch_starts_as_anything():
    """glibc fills new memory with a byte of our choice; the engines' scratch may not show in any bit of a result."""
    outputs = set()
    for byte in ("0", "128", "42"):  # 128: floats of 3e38, half NaNs
        environment = {**os.environ, "MALLOC_PERTURB_": byte, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
        done = subprocess.run([sys.executable, "-c", SCRATCH], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outputs.add(done.stdout)
    assert len(outputs) == 1 and "nan" not in outputs.pop()


@pytest.mark.parametrize("impl", SPARSE)
def test_inputs_are_left_alone(impl):
    pattern = SlidingWindow(20) | Sinks(3)
    x = inputs(pattern.mask(90, 100, 2), kv_heads=1, head_dim=16)
    before = [y.clone() for y in x[:5]]
    run(x, pattern, impl)
    attention(x.q, x.k, x.v, pattern, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(before, x))
