"""Starting fresh worker processes and hearing from them."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from .case import Case

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
    timeout_s: float | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Run a job of `kind` ("scout", "block" or "columns") in a fresh process and return its result."""
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
    alarm = threading.Timer(timeout_s, process.kill) if timeout_s else None
    said: collections.deque[str] = collections.deque(maxlen=40)

    def relay():
        for line in process.stderr:
            if line.strip():
                said.append(line.rstrip())
                progress(line.strip())

    listener = threading.Thread(target=relay, daemon=True)
    listener.start()
    if alarm:
        alarm.start()
    at, result = None, None
    try:
        try:
            process.stdin.write(json.dumps(job))
            process.stdin.close()
        except BrokenPipeError:
            pass  # it died at once; what it said is below
        for line in process.stdout:
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
        if alarm:
            alarm.cancel()
        listener.join(timeout=5)
        process.stdout.close()
        process.stderr.close()
    if result is None:
        how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit status {process.returncode}"
        raise WorkerDied(f"the process ended with {how}: {said[-1] if said else 'it said nothing'}", at)
    return result


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
