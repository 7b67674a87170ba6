"""Tensor trains: TT-SVD against numpy, the metric, random starts, awkward weights, graphs and their costs."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fxcompress.codegen.ops import tensor_train as math_of
from fxcompress.core.metric import local_error
from fxcompress.core.rewrite import Store
from fxcompress.core.site import Statistics, find_sites
from fxcompress.core.surgery import finish
from fxcompress.passes.quantize import Quantize
from fxcompress.passes.recipe import Recipe
from fxcompress.passes.tensor_train import DAMPING, TensorTrain
from fxcompress.passes.tt_shapes import bond_ranks, factor_shapes, full_rank
from tests.sites import graph_of, moment_of, site_of, weight_of
from tests.trains import PAPER, SHAPES, UNEVEN, dense_of, train_of


def unfoldings(weight, shapes):
    """The d - 1 unfoldings of W's digits, in numpy: pairs (j_1 i_1 .. j_k i_k) against the others."""
    n, m = zip(*shapes)
    d = len(n)
    tensor = np.asarray(weight, np.float64).reshape(*m, *n).transpose([x for k in range(d) for x in (d + k, k)])
    return [tensor.reshape(math.prod(n[:k]) * math.prod(m[:k]), -1) for k in range(1, d)]


def tt_svd(weight, shapes, ranks):
    """Oseledets' algorithm, numpy's SVD after SVD -> the dense weight."""
    (rest, *_), cores, found = unfoldings(weight, shapes), [], [1]
    for k in range(len(shapes) - 1):
        u, s, vt = np.linalg.svd(rest.reshape(found[k] * math.prod(shapes[k]), -1), full_matrices=False)
        found.append(min(ranks[k + 1], len(s)))
        cores.append(u[:, : found[-1]])
        rest = s[: found[-1], None] * vt[: found[-1]]
    cores = [torch.from_numpy(np.ascontiguousarray(c)) for c in [*cores, rest.reshape(-1, 1)]]
    return dense_of(cores, shapes, [*found, 1])


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("shapes", [SHAPES, UNEVEN, ((4, 6), (6, 4))])
def test_the_projection_is_the_tt_svd(shapes, rank):
    weight, ranks = weight_of((24, 24)), bond_ranks(shapes, rank)
    site = site_of(weight)
    got = TensorTrain(rank, shapes).unstored(site).numpy()
    want = tt_svd(weight, shapes, ranks).numpy()
    # The vectors come from Gram matrices: exact to 2e-16 of the largest singular value squared, over gaps that are
    # percents of it. The cores are rounded to float32: d + 1 times 6e-8 of the weight's norm, the scale of the entries.
    assert np.abs(got - want).max() <= 4e-7 * np.linalg.norm(weight)


@pytest.mark.parametrize("rank", [1, 2, 5, 7])
@pytest.mark.parametrize("shapes", [SHAPES, UNEVEN, ((4, 6), (6, 4))])
def test_the_error_lies_between_the_largest_tail_and_their_sum(shapes, rank):
    weight = weight_of((24, 24))
    site, total = site_of(weight), float(weight.double().square().sum())
    squares = [np.linalg.svd(u, compute_uv=False) ** 2 for u in unfoldings(weight, shapes)]
    tails = [float(s[r:].sum()) / total for s, r in zip(squares, bond_ranks(shapes, rank)[1:-1])]
    structure = TensorTrain(rank, shapes)
    error = local_error(site, structure.unstored(site))
    assert structure.error_bound(site) == pytest.approx(max(tails), abs=1e-12)
    # Rounding the cores and the difference to float32 moves a root by 1e-6 at most.
    assert max(tails) ** 0.5 - 1e-6 <= error**0.5 <= sum(tails) ** 0.5 + 1e-6


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("shapes", [SHAPES, UNEVEN, ((4, 6), (6, 4)), None])
def test_full_rank_is_exact(shapes, calibrated):
    site = site_of(weight_of((24, 24)), **({"second_moment": moment_of(24, spread=0)} if calibrated else {}))
    rank = full_rank(shapes or ((4, 4), (6, 6)))  # the digits of rank 16
    made = Recipe(TensorTrain(rank, shapes)).make(site)
    # Each core is rounded to 2^-24 of its entries; what whitening stretched (by 10 or so) is rounded there.
    assert float((made.weight - site.weight).norm() / site.weight.norm()) < 1e-5
    assert TensorTrain(rank, shapes).error_bound(site) < 1e-12


@pytest.mark.parametrize("shapes", [SHAPES, UNEVEN])
def test_a_train_is_found_again(shapes):
    cores, _, _, ranks = train_of(shapes, 3)
    weight = dense_of(cores, shapes, ranks).float()
    made = Recipe(TensorTrain(3, shapes)).make(site_of(weight))
    assert float((made.weight - weight).norm() / weight.norm()) < 1e-6  # float32 cores of a float32 weight
    assert TensorTrain(3, shapes).error_bound(site_of(weight)) < 1e-12


