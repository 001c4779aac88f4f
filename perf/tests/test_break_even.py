"""`pytest perf`: every case of the device's table against its baseline. This folder is no package, so that asv does not import it."""

import pytest

from perf import cases, cuda_cases
from sparse_attention.breakeven import select


def pytest_generate_tests(metafunc):
    table = cuda_cases.CASES if metafunc.config.option.breakeven_device.startswith("cuda") else cases.CASES
    halves = [(case, impl) for case in select(table, sizes=metafunc.config.option.sizes) for impl in ("dense", "sparse")]
    rows = [pytest.param(case, impl, id=f"{case.id}-{impl}") for case, impl in halves if case.limit_s is None or impl == "sparse"]
    metafunc.parametrize(("case", "impl"), rows)


def test_break_even(case, impl, breakeven_race):
    breakeven_race(case, impl)
