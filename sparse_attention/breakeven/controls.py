"""Negative controls: gates that must fail or refuse, run as a user would run them, with the exit code that they printed."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .machine import pinned

_SPIN = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile os.getppid() == int(sys.argv[2]): sum(range(10_000))"


@dataclass(frozen=True)
class Control:
    """A command line after `python -m`, and the exit codes of which it must give one."""

    name: str
    arguments: tuple[str, ...]
    expected: tuple[int, ...]
    says: str = ""  # a pattern that its output must hold
    neighbours: bool = False  # processes that keep the measuring cores busy
    needs: str = ""  # "cuda", where it takes that device


@dataclass(frozen=True)
class Outcome:
    name: str
    command: str
    expected: tuple[int, ...]
    exit: int | None  # None where it could not be tried here
    said: str  # the lines that tell why
    held: bool | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_controls(controls: Iterable[Control], threads: int) -> Iterator[Outcome]:
    """One after the other; each control's command runs with one BLAS and OpenMP thread a core that it measures on."""
    for control in controls:
        yield _tried(control, threads) if _possible(control.needs) else _missing(control)


@contextlib.contextmanager
def neighbours(cores: Sequence[int], each: int = 2) -> Iterator[None]:
    """Keep these cores busy with `each` processes meanwhile; they end with this process too."""
    command = [sys.executable, "-c", _SPIN]
    spinning = [subprocess.Popen([*command, str(core), str(os.getpid())]) for core in cores for _ in range(each)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def _tried(control: Control, threads: int) -> Outcome:
    busy = neighbours(pinned(threads)) if control.neighbours else contextlib.nullcontext()
    with busy:
        done = subprocess.run(
            [sys.executable, "-m", *control.arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600
        )
    said = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    telling = [line for line in said if _TELLING.search(line)] or said
    held = done.returncode in control.expected and re.search(control.says, done.stdout) is not None
    return Outcome(control.name, _words(control), control.expected, done.returncode, "\n".join(telling[-2:]), held)


def _missing(control: Control) -> Outcome:
    return Outcome(control.name, _words(control), control.expected, None, f"needs {control.needs}, which is not here", None)


def _words(control: Control) -> str:
    return " ".join(("python", "-m", *control.arguments)) + (" beside busy neighbours" if control.neighbours else "")


def _possible(needs: str) -> bool:
    if needs != "cuda":
        return True
    import torch

    return torch.cuda.is_available()


_TELLING = re.compile(r"WRONG|SUSPICIOUS|FAIL\b|NOT EVALUATED|exit \d|^breakeven: |^ERROR|no tests ran|deselected")
