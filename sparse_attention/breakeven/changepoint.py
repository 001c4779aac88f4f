"""Where a history of runs changes its level, upwards or downwards.

The series is cut by optimal partitioning under the Schwarz criterion (Jackson et al. 2005, IEEE Signal Processing Letters
12(2); Yao 1988, Statistics & Probability Letters 6(3)), with the noise taken from successive differences so that the steps
themselves do not inflate it. That cuts too often. A cut then stays only if the levels on its two sides differ by a t-test,
Bonferroni-corrected for the places where it could have been (Worsley 1979, JASA 74); the least sure cut goes first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .statistics import t_quantile, t_tail


@dataclass(frozen=True)
class ChangePoint:
    """A step: the values from `index` on have another mean than those before."""

    index: int
    before: float
    after: float
    low: float  # 95 % interval of after - before
    high: float
    p: float  # corrected for the choice of the index

    @property
    def step(self) -> float:
        return self.after - self.before


def find(values: Sequence[float], alpha: float = 0.001, least: int = 3) -> list[ChangePoint]:
    """Steps of a series of about normal values, such as mean log speedups in the order of commits.

    A level lasts at least `least` values, so that one or two outliers are none. Series of independent normal values hold
    a false step about `alpha` of the time; of 30 values that depend on their neighbours (correlation 0.2), 7 times as often.
    """
    if least < 2 or not 0 < alpha < 1:
        raise ValueError(f"least must be 2 or more and alpha lie in (0, 1), got {least} and {alpha}")
    x = np.asarray(values, dtype=float)
    if not np.isfinite(x).all():
        raise ValueError("values must be finite")
    if len(x) < 2 * least:
        return []
    spread = _spread(x)
    tame = _without_outliers(x, spread)
    cuts = _partition(tame, least, spread)
    while len(cuts) > 2:
        steps = _steps(x, tame, cuts, len(x) - 2 * least + 1)
        unsure = max(steps, key=lambda s: s.p)
        if unsure.p <= alpha:
            return steps
        cuts.remove(unsure.index)
    return []


def _spread(x: np.ndarray) -> float:
    """Standard deviation of the noise, from the median absolute difference of neighbours."""
    differences = np.diff(x)
    spread = 1.4826 * np.median(np.abs(differences - np.median(differences))) / math.sqrt(2)
    return max(float(spread), 1e-3 * float(np.ptp(x)), 1e-12)


def _without_outliers(x: np.ndarray, spread: float) -> np.ndarray:
    """Values pulled to within 3 spreads of the median of the five around them: a step stays, a lone outlier does not."""
    middle = np.array([np.median(x[max(0, i - 2) : i + 3]) for i in range(len(x))])
    return np.clip(x, middle - 3 * spread, middle + 3 * spread)


def _partition(x: np.ndarray, least: int, spread: float) -> list[int]:
    """Bounds 0, ..., len(x) of the segments that minimise squares / noise variance + 2 log n for each segment."""
    n = len(x)
    total, squares = (np.concatenate([[0.0], np.cumsum(part)]) for part in (x - x.mean(), (x - x.mean()) ** 2))
    best, previous = np.full(n + 1, np.inf), np.zeros(n + 1, dtype=int)
    best[0] = 0.0
    for end in range(least, n + 1):
        start = np.arange(0, end - least + 1)
        residual = squares[end] - squares[start] - (total[end] - total[start]) ** 2 / (end - start)
        cost = best[start] + residual / spread**2 + 2 * math.log(n)
        previous[end] = start[np.argmin(cost)]
        best[end] = cost.min()
    bounds = [n]
    while bounds[-1]:
        bounds.append(int(previous[bounds[-1]]))
    return bounds[::-1]


def _steps(x: np.ndarray, tame: np.ndarray, bounds: list[int], places: int) -> list[ChangePoint]:
    """The step at each inner bound: means without outliers, tested with the variance of all values, outliers included."""
    freedom = len(x) - (len(bounds) - 1)
    segments = list(zip(bounds, bounds[1:]))
    sd = math.sqrt(sum(((x[a:b] - x[a:b].mean()) ** 2).sum() for a, b in segments) / freedom)
    quantile = t_quantile(0.975, freedom)
    steps = []
    for (first, index), (_, last) in zip(segments, segments[1:]):
        before, after = float(tame[first:index].mean()), float(tame[index:last].mean())
        error = max(sd * math.sqrt(1 / (index - first) + 1 / (last - index)), 1e-12)
        p = min(1.0, 2 * places * t_tail(abs(after - before) / error, freedom))
        half = quantile * error
        steps.append(ChangePoint(index, before, after, after - before - half, after - before + half, p))
    return steps
