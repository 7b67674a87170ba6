"""Block-wise low rank: each block against numpy's SVD, the refit against least squares, what is refused."""

import itertools

import numpy as np
import pytest
import torch

from fxcompress.core.errors import SpecError
from fxcompress.core.metric import local_error
from fxcompress.core.rewrite import Store
from fxcompress.passes.block_low_rank import BlockLowRank
from fxcompress.passes.low_rank import DAMPING, LowRank
from fxcompress.passes.quantize import Quantize
from fxcompress.passes.recipe import Recipe, parse
from tests.sites import moment_of, site_of, weight_of
from tests.test_low_rank import truncated

SHAPES = [(24, 40), (40, 24), (32, 32)]
CASES = [(blocks, rank) for blocks in (1, 2, 4, 8) for rank in (1, 2, 3)]


def block_truncated(weight, blocks, rank):
    """Every contiguous block cut to `rank` by scipy, float64."""
    rows = np.split(np.asarray(weight, np.float64), blocks, 0)
    return np.block([[truncated(part, rank)[0] for part in np.split(row, blocks, 1)] for row in rows])


def damped_moment(moment):
    return moment.numpy() + DAMPING * float(moment.diagonal().mean()) * np.eye(len(moment))


@pytest.mark.parametrize(("blocks", "rank"), CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_metric_it_is_the_truncated_svd_of_every_block(shape, blocks, rank):
    weight = weight_of(shape)
    site, structure = site_of(weight), BlockLowRank(blocks, rank)
    want = block_truncated(weight, blocks, rank)
    # The factors are rounded to float32, sums of `rank` products; eigenvectors turn by far less than that.
    tolerance = 8 * rank * 2**-24 * float(weight.abs().max())
    np.testing.assert_allclose(structure.unstored(site).numpy(), want, rtol=0, atol=tolerance)
    lost = np.square(weight.numpy() - want).sum() / float(weight.double().square().sum())
    assert structure.error_bound(site) == pytest.approx(lost, abs=1e-6)
    assert local_error(site, structure.unstored(site)) == pytest.approx(lost, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_block_is_low_rank(shape):
    weight, moment = weight_of(shape), moment_of(shape[1])
    for statistics in ({}, {"second_moment": moment}):
        site = site_of(weight, **statistics)
        for rank in (1, 5, 12):
            mine, other = (local_error(site, s.unstored(site)) for s in (BlockLowRank(1, rank), LowRank(rank)))
            # Wide weights are damped here and not there; at the optimum the error is flat, so it shows to second order.
            assert mine == pytest.approx(other, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(("blocks", "rank"), [(2, 3), (4, 2), (4, 5), (8, 1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_outputs_factor_is_the_least_squares_answer_to_the_stored_one(shape, blocks, rank):
    weight, moment = weight_of(shape), moment_of(shape[1])
    site, structure, made = site_of(weight, second_moment=moment), BlockLowRank(blocks, rank), Unrounded("u")
    structure.factor(site, made)
    v, root = made.read["v"].double().numpy(), np.linalg.cholesky(damped_moment(moment))
    answers = []
    for i, w in enumerate(np.split(weight.double().numpy(), blocks)):
        mine = np.split(v[i * rank : (i + 1) * rank], blocks, 1)
        features = np.zeros((blocks * rank, shape[1]))
        for j, part in enumerate(mine):
            features[j * rank : (j + 1) * rank, j * part.shape[1] : (j + 1) * part.shape[1]] = part
        answers.append(np.linalg.lstsq((features @ root).T, (w @ root).T, rcond=None)[0].T @ features)
    got = structure.dense(made.read, site).numpy()
    scale = np.abs(weight.double().numpy() @ root).max()
    # u is rounded to float32 and its normal equations are ridged by 1e-9 of a unit diagonal.
    assert np.abs((got - np.concatenate(answers)) @ root).max() <= 1e-5 * scale


class Unrounded(Store):
    """Four bits for everything but the one named matrix, which stays as it is."""

    def __init__(self, exempt):
        super().__init__(Quantize(4, 0))
        self.exempt = exempt

    def __call__(self, name, matrix, metric=None):
        if name != self.exempt:
            return super().__call__(name, matrix, metric)
        self.read[name] = matrix
        return matrix


@pytest.mark.parametrize("shape", SHAPES)
def test_whitening_beats_the_plain_projection(shape):
    weight, moment = weight_of(shape), moment_of(shape[1])
    site = site_of(weight, second_moment=moment)
    for blocks, rank in itertools.product((2, 4, 8), (1, 2)):
        plain = torch.from_numpy(block_truncated(weight, blocks, rank))
        assert local_error(site, BlockLowRank(blocks, rank).unstored(site)) < local_error(site, plain)


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_make_up_for_each_other_through_correlated_inputs(shape):
    """Each block by itself in its own metric is what the refit starts from; it must only gain."""
    weight, moment = weight_of(shape), moment_of(shape[1])
    site = site_of(weight, second_moment=moment)
    for blocks, rank in ((2, 3), (4, 2)):
        alone, side = [], shape[1] // blocks
        for row in np.split(weight.double().numpy(), blocks):
            parts = []
            for j, part in enumerate(np.split(row, blocks, 1)):
                own = damped_moment(moment)[j * side : (j + 1) * side, j * side : (j + 1) * side]
                root = np.linalg.cholesky(own)
                parts.append(truncated(part @ root, rank)[0] @ np.linalg.inv(root))
            alone.append(np.concatenate(parts, 1))
        uncoupled = local_error(site, torch.from_numpy(np.concatenate(alone)))
        assert local_error(site, BlockLowRank(blocks, rank).unstored(site)) < 0.95 * uncoupled


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_block_low_rank_weight_projects_to_itself(shape, calibrated):
    generator = torch.Generator().manual_seed(0)
    v, u = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((8, shape[1]), (shape[0], 8)))
    site = site_of(torch.zeros(shape), second_moment=moment_of(shape[1]) if calibrated else None)
    structure = BlockLowRank(4, 2)
    exact = structure.dense({"v": v, "u": u}, site)
    site = site_of(exact.float(), second_moment=moment_of(shape[1]) if calibrated else None)
    made = Recipe(structure).make(site)
    # Factors in float32, sums of 2; the Gram matrix of the refit is ridged by 1e-9, its condition number below 1e4.
    assert float((made.weight - exact).norm() / exact.norm()) < 2e-5
    assert {k: tuple(t.shape) for k, t in made.tensors.items()} == {"v": (8, shape[1]), "u": (shape[0], 8)}


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_falls_with_the_rank_and_ends_at_nothing(shape, calibrated):
    site = site_of(weight_of(shape), second_moment=moment_of(shape[1]) if calibrated else None)
    for blocks in (2, 4, 8):
        full = min(shape) // blocks
        errors = [local_error(site, BlockLowRank(blocks, r).unstored(site)) for r in range(1, full + 1)]
        assert all(a > b for a, b in itertools.pairwise(errors))
        assert errors[-1] < 1e-9  # squared; float32 factors


@pytest.mark.parametrize("shape", SHAPES)
def test_the_refit_makes_up_for_part_of_what_storing_lost(shape):
    weight, moment = weight_of(shape), moment_of(shape[1])
    site = site_of(weight, second_moment=moment)
    structure, coarse = BlockLowRank(4, 3), Unrounded("u")
    structure.factor(site, coarse)
    exact = Store()
    structure.factor(site, exact)
    refit = local_error(site, structure.dense(coarse.read, site))
    stale = local_error(site, structure.dense({"v": coarse.read["v"], "u": exact.read["u"]}, site))
    assert refit < 0.9 * stale


class Blind(Store):
    """Three bits a weight; the named matrix is not told its metric."""

    def __init__(self, blind):
        super().__init__(Quantize(3, 0))
        self.blind = blind

    def __call__(self, name, matrix, metric=None):
        return super().__call__(name, matrix, None if name == self.blind else metric)


def test_the_outputs_factor_is_rounded_in_a_metric_that_helps():
    structure, aware, blind = BlockLowRank(4, 8), 0.0, 0.0
    for seed in range(4):  # one rounding can be lucky
        site = site_of(weight_of((64, 96), seed), second_moment=moment_of(96, seed))
        for store in (informed := Store(Quantize(3, 0))), (uninformed := Blind("u")):
            structure.factor(site, store)
        aware += local_error(site, structure.dense(informed.read, site))
        blind += local_error(site, structure.dense(uninformed.read, site))
    assert aware < 0.95 * blind


@pytest.mark.parametrize("bits", [4, 8])
def test_any_storage_takes_the_factors_and_its_bytes_are_those_claimed(bits):
    site = site_of(weight_of((64, 96)), second_moment=moment_of(96))
    recipe = Recipe(BlockLowRank(4, 8), Quantize(bits, 32))
    made = recipe.make(site)
    assert recipe.stored_bytes(site) == sum(t.numel() * t.element_size() for t in made.tensors.values())
    plain = Recipe(BlockLowRank(4, 8))
    assert plain.stored_bytes(site) == 4 * 4 * 8 * (64 + 96)
    # Nearest rounding of normal entries over 6 standard deviations is off by 6 / 2^bits / sqrt(12) of one, twice.
    lost, without = (local_error(site, r.make(site).weight) ** 0.5 for r in (recipe, plain))
    assert lost <= without + 2 * 6 / 2**bits / 12**0.5


@pytest.mark.parametrize("calibrated", [False, True])
def test_awkward_weights_and_inputs_give_finite_factors(calibrated):
    base = weight_of((24, 16))
    dead = base.clone()
    dead[:, 4:8] = 0
    dead[6:12] = 0
    steep = base * torch.logspace(0, -9, 24).unsqueeze(1)
    for weight in (torch.zeros(24, 16), dead, steep, base.t().contiguous().t(), base.bfloat16(), (base * 3e4).half()):
        site = site_of(weight, second_moment=moment_of(16) if calibrated else None)
        made = Recipe(BlockLowRank(4, 3)).make(site)
        assert {t.dtype for t in made.tensors.values()} == {weight.dtype}
        assert bool(torch.isfinite(made.weight).all())
        assert local_error(site, made.weight) < 0.1  # three of each block's four directions are kept, the largest
    assert float(Recipe(BlockLowRank(4, 3)).make(site_of(torch.zeros(24, 16))).weight.abs().max()) == 0
    silent = site_of(base, second_moment=torch.zeros(16, 16, dtype=torch.float64))
    assert bool(torch.isfinite(Recipe(BlockLowRank(4, 3)).make(silent).weight).all())


def test_small_block_rows_are_as_exact_as_large_ones():
    """Each block row is refitted by itself, so one of a billionth of the size keeps its relative error."""
    weight = weight_of((24, 16))
    tiny = torch.cat([weight[:12] * 1e-9, weight[12:]])
    errors = []
    for w in (weight, tiny):
        made = Recipe(BlockLowRank(2, 3)).make(site_of(w, second_moment=moment_of(16)))
        errors.append(local_error(site_of(w[:12], second_moment=moment_of(16)), made.weight[:12]))
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_the_same_site_gives_the_same_bits():
    weight, moment = weight_of((24, 40)), moment_of(40)
    twice = [Recipe(BlockLowRank(4, 2)).make(site_of(weight, second_moment=moment)).tensors for _ in range(2)]
    assert all(torch.equal(twice[0][k], twice[1][k]) for k in twice[0])


@pytest.mark.parametrize("blocks", [0, -2, 2.0, "4"])
def test_blocks_that_are_no_whole_number_are_refused(blocks):
    with pytest.raises(SpecError, match=f"block_low_rank blocks={blocks!r} must be a whole number of at least 1"):
        BlockLowRank(blocks, 2)


@pytest.mark.parametrize("rank", [0, -3, 2.5, "4"])
def test_a_rank_that_is_neither_a_count_nor_a_share_is_refused(rank):
    with pytest.raises(SpecError, match=f"block_low_rank rank={rank!r} must be a whole number of at least 1, or"):
        BlockLowRank(2, rank)


def test_blocks_that_do_not_divide_are_refused_with_those_that_do():
    message = (
        r"block_low_rank\{blocks=5, rank=2\} at weight: the weight is 24 x 40, so blocks must be 1 or 2 or 4 or 8\."
    )
    with pytest.raises(SpecError, match=message):
        Recipe(BlockLowRank(5, 2)).at(site_of(weight_of((24, 40))))


def test_a_rank_above_that_of_a_block_is_refused_with_the_range():
    site = site_of(weight_of((24, 40)))
    assert Recipe(BlockLowRank(4, 6)).make(site).weight.shape == (24, 40)
    message = (
        r"block_low_rank\{blocks=4, rank=7\} at weight: the weight is 24 x 40, its blocks 6 x 10, "
        r"so rank must be 1 to 6\."
    )
    with pytest.raises(SpecError, match=message):
        Recipe(BlockLowRank(4, 7)).make(site)


def test_a_share_becomes_a_rank_below_break_even():
    site = site_of(weight_of((24, 40)))  # blocks of 12 x 20 break even at 240 / 32 = 7.5
    assert [BlockLowRank(2, share).at(site).rank for share in (0.01, 0.5, 0.99)] == [1, 3, 6]
    assert BlockLowRank(2, 5).at(site) == BlockLowRank(2, 5)


def test_what_cannot_be_cut_says_why():
    refuses = BlockLowRank.refuses
    assert refuses(site_of(torch.ones(7, 12))) == "no number of blocks divides both sides of a 7 x 12 weight"
    assert refuses(site_of(torch.ones(4, 4))) == "a 4 x 4 weight is too small to be cut into blocks"
    assert refuses(site_of(torch.ones(50, 20), "embedding")) == "it has no op for embedding tables"
    assert refuses(site_of(torch.ones(24, 40))) is None


@pytest.mark.parametrize("shape", [(24, 40), (384, 1536), (9, 15), (6, 6), (98, 49)])
def test_the_space_rises_and_stays_below_three_quarters_of_dense(shape):
    site = site_of(torch.ones(shape))
    found = list(BlockLowRank.space(site))
    sizes = [sum(r * c for r, c in s.matrices(site).values()) for s in found]
    assert sizes == sorted(sizes)
    assert 1 <= len(found) == len(set(found)) <= 6
    assert all(size <= 0.75 * site.weight.numel() for size in sizes)
    for structure in found:
        structure.check(site)
        assert parse(str(structure), [BlockLowRank]).structure == structure


def test_work_is_counted():
    site = site_of(torch.ones(24, 40))
    cost = Recipe(BlockLowRank(4, 3)).cost(site).at(tokens=10)
    assert cost.flops == 2 * 10 * 4 * 3 * (24 + 40)
    assert cost.weight_bytes == 4 * 4 * 3 * (24 + 40)
    assert cost.bytes == 4 * 10 * (40 + 3 * 24 + 4 * 4 * 4 * 3) + cost.weight_bytes


def test_a_random_start_has_the_spread_of_the_weight():
    site = site_of(torch.randn(64, 96, generator=torch.Generator().manual_seed(1)) * 0.03)
    made = Recipe(BlockLowRank(4, 6)).draw(site, torch.Generator().manual_seed(0))
    assert float(made.weight.std()) == pytest.approx(float(site.weight.std()), rel=1e-4)


def test_the_dense_weight_is_differentiable_in_its_factors():
    site = site_of(torch.ones(8, 12))
    factors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 12), (8, 4))]
    assert torch.autograd.gradcheck(lambda v, u: BlockLowRank(2, 2).dense({"v": v, "u": u}, site), factors)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (64, 64)])
def test_a_smaller_rank_loses_no_less_than_the_line_to_full_rank_tells(shape, calibrated):
    """Tails of descending squares are convex; so is, here, what the refit in a metric leaves of them."""
    site = site_of(weight_of(shape), **({"second_moment": moment_of(shape[1])} if calibrated else {}))
    for blocks in (1, 2, 4):
        lost = {r: BlockLowRank(blocks, r).unstored_error(site) for r in range(1, min(shape) // blocks + 1)}
        for small, large in itertools.combinations(lost, 2):
            bound = BlockLowRank(blocks, small).bound_from(site, BlockLowRank(blocks, large), lost[large])
            assert bound >= lost[large]
            # Errors are float32 sums of products with factors in float32: a few 2^-24 of what they are.
            assert bound <= lost[small] * (1 + 2**-20) + 1e-9
