"""Tests that were selected to race and left no result, such as one whose kernel cannot be imported: they were not evaluated."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest

from .result import Result
from .verdict import Verdict

FIXTURES = ("breakeven", "breakeven_race")


class Unheard:
    """What ran or was skipped; a test counts as not heard unless its node, or the case that it names, has a result.

    A file that is skipped as a whole (`pytest.importorskip` above its tests) counts when a function in it takes one of the
    fixtures by name. With -k or -m nobody can tell whether its tests were selected, so it is then only named.
    """

    def __init__(self, config: pytest.Config):
        self._root = config.rootpath
        self._narrowed = bool(config.option.keyword or config.option.markexpr)
        self._reasons: dict[str, str] = {}
        self._last: dict[str, str] = {}
        self.unsure: list[str] = []  # lines about skipped files that may hold nothing selected

    def collected(self, report: pytest.CollectReport) -> None:
        path = self._root / report.nodeid.partition("::")[0]
        if not report.skipped or path.suffix != ".py" or not _takes_fixture(path):
            return
        reason = f"the whole file was skipped: {_reason(report)}"
        if self._narrowed:
            self.unsure.append(f"{report.nodeid}: {reason}; its tests were not evaluated, if -k or -m selects any")
        else:
            self._reasons[report.nodeid] = reason

    def ran(self, report: pytest.TestReport) -> None:
        """Told of every phase of a test that takes one of the fixtures."""
        if report.when == "teardown":
            self._reasons[report.nodeid] = self._last.pop(report.nodeid, "it ended without a race")
        elif report.failed:
            self._last[report.nodeid] = "failed before it raced"
        elif report.skipped:
            self._last[report.nodeid] = _reason(report)

    def results(self, answered: Iterable[str]) -> list[Result]:
        left = {node: reason for node, reason in self._reasons.items() if node not in set(answered)}
        return [Result(node, Verdict.NOT_EVALUATED, 1.0, reason) for node, reason in left.items()]


def _reason(report: pytest.CollectReport | pytest.TestReport) -> str:
    said = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
    return str(said).removeprefix("Skipped: ")


def _takes_fixture(path: Path) -> bool:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return False
    functions = (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    return any(argument.arg in FIXTURES for f in functions for argument in [*f.args.args, *f.args.kwonlyargs])
