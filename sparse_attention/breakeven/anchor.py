"""Fixed work that belongs to no side, timed in every block: when it moves, the machine moved."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from .clock import Clock

KINDS = ("compute", "memory")
REPEATS = 5  # of each kind in each visit


class Anchor:
    """Visited before and after the cases of a block are timed. `compute` tracks the cores' clock, `memory` the bandwidth."""

    def __init__(self, device: str, clock: Clock):
        self._clock = clock
        self._source, self._calls = _cuda() if device.startswith("cuda") else _cpu()
        self._seconds: dict[str, list[float]] = {kind: [] for kind in self._calls}

    def visit(self) -> None:
        for kind, call in self._calls.items():
            call()
            self._seconds[kind] += [self._clock.time(call, 1) for _ in range(REPEATS)]

    def as_dict(self) -> dict[str, Any]:
        """Median seconds of each kind, and whose work it is: numbers of another source are not comparable."""
        medians = {kind: statistics.median(seconds) for kind, seconds in self._seconds.items() if seconds}
        return {"source": self._source, **{kind: seconds for kind, seconds in medians.items() if seconds > 0}}


def _cpu() -> tuple[str, Mapping[str, Callable[[], Any]]]:
    try:
        import numpy as np
    except ImportError:
        return "none", {}
    a, b, out = (np.ones((256, 256), np.float32) for _ in range(3))
    source, target = (np.zeros(1 << 25, np.uint8) for _ in range(2))
    return f"numpy {np.__version__}", {
        "compute": lambda: np.matmul(a, b, out=out),
        "memory": lambda: np.copyto(target, source),
    }


def _cuda() -> tuple[str, Mapping[str, Callable[[], Any]]]:
    import torch

    a, b, out = (torch.ones(4096, 4096, dtype=torch.float16, device="cuda") for _ in range(3))
    source, target = (torch.zeros(1 << 29, dtype=torch.uint8, device="cuda") for _ in range(2))
    return f"torch {torch.__version__}", {
        "compute": lambda: torch.mm(a, b, out=out),
        "memory": lambda: target.copy_(source),
    }
