"""Handing measured times to pytest-benchmark through its public interface: a clock that we set, and a test that sets it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


class VirtualClock:
    """A timer for pytest-benchmark that stands still except when a replayed call moves it."""

    __name__ = "breakeven"

    def __init__(self):
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds


def prepare(item: pytest.Item, group: str) -> None:
    """Give the item pytest-benchmark's fixture with a virtual clock."""
    item.add_marker(pytest.mark.benchmark(timer=VirtualClock(), group=group))
    item.add_marker(pytest.mark.filterwarnings("ignore:Benchmark fixture was not used"))  # a case without a time
    if "benchmark" not in item.fixturenames:
        item.fixturenames.append("benchmark")


def replay(request: pytest.FixtureRequest, samples: Iterable[float], extra: dict[str, Any]) -> None:
    """Let pytest-benchmark time one round for each sample; `extra` lands in its JSON."""
    clock = request.node.get_closest_marker("benchmark").kwargs["timer"]
    samples = list(samples)
    upcoming = iter(samples)
    benchmark = request.getfixturevalue("benchmark")
    benchmark.extra_info.update(extra)
    benchmark.pedantic(lambda: clock.advance(next(upcoming)), rounds=len(samples), iterations=1)
