"""What modules import while they are watched: which code a call really ran through."""

from __future__ import annotations

import builtins
import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator


class Imports:
    """What the packages of these names import, seen while `watched()`.

    Imports at the top of a module happen once and hold for all that reach the module; those in functions for this time only.
    """

    def __init__(self, packages: Iterable[str]):
        self._packages = frozenset(packages)
        self._top: dict[str, set[str]] = {}  # module -> modules
        self._now: set[str] = set()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        plain, dynamic, self._now = builtins.__import__, importlib.import_module, set()

        def watching(name, globals=None, locals=None, fromlist=(), level=0):
            found = plain(name, globals, locals, fromlist, level)
            importer = (globals or {}).get("__name__", "")
            if importer.partition(".")[0] in self._packages:
                full = importlib.util.resolve_name("." * level + name, globals.get("__package__")) if level else name
                seen = self._top.setdefault(importer, set()) if globals is locals else self._now
                seen.update([full, *(f"{full}.{item}" for item in fromlist or () if f"{full}.{item}" in sys.modules)])
            return found

        def watching_dynamic(name, package=None):
            found = dynamic(name, package)
            if sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] in self._packages:
                self._now.add(found.__name__)
            return found

        builtins.__import__, importlib.import_module = watching, watching_dynamic
        try:
            yield
        finally:
            builtins.__import__, importlib.import_module = plain, dynamic

    def reached(self, start: str) -> set[str]:
        """Modules that `start`, and what was called meanwhile, imported directly or through modules of those packages."""
        found, pending = set(), [start, *self._now]
        while pending:
            name = pending.pop()
            if name not in found:
                found.add(name)
                pending += self._top.get(name, ())
        return found
