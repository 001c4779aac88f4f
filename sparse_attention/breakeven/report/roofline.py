"""Useful work against time: how near each case is to what the machine can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..anchor import ceilings
from ..result import Result
from ..store import Run


@dataclass(frozen=True)
class Spot:
    """One case. Rates count the work of the candidate only: the baseline's is that which it delivers of the same work."""

    id: str
    intensity: float  # useful FLOPs for each byte
    rate: float  # useful FLOP/s
    baseline_rate: float | None
    bytes_per_s: float


@dataclass(frozen=True)
class Roofline:
    """The cases of one dtype. Ceilings are None where they were not measured."""

    dtype: str
    spots: tuple[Spot, ...] = field(default_factory=tuple)
    flops_per_s: float | None = None
    bytes_per_s: float | None = None

    def share(self, spot: Spot) -> float | None:
        """Of what the ceilings allow at the spot's intensity."""
        limits = [self.flops_per_s] if self.flops_per_s else []
        limits += [self.bytes_per_s * spot.intensity] if self.bytes_per_s else []
        return spot.rate / min(limits) if limits else None


def rooflines(run: Run, results: Sequence[Result]) -> list[Roofline]:
    """One for each dtype whose cases state their FLOPs and bytes; the ceilings are those that the run's anchors reached.

    Cases without an undisturbed block are left out.
    """
    spots: dict[str, list[Spot]] = {}
    for found in results:
        record = run.records[found.id]
        work = record.scout.get("work") or {}
        if not (found.interval and work.get("flops") and work.get("bytes")):
            continue
        flops, moved = work["flops"], work["bytes"]
        baseline_rate = flops / found.baseline_s if found.baseline_s and record.case.limit_s is None else None
        spot = Spot(found.id, flops / moved, flops / found.candidate_s, baseline_rate, moved / found.candidate_s)
        spots.setdefault(str(record.case.args.get("dtype", "")), []).append(spot)
    limits = ceilings(run.evidence)
    flops_per_s = limits.get("flops_per_s", {})
    return [Roofline(dtype, tuple(seen), flops_per_s.get(dtype), limits.get("bytes_per_s")) for dtype, seen in spots.items()]
