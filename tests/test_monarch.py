"""Monarch: the projection against einsum and numpy, P L P^T R as matrices, the published parameter counts."""

import itertools

import numpy as np
import pytest
import torch

from fxcompress.core.errors import SpecError
from fxcompress.core.metric import local_error
from fxcompress.passes.block_low_rank import BlockLowRank
from fxcompress.passes.monarch import Monarch
from fxcompress.passes.recipe import Recipe, parse
from tests.sites import moment_of, site_of, weight_of

SHAPES = [(24, 40), (40, 24), (32, 32), (36, 36)]


def projected(matrix, blocks, rank):
    """Einsum over '(l j) (k i) -> k j l i' and numpy's batched SVD: no code in common with the pass."""
    out, columns = matrix.shape
    grid = np.asarray(matrix, np.float64).reshape(out // blocks, blocks, blocks, columns // blocks)
    u, s, vt = np.linalg.svd(np.einsum("ljki->kjli", grid), full_matrices=False)
    left = u[..., :rank] * np.sqrt(s[..., None, :rank])
    right = np.sqrt(s[..., :rank, None]) * vt[..., :rank, :]
    return np.einsum("kjlr,kjri->ljki", left, right).reshape(out, columns)


def monarch_matrix(m, seed=0):
    """P L P^T R of m^2 x m^2: block-diagonal L, R of m blocks m x m, P the permutation that transposes (m, m)."""
    generator = np.random.default_rng(seed)
    left, right = np.zeros((2, m * m, m * m))
    for b in range(m):
        run = slice(b * m, (b + 1) * m)
        left[run, run], right[run, run] = generator.standard_normal((2, m, m))
    permutation = np.eye(m * m)[np.arange(m * m).reshape(m, m).T.ravel()]
    return permutation @ left @ permutation.T @ right


@pytest.mark.parametrize(("blocks", "rank"), [(2, 1), (2, 5), (4, 1), (4, 3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_metric_it_is_the_analytic_projection(shape, blocks, rank):
    weight = weight_of(shape)
    site, want = site_of(weight), projected(weight, blocks, rank)
    # Factors rounded to float32, sums of `rank` products.
    tolerance = 8 * rank * 2**-24 * float(weight.abs().max())
    np.testing.assert_allclose(Monarch(blocks, rank).unstored(site).numpy(), want, rtol=0, atol=tolerance)
    lost = np.square(weight.numpy() - want).sum() / float(weight.double().square().sum())
    assert Monarch(blocks, rank).error_bound(site) == pytest.approx(lost, abs=1e-6)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("m", [3, 4, 6])
def test_a_monarch_matrix_projects_to_itself(m, calibrated):
    exact = torch.from_numpy(monarch_matrix(m))
    site = site_of(exact.float(), second_moment=moment_of(m * m) if calibrated else None)
    made = Recipe(Monarch(m)).make(site)
    # Factors in float32, one product an entry; the refit is ridged by 1e-9 under a condition number below 1e4.
    assert float((made.weight - exact).norm() / exact.norm()) < 2e-5
    assert sum(t.numel() for t in made.tensors.values()) == 2 * m**3
    # The same matrix is no grid of contiguous rank-1 blocks: the stride is what finds it.
    assert BlockLowRank(m, 1).error_bound(site_of(exact.float())) > 0.1


def test_the_stored_matrices_are_the_blocks_of_r_and_l():
    m = 4
    exact = monarch_matrix(m)
    made = Recipe(Monarch(m)).make(site_of(torch.from_numpy(exact).float()))
    left, right = np.zeros((2, m * m, m * m))
    v, u = made.tensors["v"].numpy(), made.tensors["u"].numpy()
    for b, row, column in itertools.product(range(m), range(m), range(m)):
        right[b * m + row, b * m + column] = v[row, b * m + column]  # R_kj: rank row of output block j = row
        left[b * m + row, b * m + column] = u[row * m + b, column]  # L_jk: output number row * m + j
    permutation = np.eye(m * m)[np.arange(m * m).reshape(m, m).T.ravel()]
    assert np.abs(permutation @ left @ permutation.T @ right - exact).max() < 1e-5  # float32 factors of entries near 1


@pytest.mark.parametrize(
    ("shape", "share"), [((768, 768), 0.5), ((3072, 768), 0.3125), ((768, 3072), 0.3125)], ids=["square", "up", "down"]
)
def test_the_parameter_counts_of_monarch_linear(shape, share):
    out, columns = shape
    structure = Monarch(4, min(shape) // 4**2)
    site = site_of(torch.zeros(1, 1).expand(shape))
    inner = min(shape)  # (4, inner/4, in/4) and (4, out/4, inner/4)
    want = 4 * (inner // 4) * (columns // 4) + 4 * (out // 4) * (inner // 4)
    assert sum(r * c for r, c in structure.matrices(site).values()) == want == share * out * columns


@pytest.mark.parametrize("shape", SHAPES)
def test_whitening_beats_the_plain_projection(shape):
    weight, moment = weight_of(shape), moment_of(shape[1])
    site = site_of(weight, second_moment=moment)
    for blocks, rank in itertools.product((2, 4), (1, 2)):
        plain = torch.from_numpy(projected(weight, blocks, rank))
        assert local_error(site, Monarch(blocks, rank).unstored(site)) < local_error(site, plain)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_block_low_rank_with_its_outputs_strided(shape):
    weight, moment = weight_of(shape), moment_of(shape[1])
    order = torch.arange(shape[0]).reshape(-1, 4).T.reshape(-1)
    mine = Monarch(4, 2).unstored(site_of(weight, second_moment=moment))
    other = BlockLowRank(4, 2).unstored(site_of(weight[order], second_moment=moment))
    assert torch.equal(mine[order], other)


def test_the_spec_leaves_out_the_default_rank_and_parses_back():
    assert str(Monarch(4)) == "monarch{blocks=4}"
    for structure in (Monarch(4), Monarch(8, 3), Monarch(2, 0.5)):
        assert parse(str(structure), [Monarch]).structure == structure


def test_illegal_parameters_name_the_site_and_what_is_allowed():
    site = site_of(torch.ones(24, 40))
    with pytest.raises(SpecError, match=r"monarch\{blocks=3\} at weight: .* so blocks must be 1 or 2 or 4 or 8\."):
        Monarch(3).check(site)
    with pytest.raises(SpecError, match=r"monarch\{blocks=4, rank=7\} at weight: .* 6 x 10, so rank must be 1 to 6\."):
        Monarch(4, 7).check(site)
    with pytest.raises(SpecError, match=r"monarch blocks=0 must be a whole number of at least 1\."):
        Monarch(0)
    with pytest.raises(SpecError, match=r"monarch rank=0 must be a whole number of at least 1, or a share"):
        Monarch(2, 0)
