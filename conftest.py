"""Loads the break-even plugin in a checkout that is not installed; for perf/ adds --sizes and measures on a GPU where there is one."""

from importlib.metadata import entry_points
from pathlib import Path

import pytest

_PLUGIN = "sparse_attention.breakeven.plugin"
pytest_plugins = [] if any(e.value == _PLUGIN for e in entry_points(group="pytest11")) else [_PLUGIN]
_PERF = Path(__file__).resolve().parent / "perf"
_SAID = pytest.StashKey()


def pytest_addoption(parser):
    parser.addoption("--sizes", choices=("default", "full"), default="default", help="perf/: full adds the largest cases")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    option = config.option
    if not _perf_is_asked_for(config):
        return
    from perf import device

    if option.breakeven_device is None:
        try:
            option.breakeven_device, why = device.chosen()
        except device.Unfit as error:
            raise pytest.UsageError(f"{error}. --breakeven-device cpu measures the CPU's kernels") from None
        config.stash[_SAID] = f"break-even: measured on {option.breakeven_device} ({why}); --breakeven-device chooses another"
    if option.breakeven_device.startswith("cuda") and option.breakeven_budget is None:
        option.breakeven_budget = device.GPU_BUDGET_S


def pytest_report_header(config):
    return config.stash.get(_SAID, None)


def _perf_is_asked_for(config) -> bool:
    asked = [Path(config.invocation_params.dir, word.partition("::")[0]).resolve() for word in config.args]
    return any(path == _PERF or _PERF in path.parents or path in _PERF.parents for path in asked)
