"""Rates from measured times: least squares on the relative error, with no rate below zero."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sparse_attention.rates import Rate, Work

QUANTILES = (0, 10, 50, 90, 100)
LEAST_SAMPLES = 2 * len(Rate._fields)


class Sample(NamedTuple):
    """One measured call."""

    work: Work
    head_dim: int
    nanoseconds: float


class Fit(NamedTuple):
    """spread: predicted over measured time at the percentiles QUANTILES of the samples."""

    rate: Rate
    spread: tuple[float, ...]
    samples: int


def fit(samples: Sequence[Sample]) -> Fit:
    """The rate that predicts the samples best. ValueError for too few to tell its terms apart."""
    columns = np.array([_terms(sample) for sample in samples], float)
    measured = np.array([s.nanoseconds for s in samples])
    if len(samples) < LEAST_SAMPLES:
        raise ValueError(f"samples holds {len(samples)} calls; expected at least {LEAST_SAMPLES}")
    rate = non_negative_least_squares(columns / measured[:, None], np.ones(len(samples)))
    ratio = columns @ rate / measured
    return Fit(Rate(*map(float, rate)), tuple(float(r) for r in np.percentile(ratio, QUANTILES)), len(samples))


def _terms(sample: Sample) -> list[float]:
    """What each term of the rate contributes at one nanosecond."""
    return [Rate(*unit).time(sample.work, sample.head_dim) for unit in np.eye(len(Rate._fields))]


def non_negative_least_squares(columns: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The x >= 0 that minimises |columns @ x - target|, exactly: the best of the solutions on every subset of the few columns."""
    scale = np.linalg.norm(columns, axis=0)
    useful = np.nonzero(scale)[0]
    rotation, columns = np.linalg.qr(columns)
    target = rotation.T @ target
    best, best_error = np.zeros(columns.shape[1]), float(target @ target)
    for size in range(1, len(useful) + 1):
        for subset in map(list, itertools.combinations(useful, size)):
            solution, *_ = np.linalg.lstsq(columns[:, subset] / scale[subset], target, rcond=None)
            solution /= scale[subset]
            error = float(np.sum((columns[:, subset] @ solution - target) ** 2))
            if solution.min() >= 0 and error < best_error:
                best, best_error = np.zeros(columns.shape[1]), error
                best[subset] = solution
    return best