@pytest.mark.parametrize("rank", [1, 4, 7])
@pytest.mark.parametrize("shapes", [SHAPES, ((4, 6), (6, 4))])
def test_a_metric_that_is_a_kronecker_product_is_followed_exactly(shapes, rank):
    n, weight = [n for n, _ in shapes], weight_of((24, 24))
    parts = [moment_of(size, seed=size, spread=0) for size in n]
    moment, root = torch.ones(1, 1, dtype=torch.float64), np.ones((1, 1))
    for part in parts:
        level = part / part.diagonal().mean()
        moment = torch.kron(moment, part)
        root = np.kron(root, np.linalg.cholesky(level.numpy() + DAMPING * np.eye(len(part))))
    want = tt_svd(weight.double().numpy() @ root, shapes, bond_ranks(shapes, rank)).numpy() @ np.linalg.inv(root)
    site = site_of(weight, second_moment=moment)
    got = TensorTrain(rank, shapes).unstored(site)
    # As without a metric, in the metric: there everything is larger by `root`.
    size = np.linalg.norm(weight.numpy() @ root) * np.linalg.cond(root)  # S_k^-1 in the cores rounds what S_k shrank
    assert np.abs((got.numpy() - want) @ root).max() <= 4e-7 * size
    assert local_error(site, got) < local_error(site, TensorTrain(rank, shapes).unstored(site_of(weight)))


@pytest.mark.parametrize(("rank", "share"), [(6, 1.0), (8, 0.8)])
def test_cores_make_up_for_what_storing_the_earlier_ones_lost(rank, share):
    site, storage, structure = site_of(weight_of((24, 24))), Quantize(4, 0), TensorTrain(rank, SHAPES)
    plain, careless = Store(), Store(storage)
    structure.factor(site, plain)
    for name, core in plain.read.items():
        careless(name, core)
    error = local_error(site, Recipe(structure, storage).make(site).weight)
    assert error < share * local_error(site, structure.dense(careless.read, site))
    assert error > structure.error_bound(site)


@pytest.mark.parametrize("storage", [None, Quantize(8, 0), Quantize(4, 0)])
def test_bytes_claimed_are_bytes_stored(storage):
    site = site_of(weight_of((24, 24)))
    recipe = Recipe(TensorTrain(5, SHAPES), storage)
    made = recipe.make(site)
    assert sum(t.numel() * t.element_size() for t in made.tensors.values()) == recipe.stored_bytes(site)
    if storage is None:
        matrices = recipe.structure.matrices(site)
        assert {k: tuple(t.shape) for k, t in made.tensors.items()} == matrices


def test_the_random_start_is_the_papers():
    site = site_of(torch.randn(3072, 768, generator=torch.Generator().manual_seed(3)) * 0.02)
    for rank in (16, 64):
        made = Recipe(TensorTrain(rank)).draw(site, torch.Generator().manual_seed(0))
        ranks = bond_ranks(factor_shapes(768, 3072, rank), rank)
        *left, _ = made.tensors.values()
        for core, width in zip(left, ranks[1:]):
            q = core.reshape(-1, width)
            # QR in float32: orthonormal to a few roundings of 2^-24 for each of the columns.
            assert float((q.T @ q - torch.eye(width)).abs().max()) < 1e-5
        assert float(made.weight.double().square().mean().sqrt()) == pytest.approx(float(site.weight.std()), rel=1e-4)
        # The mean of all entries is 0: it is a sum of products of independent, symmetric numbers.
        assert abs(float(made.weight.mean())) < 0.002
        again = Recipe(TensorTrain(rank)).draw(site, torch.Generator().manual_seed(0))
        assert all(torch.equal(a, b) for a, b in zip(made.tensors.values(), again.tensors.values()))
        other = Recipe(TensorTrain(rank)).draw(site, torch.Generator().manual_seed(1))
        assert not torch.equal(made.weight, other.weight)


