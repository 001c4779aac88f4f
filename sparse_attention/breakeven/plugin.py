"""The pytest plugin: `breakeven_race` for tables of cases, `breakeven` for two callables in anybody's test, and the exit codes.

Works without pytest-benchmark; with it, its table, JSON and compare hold the measured samples.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest

from .case import Case, Workload
from .cli import positive, seconds
from .gate import Gate
from .race import Settings
from .result import Result
from .terms import add_options

_KEY: pytest.StashKey[Gate] = pytest.StashKey()
_GIVEN: pytest.StashKey[dict[str, Any]] = pytest.StashKey()


def pytest_addoption(parser):
    group = parser.getgroup("breakeven", "performance against a baseline")
    group.addoption("--breakeven-budget", type=seconds, metavar="TIME", help=f"such as 60s or 5m; {Settings.budget_s:.0f}s unless given")
    group.addoption("--breakeven-threads", type=positive, metavar="N", help="1 unless given; all cores beside a GPU")
    group.addoption("--breakeven-device", help="cpu, unless given or chosen by a conftest; cuda, cuda-graph or the module:Class of a clock")
    group.addoption("--breakeven-policy", choices=("two-stage", "sequential"), default="two-stage")
    group.addoption("--breakeven-json", metavar="FILE", help="store the run, with the times of every block")
    group.addoption("--breakeven-memory", action="store_true", help="show each side's peak memory")
    group.addoption("--breakeven-strict", action="store_true", help="exit 11 when a case is inconclusive")
    group.addoption("--breakeven-allow-not-evaluated", action="store_true", help="do not exit 12 when one was not judged")
    add_options(group.addoption, "breakeven-")
    group.addoption("--breakeven-worker", help=argparse.SUPPRESS)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    config.stash[_GIVEN] = dict(vars(config.option))


def pytest_configure(config):
    config.stash[_KEY] = Gate(config, config.stash.get(_GIVEN, vars(config.option)))
    config.pluginmanager.register(config.stash[_KEY], "breakeven-gate")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    config.stash[_KEY].prepare(items)


@pytest.fixture
def breakeven_race(request) -> Callable[..., Result]:
    """`breakeven_race(case, impl)` for a table's rows: all selected cases are raced when the first test asks; the "sparse" half carries the verdict."""
    gate = request.config.stash[_KEY]
    gate.refuse_company()

    def run(case: Case, impl: Literal["dense", "sparse"] = "sparse") -> Result:
        return gate.race(request, case, impl)

    return run


@pytest.fixture
def breakeven(request) -> Callable[..., Result]:
    """`breakeven(candidate, baseline, at_least=1.0, check=..., inputs=())`: fails below `at_least` times the baseline's
    speed. `check` takes the candidate's output and raises when it is wrong (by default it must equal the baseline's);
    `inputs` are tensors or arrays that may be changed in place, to find out outputs kept from an earlier call.
    `at_least` holds on every machine, unless --breakeven-thresholds names a file of floors: then one for this test and
    machine class comes first, and on a class that the file does not know nothing is judged.
    """
    gate = request.config.stash[_KEY]
    gate.refuse_company()
    calls = 0

    def compare(
        candidate: Callable[[], Any],
        baseline: Callable[[], Any],
        at_least: float = 1.0,
        check: Callable[[Any], None] | None = None,
        inputs: Sequence[Any] = (),
    ) -> Result:
        nonlocal calls
        calls += 1
        key = request.node.nodeid if calls == 1 else f"{request.node.nodeid} #{calls}"
        workload = Workload(candidate, {"baseline": baseline}, check, inputs)
        return gate.compare(request, key, workload, at_least)

    return compare
