"""Fixed work that belongs to no side, timed in every block: when it moves, the machine moved."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .clock import Clock

KINDS = ("compute", "memory")
REPEATS = 5  # of each kind in each visit
_SIDE = {"numpy": 256, "torch": 4096}  # of the square matrices that `compute` multiplies
_BYTES = {"numpy": 1 << 25, "torch": 1 << 29}  # that `memory` copies
_DTYPES = {"numpy": ("float32",), "torch": ("float16", "bfloat16")}


class Anchor:
    """Visited before and after the cases of a block are timed. `compute` tracks the cores' clock, `memory` the bandwidth.

    A device of one's own has none.
    """

    def __init__(self, device: str, clock: Clock):
        self._clock = clock
        self._source, self._calls = _cuda() if device.startswith("cuda") else _cpu() if device == "cpu" else ("none", {})
        self._seconds: dict[str, list[float]] = {kind: [] for kind in self._calls}

    def visit(self) -> None:
        for kind, call in self._calls.items():
            call()
            self._seconds[kind] += [self._clock.time(call, 1) for _ in range(REPEATS)]

    def as_dict(self) -> dict[str, Any]:
        """Median seconds of each kind, and whose work it is: numbers of another source are not comparable."""
        return {"source": self._source, **{kind: statistics.median(seconds) for kind, seconds in self._seconds.items() if seconds}}


def ceilings(evidence: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The best rates that the anchors of a run's blocks reached: {"flops_per_s": {dtype: rate}, "bytes_per_s": rate}."""
    best: dict[str, float] = {}
    source = ""
    for anchor in (entry.get("anchor") or {} for entry in evidence):
        source = anchor.get("source", "").partition(" ")[0]
        for kind in KINDS:
            if kind in anchor:
                best[kind] = min(anchor[kind], best.get(kind, anchor[kind]))
    if source not in _SIDE:
        return {}
    found: dict[str, Any] = {}
    if "compute" in best:
        found["flops_per_s"] = dict.fromkeys(_DTYPES[source], 2 * _SIDE[source] ** 3 / best["compute"])
    if "memory" in best:
        found["bytes_per_s"] = 2 * _BYTES[source] / best["memory"]
    return found


def _cpu() -> tuple[str, Mapping[str, Callable[[], Any]]]:
    try:
        import numpy as np
    except ImportError:
        return "none", {}
    side = _SIDE["numpy"]
    a, b, out = (np.ones((side, side), np.float32) for _ in range(3))
    source, target = (np.zeros(_BYTES["numpy"], np.uint8) for _ in range(2))
    return f"numpy {np.__version__}", {
        "compute": lambda: np.matmul(a, b, out=out),
        "memory": lambda: np.copyto(target, source),
    }


def _cuda() -> tuple[str, Mapping[str, Callable[[], Any]]]:
    import torch

    side = _SIDE["torch"]
    a, b, out = (torch.ones(side, side, dtype=torch.float16, device="cuda") for _ in range(3))
    source, target = (torch.zeros(_BYTES["torch"], dtype=torch.uint8, device="cuda") for _ in range(2))
    return f"torch {torch.__version__}", {
        "compute": lambda: torch.mm(a, b, out=out),
        "memory": lambda: target.copy_(source),
    }
