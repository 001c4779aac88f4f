"""Telling a person what is going on: one line rewritten on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO


class Progress:
    def __init__(self, stream: TextIO | None = None, every_s: float = 10.0):
        self._stream = stream if stream is not None else sys.stderr
        self._live = self._stream.isatty()
        self._every_s = 0.1 if self._live else every_s
        self._last = -1e9

    def status(self, text: str) -> None:
        """Where things stand; may be dropped when another came shortly before."""
        now = time.monotonic()
        if now - self._last < self._every_s:
            return
        self._last = now
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r\x1b[K" + text[:width])
        else:
            self._stream.write(text[:200] + "\n")
        self._stream.flush()

    def line(self, text: str) -> None:
        """A line that stays."""
        self._stream.write(("\r\x1b[K" if self._live else "") + text + "\n")
        self._stream.flush()

    def done(self) -> None:
        """Clear the status line."""
        if self._live:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


class Silent(Progress):
    def __init__(self):
        super().__init__()

    def status(self, text: str) -> None:
        pass

    def line(self, text: str) -> None:
        pass

    def done(self) -> None:
        pass


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
