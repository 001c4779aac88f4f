"""Starting fresh worker processes and hearing from them."""

from __future__ import annotations

import collections
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from .case import Case
from .progress import duration

_HARNESS = "sparse_attention.breakeven"

# The harness is loaded without its parent package: cases that need no torch do not wait for it.
_BOOTSTRAP = """
import importlib, importlib.util, json, os, sys
job = json.load(sys.stdin)
sys.path[:] = job["path"]
for name, file, package in job["modules"]:
    inside = [os.path.dirname(file)] if package else None
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=inside)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
importlib.import_module("sparse_attention.breakeven.worker").main(job)
"""


class WorkerDied(Exception):
    """A worker ended without a result; `case` is the id of the case it was at, if any."""

    def __init__(self, message: str, case: str | None):
        super().__init__(message)
        self.case = case


def run_worker(
    kind: str,
    cases: Iterable[Case],
    *,
    threads: int,
    cores: list[int],
    device: str = "cpu",
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
    timeout_s: float = math.inf,
    silence_s: float = math.inf,
    **fields: Any,
) -> dict[str, Any]:
    """Run a job of `kind` ("scout", "block" or "columns") in a fresh process and return its result.

    Raises WorkerDied when it ends without one, or is ended: after `timeout_s` seconds, or when it says nothing for `silence_s`.
    """
    cases = list(cases)
    job = {
        "kind": kind,
        "cases": [case.as_dict() for case in cases],
        "device": device,
        "seed": seed,
        "cores": cores,
        "path": [entry or os.getcwd() for entry in sys.path],
        "modules": _modules([case.build for case in cases] + [device] * (":" in device)),
        **fields,
    }
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[name] = str(threads)
    process = subprocess.Popen(
        [sys.executable, "-c", _BOOTSTRAP],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
    )
    watchdog = _Watchdog(process, timeout_s, silence_s)
    said: collections.deque[str] = collections.deque(maxlen=40)

    def relay():
        for line in process.stderr:
            if line.strip():
                said.append(line.rstrip())
                progress(line.strip())

    listener = threading.Thread(target=relay, daemon=True)
    listener.start()
    watchdog.start()
    at, result = None, None
    try:
        try:
            process.stdin.write(json.dumps(job))
            process.stdin.close()
        except BrokenPipeError:
            pass  # it died at once; what it said is below
        for line in process.stdout:
            watchdog.heard()
            message = json.loads(line)
            if "result" in message:
                result = message["result"]
            else:
                at = message["case"]
                progress(message["doing"])
        process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        watchdog.stop()
        listener.join(timeout=5)
        process.stdout.close()
        process.stderr.close()
    if result is None and watchdog.barked:
        raise WorkerDied(f"it took longer than {duration(watchdog.limit_s)} (minutes:seconds)", at)
    if result is None:
        how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit status {process.returncode}"
        raise WorkerDied(f"the process ended with {how}: {said[-1] if said else 'it said nothing'}", at)
    return result


class _Watchdog(threading.Thread):
    """Kills a process that lasts longer than `timeout_s` or is not heard of for `silence_s`."""

    def __init__(self, process: subprocess.Popen, timeout_s: float, silence_s: float):
        super().__init__(daemon=True)
        self._process, self._timeout_s, self._silence_s = process, timeout_s, silence_s
        self._start = self._heard = time.monotonic()
        self._stopped = threading.Event()
        self.barked, self.limit_s = False, timeout_s

    def heard(self) -> None:
        self._heard = time.monotonic()

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        while True:
            ends = self._start + self._timeout_s, self._heard + self._silence_s
            left_s = min(ends) - time.monotonic()
            if left_s <= 0:
                self.barked, self.limit_s = True, self._timeout_s if ends[0] <= ends[1] else self._silence_s
                self._process.kill()
            if left_s <= 0 or self._stopped.wait(min(left_s, threading.TIMEOUT_MAX)):
                return


def _modules(functions: Iterable[str]) -> list[tuple[str, str, bool]]:
    """Top-level modules of these "module:name" as this process has them (asv and pytest import some from outside sys.path),
    and this harness, should it have been taken from elsewhere than its parent package.
    """
    names = {name.split(":")[0].split(".")[0] for name in functions} - {"sparse_attention", "__main__"}
    names.add(_HARNESS)
    known = []
    for name in sorted(names):
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None)
        if file:
            known.append((name, os.path.abspath(file), hasattr(module, "__path__")))
    return known
