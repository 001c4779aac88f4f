"""Peak memory of one call."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any


def peak_bytes(call: Callable[[], Any]) -> int | None:
    """Bytes by which resident memory rose above its start at the worst moment of `call`; None where it cannot be told."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        _return_freed_memory()
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # forget the high-water mark
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    kept = call()
    peak = _status_bytes("VmHWM") - before
    del kept
    return max(peak, 0)


def _status_bytes(name: str) -> int:
    with open("/proc/self/status") as f:
        for line in f:
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def _return_freed_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
