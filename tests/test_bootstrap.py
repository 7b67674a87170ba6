"""Intervals cover what they say they cover, and the paired one is the narrow one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, spearmanr

from fxcompress.core.errors import EvaluationError
from fxcompress.evaluation.bootstrap import RESAMPLES, Estimate, difference, interval, perplexity, ratio, spearman


def test_spearman_is_scipys_for_every_draw_and_with_ties():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 40)), rng.integers(0, 4, (5, 40)).astype(float)
    # Sums of 40 products of ranks below 40, each rounded once: 40 eps of the whole, twice (top and bottom).
    expected = [spearmanr(a, b).statistic for a, b in zip(x, y)]
    assert np.abs(spearman(x, y, axis=-1) - expected).max() < 80 * np.finfo(float).eps


def test_accuracy_is_covered_as_often_as_the_percentiles_of_a_binomial_cover_it():
    """Of k right answers out of n, draws have binomial(n, k/n) right: their percentiles are known without drawing, and
    how often they hold p is a sum over k. With 2,000 draws, the share below a percentile is .025 up to 4 sqrt(.025
    .975 / 2000) = .014, so coverage lies between that of the percentiles .011/.989 and .039/.961; and what 300 samples
    find is a binomial of it, of which a millionth is left out on each side.
    """
    n, p, trials = 100, 0.8, 300
    k = np.arange(n + 1)
    off = 4 * np.sqrt(0.025 * 0.975 / RESAMPLES)

    def coverage(tail: float) -> float:
        low, high = binom.ppf(tail, n, k / n), binom.ppf(1 - tail, n, k / n)
        return float(binom.pmf(k, n, p)[(low <= p * n) & (p * n <= high)].sum())

    least, most = coverage(0.025 + off), coverage(0.025 - off)
    assert 0.88 < least <= most < 0.99
    rng = np.random.default_rng(1)
    held = 0
    for trial in range(trials):
        found = interval(ratio, (rng.random(n) < p).astype(float), np.ones(n), seed=trial)
        held += found.low <= p <= found.high
    assert binom.ppf(1e-6, trials, least) <= held <= binom.ppf(1 - 1e-6, trials, most)


def test_a_known_correlation_is_covered():
    """Spearman of a normal pair of correlation r is 6/pi asin(r/2). Percentile intervals of 60 pairs cover less than
    95 %; 90 % is what is claimed, and a millionth of its binomial of 200 is the bound: 157. Twice too narrow an
    interval covers 67 % (1.96 / 2 deviations) and fails but for 3 in 10,000.
    """
    r, trials, rng = 0.8, 200, np.random.default_rng(2)
    true, held = 6 / np.pi * np.arcsin(r / 2), 0
    for trial in range(trials):
        x, e = rng.normal(size=(2, 60))
        found = interval(spearman, x, r * x + np.sqrt(1 - r * r) * e, seed=trial)
        held += found.low <= true <= found.high
    assert held >= binom.ppf(1e-6, trials, 0.90) == 157


def test_the_paired_interval_is_narrower_and_holds_the_difference():
    rng = np.random.default_rng(3)
    hard = rng.gamma(4.0, 100.0, 200)  # nats of windows: some are hard for both models
    tokens = np.full(200, 250.0)
    original, compressed = hard + rng.normal(0, 1, 200), hard + 5 + rng.normal(0, 1, 200)
    paired = interval(difference(ratio), original, compressed, tokens)
    alone = [interval(ratio, x, tokens) for x in (original, compressed)]
    assert paired.low < -5 / 250 < paired.high
    assert paired.value == pytest.approx(alone[0].value - alone[1].value, abs=1e-12)  # sums of 200 numbers of ~400
    unpaired = np.hypot(*(a.high - a.low for a in alone))
    # Deviations: sqrt(2) of what is each model's own, sqrt(2) 200 of the windows themselves.
    assert (paired.high - paired.low) < unpaired / 50


def test_no_difference_is_exactly_none():
    x = np.linspace(0, 1, 20)
    assert interval(difference(spearman), x, x, x**2) == Estimate(0.0, 0.0, 0.0)


def test_the_same_numbers_come_back_and_no_global_generator_is_used():
    x, y = np.random.default_rng(4).gamma(2.0, 1.0, (2, 50))
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    assert interval(perplexity, x, y) == interval(perplexity, x, y)
    assert (np.random.get_state()[1] == before).all()
    nats = interval(ratio, x, y)
    assert interval(perplexity, x, y).low == pytest.approx(np.exp(nats.low), rel=1e-3)  # between two draws at most


def test_few_examples_are_refused():
    with pytest.raises(EvaluationError, match="9 examples are too few for an interval; 10 or more are wanted"):
        interval(ratio, np.ones(9), np.ones(9))
