"""`pytest perf`: every case of the table against its baseline. This folder is no package, so that asv does not import it."""

import pytest

from perf.cases import CASES
from sparse_attention.breakeven import select


def pytest_generate_tests(metafunc):
    halves = [(case, impl) for case in select(CASES, sizes=metafunc.config.option.sizes) for impl in ("dense", "sparse")]
    rows = [pytest.param(case, impl, id=f"{case.id}-{impl}") for case, impl in halves if case.limit_s is None or impl == "sparse"]
    metafunc.parametrize(("case", "impl"), rows)


def test_break_even(case, impl, breakeven_race):
    breakeven_race(case, impl)
