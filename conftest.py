"""Loads the break-even plugin in a checkout that is not installed; for perf/ adds --sizes."""

from importlib.metadata import entry_points

_PLUGIN = "sparse_attention.breakeven.plugin"
pytest_plugins = [] if any(e.value == _PLUGIN for e in entry_points(group="pytest11")) else [_PLUGIN]


def pytest_addoption(parser):
    parser.addoption("--sizes", choices=("default", "full"), default="default", help="perf/: full adds the largest cases")
