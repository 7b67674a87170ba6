"""Low rank: Eckart-Young against scipy, with and without a metric, on awkward weights, and what is refused."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch

from benchmarks import whitening_minilm
from benchmarks.models import minilm
from fxcompress.core.errors import SpecError
from fxcompress.core.metric import local_error, rounding_metric
from fxcompress.passes.low_rank import DAMPING, LowRank, best_factors
from fxcompress.passes.recipe import Recipe
from tests.sites import moment_of, site_of, weight_of

SHAPES = [(24, 40), (40, 24), (32, 32)]


def truncated(matrix, rank):
    """scipy's own rank-`rank` truncation, float64."""
    u, s, vt = scipy.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank], s


@pytest.mark.parametrize("rank", [1, 2, 7, 23, 24])
@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_metric_it_is_the_truncated_svd(shape, rank):
    weight = weight_of(shape)
    want, s = truncated(weight, rank)
    site = site_of(weight)
    # Eigenvectors of W W^T (float64) turn by 2^-52 over the relative gap of the squares, 1/24^2 / 12 at least.
    tolerance = 1e-9
    np.testing.assert_allclose(LowRank(rank).unstored(site).numpy(), want, rtol=0, atol=tolerance)
    tail = float((s[rank:] ** 2).sum() / (s**2).sum())
    assert LowRank(rank).error_bound(site) == pytest.approx(tail, abs=1e-12)
    via_torch = torch.linalg.svd(weight.double(), full_matrices=False)
    ours = (via_torch.U[:, :rank] * via_torch.S[:rank] @ via_torch.Vh[:rank]).numpy()
    np.testing.assert_allclose(LowRank(rank).unstored(site).numpy(), ours, rtol=0, atol=tolerance)


@pytest.mark.parametrize("rank", [1, 5, 12, 20])
@pytest.mark.parametrize("shape", SHAPES)
def test_in_a_metric_it_is_the_truncated_svd_of_the_whitened_weight(shape, rank):
    weight, moment = weight_of(shape), moment_of(shape[1])
    site = site_of(weight, second_moment=moment)
    level = DAMPING * float(moment.diagonal().mean())
    root = np.linalg.cholesky(moment.numpy() + level * np.eye(shape[1]))  # a little damped
    want, s = truncated(weight.double().numpy() @ root, rank)
    want = want @ np.linalg.inv(root)
    got = LowRank(rank).unstored(site).numpy()
    # Singular values of W S fall by 10^3 or so; squares are found to 1e-16 of the largest, hence 1e-10 of the smallest,
    # and the vectors that go with them are turned by that over their gap.
    assert np.abs((got - want) @ root).max() <= 1e-7 * np.abs(weight.double().numpy() @ root).max()
    bound = float((s[rank:] ** 2).sum() / (s**2).sum())
    if shape[0] <= shape[1]:  # there the closed form is that of the undamped metric
        d, w, g = weight.double().numpy() - want, weight.double().numpy(), moment.numpy()
        bound = ((d @ g) * d).sum() / ((w @ g) * w).sum()
    assert LowRank(rank).error_bound(site) == pytest.approx(bound, abs=1e-10)


