"""Where the tensors of a race are made: on what its clock times."""

from __future__ import annotations

from typing import Any

from .arrays import arrays
from .case import Unavailable, Workload

_current = "cpu"


def current_device() -> str:
    """For builders of workloads: "cuda" in a process that measures with one of the CUDA clocks, otherwise "cpu"."""
    return _current


def use_clock(device: str) -> None:
    """Told once, by a process that is going to measure with this clock."""
    global _current
    _current = "cuda" if _is_cuda(device) else "cpu"


def require_on_device(workload: Workload, device: str) -> None:
    """Unavailable where a CUDA clock would time work of which nothing is on the GPU: it would time nothing."""
    if _is_cuda(device) and not (_any_on_gpu(list(workload.inputs)) or _any_on_gpu(workload.candidate())):
        raise Unavailable(f"neither its inputs nor its output are on the GPU, which is all that the {device} clock times")


def _is_cuda(device: str) -> bool:
    return device in ("cuda", "cuda-graph")


def _any_on_gpu(output: Any) -> bool:
    return any("cuda" in str(getattr(array, "device", "")).lower() for array in arrays(output))
