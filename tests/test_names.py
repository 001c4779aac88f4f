"""No module uses a name that it does not have: code that only a GPU reaches is not run in CI."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pyflakes", reason="pyflakes is not installed")

from pyflakes.api import checkPath
from pyflakes.messages import UndefinedName
from pyflakes.reporter import Reporter

PACKAGE = Path(__file__).parents[1] / "sparse_attention"


class Found(Reporter):
    def __init__(self):
        self.messages = []

    def unexpectedError(self, filename, message):
        self.messages.append(f"{filename}: {message}")

    def syntaxError(self, filename, message, lineno, offset, text):
        self.messages.append(f"{filename}:{lineno}: {message}")

    def flake(self, message):
        if isinstance(message, UndefinedName):
            self.messages.append(str(message))


def undefined(folder: Path) -> list[str]:
    found = Found()
    for path in folder.rglob("*.py"):
        checkPath(str(path), found)
    return found.messages


def test_no_name_is_undefined():
    assert list(PACKAGE.rglob("*.py")) and not undefined(PACKAGE)


def test_an_undefined_name_is_found(tmp_path):
    (tmp_path / "module.py").write_text("def f():\n    return torch.zeros(3)\n")
    assert ["undefined name 'torch'" in message for message in undefined(tmp_path)] == [True]