@pytest.mark.parametrize("rank", [1, 5, 12, 20])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_closed_form_is_the_error(shape, rank):
    weight, moment = weight_of(shape), moment_of(shape[1])
    site = site_of(weight, second_moment=moment)
    d = weight.double() - LowRank(rank).unstored(site)
    error = float((d @ moment @ d.T).trace() / (weight.double() @ moment @ weight.double().T).trace())
    # Exact for wide weights. Tall ones are factored in G + level I: their closed form also counts level |D|^2.
    level = 0.0 if shape[0] <= shape[1] else DAMPING * float(moment.diagonal().mean())
    signal = weight.double() @ (moment + level * torch.eye(shape[1])) @ weight.double().T
    exact = float((d @ (moment + level * torch.eye(shape[1])) @ d.T).trace() / signal.trace())
    assert LowRank(rank).error_bound(site) == pytest.approx(exact, abs=1e-6)
    assert LowRank(rank).error_bound(site) == pytest.approx(
        error, abs=1e-6 + level * float(d.square().sum()) / float(signal.trace())
    )
    assert local_error(site, LowRank(rank).unstored(site)) == pytest.approx(error, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_whitening_beats_the_plain_svd_at_every_rank(shape):
    weight, moment = weight_of(shape), moment_of(shape[1])
    site = site_of(weight, second_moment=moment)
    for rank in range(1, min(shape)):
        plain = torch.from_numpy(truncated(weight, rank)[0])
        assert local_error(site, LowRank(rank).unstored(site)) < local_error(site, plain)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_falls_with_the_rank_and_ends_at_nothing(shape):
    site = site_of(weight_of(shape), second_moment=moment_of(shape[1]))
    bounds = [LowRank(r).error_bound(site) for r in range(1, min(shape) + 1)]
    assert all(a > b for a, b in itertools.pairwise(bounds))
    assert bounds[-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_rank_deficient_weight_is_recovered(shape, calibrated):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape[0], 5, generator=generator) @ torch.randn(5, shape[1], generator=generator)
    site = site_of(weight, second_moment=moment_of(shape[1]) if calibrated else None)
    made = Recipe(LowRank(5)).make(site)
    # u and v are kept in float32: 2^-24 each, over sums of 5; the weight itself was rounded to float32.
    # The solve for u is damped by 1e-9 of a Gram matrix whose condition number is below 1e3.
    assert float((made.weight - weight).norm() / weight.norm()) < 1e-5
    assert LowRank(5).error_bound(site) < 1e-12
    assert {k: tuple(t.shape) for k, t in made.tensors.items()} == {"v": (5, shape[1]), "u": (shape[0], 5)}


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_stored_factors_lose_no_more_than_the_closed_form(shape, calibrated):
    weight, moment = weight_of(shape), moment_of(shape[1])
    site = site_of(weight, second_moment=moment if calibrated else None)
    # Tall weights are factored in G + level I, and their closed form counts level |D|^2 <= level |W|^2 too.
    signal = float((weight.double() @ moment @ weight.double().T).trace())
    damping = DAMPING * float(moment.diagonal().mean()) * float(weight.square().sum()) / signal if calibrated else 0.0
    for rank in (1, 6, 18):
        made = Recipe(LowRank(rank)).make(site)
        bound = LowRank(rank).error_bound(site)
        # u answers a metric damped by 1e-4 of its mean diagonal; to first order the optimum is flat, and 2 % is the
        # promise of passes/__init__.py.
        assert bound - damping - 1e-6 <= local_error(site, made.weight) <= 1.02 * bound + damping + 1e-6


def test_an_embedding_is_factored_with_its_row_probabilities():
    weight, metric = weight_of((50, 20)), moment_of(20)
    p = torch.arange(50, 0, -1, dtype=torch.float64) ** 1.5
    site = site_of(weight, "embedding", row_weight=p / p.sum(), column_metric=metric)
    assert rounding_metric(site).columns is metric
    level = DAMPING * float(metric.diagonal().mean())
    left = np.sqrt((p / p.sum()).numpy())[:, None]
    root = np.linalg.cholesky(metric.numpy() + level * np.eye(20))
    for rank in (1, 4, 11):
        want, s = truncated(left * weight.double().numpy() @ root, rank)
        want = want / left @ np.linalg.inv(root)
        got = LowRank(rank).unstored(site).numpy()
        assert np.abs(left * (got - want) @ root).max() <= 1e-7 * np.abs(left * weight.double().numpy() @ root).max()
        assert LowRank(rank).error_bound(site) == pytest.approx(float((s[rank:] ** 2).sum() / (s**2).sum()), abs=1e-10)
        unweighted = torch.from_numpy(truncated(weight, rank)[0])
        assert local_error(site, LowRank(rank).unstored(site)) < local_error(site, unweighted)


def test_rows_that_are_never_read_do_not_break_the_factors():
    weight = weight_of((50, 20))
    p = torch.zeros(50, dtype=torch.float64)
    p[:25] = 1 / 25
    made = Recipe(LowRank(8)).make(site_of(weight, "embedding", row_weight=p))
    assert bool(torch.isfinite(made.weight).all())


@pytest.mark.parametrize("rank", [0, -3, 2.5, "4"])
def test_a_rank_that_is_no_whole_number_of_at_least_1_is_refused(rank):
    with pytest.raises(SpecError, match=f"low_rank rank={rank!r} must be a whole number of at least 1"):
        LowRank(rank)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rank_above_full_is_refused_with_the_range(shape):
    site = site_of(weight_of(shape))
    most = min(shape)
    assert Recipe(LowRank(most)).make(site).weight.shape == shape
    message = (
        rf"low_rank\{{rank={most + 1}\}} at weight: the weight is {shape[0]} x {shape[1]}, so rank must be 1 to {most}"
    )
    with pytest.raises(SpecError, match=message):
        Recipe(LowRank(most + 1)).make(site)


@pytest.mark.parametrize("shape", [(1, 30), (30, 1)])
def test_a_vector_has_no_rank_to_lose(shape):
    reason = LowRank.refuses(site_of(torch.ones(shape)))
    assert reason == f"a {shape[0]} x {shape[1]} weight has no rank to lose"


def test_the_space_rises_to_three_quarters_of_full_rank():
    ranks = [r.rank for r in LowRank.space(site_of(weight_of((24, 40))))]
    assert ranks == sorted(set(ranks))
    assert (ranks[0], ranks[-1]) == (2, 18)
    assert [r.rank for r in LowRank.space(site_of(torch.randn(2, 2)))] == [1]


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_zero_weight_factors_into_zeros(calibrated):
    site = site_of(torch.zeros(12, 8), second_moment=moment_of(8) if calibrated else None)
    assert LowRank(3).error_bound(site) == 0.0
    assert float(Recipe(LowRank(3)).make(site).weight.abs().max()) == 0.0


def test_inputs_that_are_all_zero_still_give_finite_factors():
    site = site_of(weight_of((24, 16)), second_moment=torch.zeros(16, 16, dtype=torch.float64))
    assert bool(torch.isfinite(Recipe(LowRank(4)).make(site).weight).all())
    assert all(bool(torch.isfinite(t).all()) for t in best_factors(site))


def test_half_precision_factors_stay_in_range():
    weight = (weight_of((24, 40)) * 3e4).half()
    made = Recipe(LowRank(6)).make(site_of(weight))
    assert {t.dtype for t in made.tensors.values()} == {torch.float16}
    assert all(bool(torch.isfinite(t).all()) for t in made.tensors.values())
    # v is rounded to 2^-11; u makes up for that and is rounded itself, to 2^-11 of each entry of a sum of 6.
    bound = LowRank(6).error_bound(site_of(weight))
    assert local_error(site_of(weight), made.weight) ** 0.5 <= bound**0.5 + 3 * 2**-11


def test_the_same_site_gives_the_same_bits():
    weight, moment = weight_of((24, 40)), moment_of(40)
    twice = [Recipe(LowRank(6)).make(site_of(weight, second_moment=moment)).tensors for _ in range(2)]
    assert all(torch.equal(twice[0][k], twice[1][k]) for k in twice[0])


def test_on_minilm_whitening_beats_the_plain_svd_at_every_rank(data):
    """On the calibration inputs by theorem, on held-out ones by measurement; python benchmarks/whitening_minilm.py"""
    data(minilm.model)
    sites = [s for s in data(whitening_minilm.linear_sites, 128) if ".3." in s.name or s.name == "pooler.dense"]
    assert len(sites) == 7
    pairs = [pair for site in sites for both in whitening_minilm.errors(site, 32) for pair in both]
    assert len(pairs) == 2 * 7 * 12
    assert not [pair for pair in pairs if pair.whitened >= pair.plain]
