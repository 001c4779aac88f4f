"""Where a tree's time goes, with the device finished at both ends of every section."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

SECTIONS = ("total", "preallocation", "mask", "tolist", "retrieve_indices")
_NOTHING = nullcontext()


class Profile:
    """Times of named sections, in seconds, kept until `clear`. Pass one as `profile=` to `build`, `build_tree` or `tree_mask`.

    total: the whole call. preallocation: the outputs. tolist: copies of parents to the host. mask: the mask; for the fused kernel, all
    of its work. retrieve_indices: the rows of paths. A section that an implementation does not have is not in the report.
    """

    def __init__(self):
        self.times: dict[str, list[float]] = {}

    @contextmanager
    def section(self, name: str, device: torch.device) -> Iterator[None]:
        """Times its body; waits for the device before and after."""
        _wait(device)
        start = time.perf_counter()
        try:
            yield
        finally:
            _wait(device)
            self.times.setdefault(name, []).append(time.perf_counter() - start)

    def report(self) -> dict[str, dict[str, float]]:
        """For each section: calls, mean, minimum and sum, in seconds. Leaves the times as they are."""
        return {
            name: {"calls": len(times), "mean": sum(times) / len(times), "min": min(times), "sum": sum(times)}
            for name, times in self.times.items()
        }

    def clear(self) -> None:
        """Forgets every time."""
        self.times.clear()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def section(profile: Profile | None, name: str, device: torch.device) -> AbstractContextManager:
    """A section of `profile`, or nothing at all when there is no profile."""
    return _NOTHING if profile is None else profile.section(name, device)
