"""Which weights are dropped and what becomes of the rest, against numpy row by row, and against brute force."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from fxcompress.core.metric import Metric, local_error
from fxcompress.core.site import Statistics
from fxcompress.passes import masks, rounding
from fxcompress.passes.masks import CRITERIA, Pattern, Projection, curvature, prune
from tests.sites import moment_of, site_of, weight_of

COLUMNS, ROWS = 48, 32
CONDITION = 1e2  # damped(moment_of(COLUMNS)) has 93
PATTERNS = {
    "rows": Pattern(20),
    "2:4": Pattern(2, group=4),
    "tiles": Pattern(5, tile=4),
}
every_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)


def weights(seed=0, shape=(ROWS, COLUMNS)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def damped(moment):
    """The metric the weights are refitted in, float64 numpy."""
    g = moment.numpy()
    return g + rounding.DAMPING * np.trace(g) / len(g) * np.eye(len(g))


def energy(d, g):
    return float(((d @ g) * d).sum())


@every_pattern
@pytest.mark.parametrize("by", CRITERIA)
@pytest.mark.parametrize("calibrated", [False, True])
def test_every_group_keeps_its_count(pattern, by, calibrated):
    pruned = prune(weights(), Metric(moment_of(COLUMNS) if calibrated else None), pattern, by)
    tiles = pruned.keep.reshape(ROWS // pattern.tile, pattern.tile, COLUMNS // pattern.tile, pattern.tile)
    assert torch.equal(tiles.all(3).all(1), tiles.any(3).any(1))  # a tile goes or stays as a whole
    groups = tiles[:, 0, :, 0].unflatten(1, (-1, pattern.group or COLUMNS // pattern.tile))
    assert bool((groups.sum(2) == pattern.kept).all())
    assert pruned.values.shape == (ROWS, int(pruned.keep.sum()) // ROWS)
    assert torch.equal(pruned.dense()[pruned.keep], pruned.values.flatten())
    assert not bool(pruned.dense()[~pruned.keep].any())


@pytest.mark.parametrize("by", ["magnitude", "wanda"])
def test_magnitude_and_wanda_keep_the_largest_scores_and_change_no_value(by):
    w, moment = weights(), moment_of(COLUMNS)
    score = w.abs().numpy() * (np.sqrt(np.diag(moment.numpy())) if by == "wanda" else 1)
    kept = np.zeros(w.shape, bool)
    for row, s in zip(kept, score):
        row[np.argsort(-s)[:20]] = True
    pruned = prune(w, Metric(moment), PATTERNS["rows"], by)
    assert np.array_equal(pruned.keep.numpy(), kept)
    # Scaled down by the largest weight and up again: two roundings.
    torch.testing.assert_close(pruned.dense(), w * torch.from_numpy(kept), rtol=2 * 2**-23, atol=0)
    by_four = np.sort(score.reshape(ROWS, -1, 4), 2)
    pruned = prune(w, Metric(moment), PATTERNS["2:4"], by)
    kept_scores = np.where(pruned.keep.numpy(), score, 0).reshape(ROWS, -1, 4).sum(2)
    np.testing.assert_allclose(kept_scores, by_four[:, :, 2:].sum(2), rtol=1e-6)


@every_pattern
def test_without_a_metric_all_three_drop_the_smallest(pattern):
    found = [prune(weights(), Metric(), pattern, by) for by in CRITERIA]
    assert all(torch.equal(found[0].keep, f.keep) and torch.equal(found[0].values, f.values) for f in found[1:])


def test_the_cost_of_dropping_one_weight_is_what_it_costs():
    """W_j^2 / [G^-1]_jj, against a least-squares fit without column j."""
    moment, w = moment_of(COLUMNS), weights()[0].double().numpy()
    g = damped(moment)
    unit = np.trace(g) / len(g)  # a curvature's G has mean diagonal 1
    inverse = curvature(Metric(moment)).inverse.numpy()
    for j in (0, 17, COLUMNS - 1):
        rest = [i for i in range(COLUMNS) if i != j]
        fitted = np.zeros(COLUMNS)
        fitted[rest] = np.linalg.solve(g[np.ix_(rest, rest)], g[rest] @ w)
        # The inverse is kept in float32.
        assert w[j] ** 2 / inverse[j] * unit == pytest.approx(energy((fitted - w)[None], g), rel=1e-6)


def test_the_sweep_is_optimal_brain_surgery_column_by_column():
    """Against the definition: each dropped column moves the ones to come by the inverse of G restricted to them."""
    w, moment = weights(), moment_of(COLUMNS)
    g, want = damped(moment), w.double().numpy().copy()
    keep = np.zeros(w.shape, bool)
    for j in range(COLUMNS):
        inverse = np.linalg.inv(g[j:, j:])
        if j % 4 == 0:
            conditional = [np.linalg.inv(g[k:, k:])[0, 0] for k in range(j, j + 4)]
            cost = want[:, j : j + 4] ** 2 / conditional
            keep[np.arange(ROWS)[:, None], j + np.argsort(-cost, 1)[:, :2]] = True
        lost = np.where(keep[:, j], 0, want[:, j])
        want[:, j:] -= np.outer(lost, inverse[0] / inverse[0, 0])
    curve, x = curvature(Metric(moment)), w.T.contiguous()
    got, kept = masks._sweep(x, PATTERNS["2:4"].pick(x.abs()), PATTERNS["2:4"], curve.upper, torch.ones(ROWS))
    assert np.array_equal(kept.T.numpy(), keep)
    # float32 sums of 48 terms, the factor's entries up to the condition number of G.
    np.testing.assert_allclose(got.T.numpy(), want, rtol=0, atol=COLUMNS * CONDITION * 2**-24)


@every_pattern
def test_kept_weights_are_their_least_squares_fit(pattern):
    w, moment = weights(), moment_of(COLUMNS)
    g = damped(moment)
    pruned = prune(w, Metric(moment), pattern, "sparsegpt")
    best, full = np.zeros(w.shape), w.double().numpy()
    for row, keep, original in zip(best, pruned.keep.numpy(), full):
        row[keep] = np.linalg.solve(g[np.ix_(keep, keep)], g[keep] @ original)
    least = energy(best - full, g)
    # Ten steps of conjugate gradients; the damped metric's condition number is below 10^2, so what the sweep left to
    # gain (at most as much again) shrinks by ((10 - 1) / (10 + 1))^20 = 2 %.
    assert least * (1 - 1e-5) <= energy(pruned.dense().double().numpy() - full, g) <= 1.02 * least


@pytest.mark.parametrize("seed", range(12))
def test_two_of_four_come_close_to_the_best_of_all_masks(seed):
    """Eight columns have 36 masks: the best is found by trying them, each with its least-squares fit."""
    w, moment = weights(seed, (16, 8)), moment_of(8, seed)
    g, full = damped(moment), w.double().numpy()
    pairs = list(itertools.combinations(range(4), 2))
    least = np.full(16, np.inf)
    for first, second in itertools.product(pairs, pairs):
        keep = [*first, *(4 + j for j in second)]
        fitted = np.zeros(full.shape)
        fitted[:, keep] = np.linalg.solve(g[np.ix_(keep, keep)], g[keep] @ full.T).T
        least = np.minimum(least, (((fitted - full) @ g) * (fitted - full)).sum(1))
    made = {by: prune(w, Metric(moment), PATTERNS["2:4"], by).dense().double().numpy() for by in CRITERIA}
    lost = {by: energy(dense - full, g) / least.sum() for by, dense in made.items()}
    # Greedy choices of correlated columns are not optimal; on these inputs they end at 1.08 to 1.81 times the optimum,
    # Wanda's at 2.4 to 5.9 times.
    assert 1 - 1e-5 <= lost["sparsegpt"] < 2 < min(lost["wanda"], lost["magnitude"])


@every_pattern
@pytest.mark.parametrize("by", CRITERIA)
def test_a_weight_that_has_the_pattern_already_loses_nothing(pattern, by):
    moment = moment_of(COLUMNS)
    sparse = prune(weights(), Metric(), pattern, "magnitude").dense()
    again = prune(sparse, Metric(moment), pattern, by).dense()
    torch.testing.assert_close(again, sparse, rtol=2 * 2**-23, atol=0)  # scaled down and up: two roundings


def test_zeros_gathered_at_one_end_cost_nothing():
    """Stretches of 128 columns do not share out the sparsity evenly: whole rows choose how much each keeps."""
    w = weights(0, (8, 512))
    w[:, :256] = 0
    again = prune(w, Metric(moment_of(512)), Pattern(256), "sparsegpt").dense()
    torch.testing.assert_close(again, w, rtol=2 * 2**-23, atol=0)


@every_pattern
def test_awkward_numbers_stay_finite(pattern):
    near_the_limit = (weights() * 6e4).clamp(-6e4, 6e4).half()
    for w in (weights() * 1e30, weights() * 1e-30, torch.zeros(ROWS, COLUMNS), near_the_limit):
        for moment in (moment_of(COLUMNS), torch.zeros(COLUMNS, COLUMNS, dtype=torch.float64)):
            for by in CRITERIA:
                values = prune(w, Metric(moment), pattern, by).values.to(w.dtype)
                assert bool(torch.isfinite(values).all())


def test_rows_of_tiles_count_by_their_probability():
    """One row that is read, among three that are not: its tiles stay."""
    w = weights(0, (4, 16)).abs() + 1
    w[0, :8], w[1:, 8:] = 3, 2.9
    w[0, 8:], w[1:, :8] = 0.1, 0.1
    p = torch.tensor([0.97, 0.01, 0.01, 0.01], dtype=torch.float64)
    kept = prune(w, Metric(rows=p), Pattern(2, tile=4), "magnitude").keep
    assert bool(kept[:, :8].all())
    unweighted = prune(w, Metric(), Pattern(2, tile=4), "magnitude").keep
    assert bool(unweighted[:, 8:].all())


def test_a_chunk_of_rows_changes_nothing(monkeypatch):
    w, metric = weights(), Metric(moment_of(COLUMNS))
    for pattern in PATTERNS.values():
        whole = prune(w, metric, pattern, "sparsegpt")
        monkeypatch.setattr(masks, "ROW_CHUNK", 12)
        parts = prune(w, metric, pattern, "sparsegpt")
        monkeypatch.undo()
        assert torch.equal(whole.keep, parts.keep)
        # Sums of 48 terms in another order, once a step of the refit, times the condition number of the damped metric.
        allowed = masks.REFIT_STEPS * COLUMNS * CONDITION * 2**-24
        torch.testing.assert_close(whole.values, parts.values, rtol=0, atol=allowed)


@pytest.mark.parametrize("by", CRITERIA)
@pytest.mark.parametrize("pattern", [Pattern(20), Pattern(2, group=4), Pattern(6, tile=4)])
def test_the_bound_is_below_the_error_and_not_far(pattern, by):
    site = site_of(weight_of((640, 48)), second_moment=moment_of(48))
    projection = Projection(pattern, by)
    bound, error = masks.error_bound(site, projection), local_error(site, projection(site).dense())
    assert error / 2 < bound < error


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_the_bound_is_the_error_where_all_rows_are_looked_at(kind):
    p = torch.arange(60, 0, -1, dtype=torch.float64) ** 1.5
    known = (
        {"second_moment": moment_of(48)}
        if kind == "linear"
        else {"row_weight": p / p.sum(), "column_metric": moment_of(48)}
    )
    site = site_of(weight_of((60, 48)), kind, **known)
    for pattern in PATTERNS.values():
        projection = Projection(pattern, "sparsegpt")
        # local_error multiplies in float32.
        want = local_error(site, projection(site).dense())
        assert masks.error_bound(site, projection) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_the_bound_sees_the_few_rows_that_are_most_of_the_output(pattern):
    weight = weight_of((640, 48))
    weight[200:204] *= 100
    weight[200:204, 4:] *= 0.01  # easy rows: nearly all of them is in four columns
    site = site_of(weight, second_moment=moment_of(48))
    projection = Projection(pattern, "sparsegpt")
    bound, error = masks.error_bound(site, projection), local_error(site, projection(site).dense())
    assert bound <= error * (1 + 1e-5)
    ordinary = site_of(weight[:200], second_moment=moment_of(48))
    assert error < local_error(ordinary, projection(ordinary).dense()) / 2  # what rows at even distances would say


@pytest.mark.parametrize("tile", [1, 4])
def test_the_bound_of_a_table_follows_its_probabilities(tile):
    p = 1 / torch.arange(1, 2001, dtype=torch.float64)
    weight = weight_of((2000, 32)) * torch.linspace(0.2, 3, 2000).unsqueeze(1)
    site = site_of(weight, "embedding", row_weight=p / p.sum(), column_metric=moment_of(32))
    projection = Projection(Pattern(4, tile=tile), "wanda")
    bound, error = masks.error_bound(site, projection), local_error(site, projection(site).dense())
    assert 0 < bound < error
    even = replace(site, statistics=Statistics(column_metric=moment_of(32)), _analyses={})
    assert masks.error_bound(even, projection) != pytest.approx(bound, rel=1e-3)


def test_a_zero_weight_has_bound_zero():
    site = site_of(torch.zeros(16, 8), second_moment=moment_of(8))
    assert masks.error_bound(site, Projection(Pattern(4), "sparsegpt")) == 0.0


def test_sparsities_offered_include_the_weights_own():
    w = torch.ones(6, 40)
    w[:, :15] = 0
    w[0, 15:20] = 0
    assert masks.sparsities(w != 0) == [0.75, 0.5, 15 / 40, 0.25]
    assert masks.kept_of(40, 15 / 40) == 25
    assert masks.sparsities(torch.ones(6, 40, dtype=torch.bool)) == [0.75, 0.5, 0.25]
    assert masks.sparsities(torch.zeros(6, 40, dtype=torch.bool)) == [0.75, 0.5, 0.25]
    assert masks.sparsities(torch.ones(6, 2, dtype=torch.bool)) == [0.5]