def test_orthogonalising_the_random_start_does_not_change_what_it_is_a_draw_of():
    """Without it the entries of W are sums of products with variance 1 / (R_1 .. R_{d-1}), as many as there are paths:
    variance 1, scaled to the site's. The same draws by einsum, unorthogonalised, give the same W up to that scale."""
    site, generator = site_of(weight_of((24, 24))), torch.Generator().manual_seed(5)
    made = Recipe(TensorTrain(4, SHAPES)).draw(site, generator)
    generator, ranks, cores = torch.Generator().manual_seed(5), bond_ranks(SHAPES, 4), []
    for k, (n, m) in enumerate(SHAPES):
        drawn = torch.randn(ranks[k], n * m * ranks[k + 1], generator=generator)
        cores.append((drawn / math.sqrt(ranks[k])).reshape(ranks[k] * n, -1))
    want = dense_of(cores, SHAPES, ranks)
    want *= float(site.weight.std()) / float(want.square().mean().sqrt())
    assert torch.allclose(made.weight.double(), want, rtol=0, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_zero_weight_gives_a_zero_train(calibrated):
    site = site_of(torch.zeros(24, 24), **({"second_moment": moment_of(24, spread=0)} if calibrated else {}))
    assert float(Recipe(TensorTrain(3, SHAPES)).make(site).weight.abs().max()) == 0.0
    assert TensorTrain(3, SHAPES).error_bound(site) == 0.0


def test_inputs_that_are_all_zero_still_give_a_finite_train():
    site = site_of(weight_of((24, 24)), second_moment=torch.zeros(24, 24, dtype=torch.float64))
    assert bool(torch.isfinite(Recipe(TensorTrain(3, SHAPES)).make(site).weight).all())


def test_half_precision_cores_stay_in_range():
    weight = (weight_of((24, 24)) * 1e5).half()
    assert 1e4 < float(weight.abs().max()) < 65504
    made = Recipe(TensorTrain(full_rank(SHAPES), SHAPES)).make(site_of(weight))
    assert {t.dtype for t in made.tensors.values()} == {torch.float16}
    # Three cores rounded to 2^-11 each, and the weight they amount to.
    assert float((made.weight.float() - weight.float()).norm() / weight.float().norm()) < 4 * 2**-11


@pytest.mark.parametrize("storage", [None, Quantize(8, 0)])
@pytest.mark.parametrize("kind", ["linear", "biased", "mm", "embedding", "tied"])
@pytest.mark.parametrize("rows", [24, 97])
def test_the_graph_computes_with_the_dense_weight(kind, rows, storage):
    weight = weight_of((rows, 24))
    bias = torch.linspace(-1, 1, rows) if kind == "biased" else None
    gm, site = graph_of(weight, "linear" if kind == "biased" else kind, bias)
    recipe = Recipe(TensorTrain(4), storage).at(site)
    made = recipe.make(site)
    lookup = kind in ("embedding", "tied")
    x = torch.arange(rows) if lookup else torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    made.apply(gm, site)
    finish(gm)
    got = gm(x)
    w = made.weight.double()
    want = w[x] if lookup else x.double() @ w.T
    want = want @ w.T if kind == "tied" else want
    want = want if bias is None else want + bias
    # Float32 sums of 24 products and of 4 a bond; the dense weight itself was rounded to 2^-24 of its entries.
    assert float((got - want).abs().max()) <= 200 * 2**-24 * float(want.abs().max())
    assert not any("weight" in str(node.target) for node in gm.graph.find_nodes(op="get_attr"))


def test_costs_follow_the_cheaper_way():
    shapes, rank = PAPER[0][3], 16
    site = site_of(torch.empty(3072, 768))
    cost = TensorTrain(rank).cost(site.uses[0], 3072, 768, 52_480, 4)
    n, m = zip(*shapes)
    ranks = bond_ranks(shapes, rank)
    for tokens in (1, 100, 198, 199, 10_000):
        contract = tokens * math_of.contract_flops(n, m, ranks)
        rebuild = math_of.rebuild_flops(n, m, ranks) + 2 * tokens * 768 * 3072
        got = cost.at(tokens=tokens)
        assert int(got.flops) == min(contract, rebuild)
        plain = tokens * (768 + 3072) * 4 + 52_480
        if contract <= rebuild:
            states = sum(math.prod(m[:k]) * ranks[k] * math.prod(n[k:]) for k in range(1, 5))
            assert int(got.bytes) == plain + 2 * tokens * states * 4
        else:
            assert int(got.bytes) == plain + 4 * 768 * 3072 * 4
    assert cost.weight_bytes == 52_480


def test_the_kronecker_metric_helps_on_a_trained_model(data):
    from benchmarks.models import data as files
    from benchmarks.models import vit_mnist
    from fxcompress.core.calibrate import calibrate
    from fxcompress.core.capture import capture

    model = data(vit_mnist.model)
    images, _ = data(files.mnist)
    batches = list(vit_mnist.normalise(images[:64]).split(16))
    gm = capture(model, (batches[0],))
    sites = find_sites(gm)
    calibration = calibrate(gm, sites, batches, progress=False)
    ratios = []
    for site in map(calibration.informed, sites):
        if site.kind != "linear" or TensorTrain.refuses(site):
            continue
        blind = replace(site, statistics=Statistics(), _analyses={})
        for structure in itertools.islice(TensorTrain.space(site), 1, None):
            ours = local_error(site, structure.unstored(site))
            ratios.append(ours / local_error(site, structure.unstored(blind)))
    assert len(ratios) > 8
    assert np.exp(np.mean(np.log(ratios))) < 0.95


def test_of_trains_with_the_same_digits_less_rank_loses_more():
    site = site_of(weight_of((48, 96)), second_moment=moment_of(96))
    by_series = {}
    for rank in (2, 4, 8, 16):
        for shapes in (((8, 6), (12, 8)), ((4, 4), (4, 3), (6, 4))):
            train = TensorTrain(rank, shapes)
            by_series.setdefault(train.series(), []).append(train.unstored_error(site))
    assert len(by_series) == 2  # other digits may hold what these cannot
    assert all(lost == sorted(lost, reverse=True) for lost in by_series.values())
