"""95 % intervals by drawing the examples anew, the same ones for both models.

    example i, as both models answered it    (a_i, b_i, y_i)           drawn together, with replacement
    a measure                                s(a, y)                   its interval: percentiles of 2,000 draws
    the difference                           s(a, y) - s(b, y)         of one and the same draw

What is hard for one model is hard for the other, so the interval of the difference is far narrower than the two
intervals are wide, and it is the one that tells whether something was lost. It holds what the choice of examples
leaves open, and nothing else. Percentiles (Efron 1979) and not BCa: BCa is undefined where no example differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fxcompress.core.errors import EvaluationError

CONFIDENCE = 0.95
RESAMPLES = 2_000  # the share outside, .025 a side, is met within sqrt(.025 .975 / 2000) = .0035
FEWEST = 10  # examples: fewer may be drawn all alike (10^-9 at 10, 11 % at 3), and say nothing
NUMBERS_AT_ONCE = 2_000_000  # 16 MB a sample

Samples = NDArray[np.float64]
Statistic = Callable[..., Any]  # of samples (…, n), along the last axis -> (…)


@dataclass(frozen=True)
class Estimate:
    """A measure and its 95 % interval."""

    value: float
    low: float
    high: float


def interval(statistic: Statistic, *samples: Samples, seed: int = 0) -> Estimate:
    """`statistic` of `samples`, each (n,), and its interval over examples drawn anew, by a generator of its own.

    Raises `EvaluationError` for fewer than 10 examples.
    """
    from scipy.stats import bootstrap  # a third of a second, which `import fxcompress` need not take

    n = len(samples[0])
    if n < FEWEST:
        raise EvaluationError(f"{n} examples are too few for an interval; {FEWEST} or more are wanted.")
    found: Any = bootstrap(
        samples,
        statistic,
        paired=True,
        vectorized=True,
        axis=-1,
        n_resamples=RESAMPLES,
        batch=max(1, NUMBERS_AT_ONCE // n),
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(seed),
    )
    low, high = found.confidence_interval
    return Estimate(float(statistic(*samples, axis=-1)), float(low), float(high))


def difference(statistic: Statistic) -> Statistic:
    """(a, b, y) -> statistic(a, y) - statistic(b, y)."""

    def of(a: Samples, b: Samples, y: Samples, axis: int = -1) -> Any:
        return statistic(a, y, axis=axis) - statistic(b, y, axis=axis)

    return of


def spearman(x: Samples, y: Samples, axis: int = -1) -> Any:
    """Spearman's rank correlation along the last axis: Pearson's of the ranks, ties at their mean rank.

    scipy.stats.spearmanr, which takes one pair of samples at a time; they are equal (tests/test_bootstrap.py).
    """
    from scipy.stats import rankdata

    ranks = [rankdata(sample, axis=axis) for sample in (x, y)]
    a, b = (r - r.mean(axis, keepdims=True) for r in ranks)
    return (a * b).sum(axis) / np.sqrt((a * a).sum(axis) * (b * b).sum(axis))


def ratio(x: Samples, y: Samples, axis: int = -1) -> Any:
    """sum x / sum y: nats a token of windows, and accuracy where every y is 1."""
    return x.sum(axis) / y.sum(axis)


def perplexity(nats: Samples, tokens: Samples, axis: int = -1) -> Any:
    """exp(nats a token)."""
    return np.exp(ratio(nats, tokens, axis))
