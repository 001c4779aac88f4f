"""Loads the break-even plugin in a checkout that is not installed; for perf/ adds --sizes and lets the cases have all cores."""

from importlib.metadata import entry_points
from pathlib import Path

import pytest

_PLUGIN = "sparse_attention.breakeven.plugin"
pytest_plugins = [] if any(e.value == _PLUGIN for e in entry_points(group="pytest11")) else [_PLUGIN]


def pytest_addoption(parser):
    parser.addoption("--sizes", choices=("default", "full"), default="default", help="perf/: full adds the largest cases")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """`pytest perf` shows what a user's machine does, in five minutes: on one thread, a gate's default, it would take longer."""
    perf = Path(__file__).resolve().parent / "perf"
    chosen = [Path(str(argument).partition("::")[0]).resolve() for argument in config.args]
    if config.option.breakeven_threads is None and any(perf in (path, *path.parents) for path in chosen):
        from sparse_attention.breakeven.machine import cores

        config.option.breakeven_threads = cores()
