"""Estimates from paired blocks. The unit of replication is the block (a fresh process), never the single pair:
pairs of one process share its memory layout, its core and its minute, so an interval over them is far too narrow.
"""

from __future__ import annotations

import math
import statistics as _stdlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Interval:
    """A speedup (baseline time / candidate time) with its confidence interval over blocks."""

    speedup: float
    low: float
    high: float
    blocks: int
    sd: float  # standard deviation between blocks, of the logarithm
    alpha: float  # error probability on each side


def block_log_speedup(baseline_s: Sequence[float], candidate_s: Sequence[float]) -> float:
    """Median over one block's pairs of log(baseline / candidate)."""
    if len(baseline_s) != len(candidate_s) or not baseline_s:
        raise ValueError(
            f"baseline_s and candidate_s must be equally long and not empty, got {len(baseline_s)} and {len(candidate_s)}"
        )
    return _stdlib.median(math.log(b / c) for b, c in zip(baseline_s, candidate_s))


def interval(logs: Sequence[float], alpha: float) -> Interval:
    """t-interval over block log speedups; `alpha` is the error probability on each side."""
    if not logs:
        raise ValueError("logs must hold at least one block, got none")
    mean = _stdlib.fmean(logs)
    if len(logs) == 1:
        return Interval(math.exp(mean), 0.0, math.inf, 1, math.nan, alpha)
    sd = math.sqrt(math.fsum((x - mean) ** 2 for x in logs) / (len(logs) - 1))  # statistics.stdev takes 30 times as long
    half = t_quantile(1 - alpha, len(logs) - 1) * sd / math.sqrt(len(logs))
    return Interval(math.exp(mean), math.exp(mean - half), math.exp(mean + half), len(logs), sd, alpha)


def detectable_slowdown(sd: float, blocks: int, alpha: float, power: float = 0.95) -> float:
    """The slowdown (0.05 is 5 % more time) that `blocks` blocks find with probability `power`; inf for one block."""
    if blocks < 2:
        return math.inf
    reach = t_quantile(1 - alpha, blocks - 1) + t_quantile(power, blocks - 1)
    return math.expm1(reach * sd / math.sqrt(blocks))


def blocks_to_detect(sd: float, slowdown: float, alpha: float, power: float = 0.95, most: int = 1000) -> int | None:
    """The fewest blocks that find `slowdown` with probability `power`; None when `most` are not enough."""
    for blocks in range(2, most + 1):
        if detectable_slowdown(sd, blocks, alpha, power) <= slowdown:
            return blocks
    return None


def clopper_pearson(events: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact two-sided confidence interval of a proportion."""
    if not 0 <= events <= trials or trials < 1:
        raise ValueError(f"events must lie in 0..trials and trials be positive, got {events} of {trials}")
    tail = (1 - confidence) / 2
    low = 0.0 if events == 0 else _beta_quantile(tail, events, trials - events + 1)
    high = 1.0 if events == trials else _beta_quantile(1 - tail, events + 1, trials - events)
    return low, high


@lru_cache(maxsize=4096)
def t_quantile(p: float, df: float) -> float:
    """Quantile of Student's t distribution with `df` degrees of freedom."""
    if not 0 < p < 1 or df < 1:
        raise ValueError(f"p must lie in (0, 1) and df be at least 1, got {p} and {df}")
    if p < 0.5:
        return -t_quantile(1 - p, df)
    # P(|T| > t) = I_x(df / 2, 1 / 2) at x = df / (df + t^2)
    x = _beta_quantile(2 * (1 - p), df / 2, 0.5) if p > 0.5 else 1.0
    return math.sqrt(df * (1 - x) / x)


def t_tail(t: float, df: float) -> float:
    """P(T > t) of Student's t distribution, for t >= 0."""
    if t < 0 or not df > 0:
        raise ValueError(f"t must not be negative and df be positive, got {t} and {df}")
    return _beta_cdf(df / (df + t * t), df / 2, 0.5) / 2


def _beta_quantile(p: float, a: float, b: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if _beta_cdf(middle, a, b) < p:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _beta_cdf(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta function by its continued fraction (Lentz's method)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta_cdf(1 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    c, d = 1.0, 1 / _nonzero(1 - (a + b) * x / (a + 1))
    total = d
    for m in range(1, 500):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for numerator in (even, odd):
            d = 1 / _nonzero(1 + numerator * d)
            c = _nonzero(1 + numerator / c)
            total *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return math.exp(log_front) * total / a


def _nonzero(x: float) -> float:
    return x if abs(x) > 1e-300 else 1e-300
