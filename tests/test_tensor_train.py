"""Tensor trains: the paper's digits and counts, TT-SVD against numpy, both ways to multiply, gradients, lookups."""

import itertools
import math
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

import benchmarks.tensor_train_memory as memory
import fxcompress.codegen.ops.tensor_train_embedding as embedding_op
import fxcompress.codegen.ops.tensor_train_linear as linear_op
from fxcompress.codegen.ops import tensor_train as math_of
from fxcompress.core.errors import SpecError
from fxcompress.core.metric import local_error
from fxcompress.core.rewrite import Store, parse_spec
from fxcompress.core.site import Statistics, find_sites
from fxcompress.core.surgery import finish
from fxcompress.passes.quantize import Quantize
from fxcompress.passes.recipe import Recipe
from fxcompress.passes.tensor_train import DAMPING, TensorTrain
from fxcompress.passes.tt_shapes import bond_ranks, core_elements, factor_shapes, full_rank, padded, primes, trimmed

LINEAR, EMBEDDING = torch.ops.fxcompress.tensor_train_linear, torch.ops.fxcompress.tensor_train_embedding
SHAPES = ((4, 2), (3, 4), (2, 3))  # 24 columns, 24 rows
UNEVEN = ((2, 3), (3, 2), (4, 1), (1, 4))  # 24 columns, 24 rows, digits of 1 among them


def graph_of(weight, kind):
    """A graph of one or two uses; "mm" reads the weight transposed, as Conv1D does."""
    root = nn.Module()
    root.weight = nn.Parameter(weight.t().contiguous() if kind == "mm" else weight, requires_grad=False)
    root.bias = nn.Parameter(torch.linspace(-1, 1, len(weight)).to(weight.dtype), requires_grad=False)
    graph, aten = fx.Graph(), torch.ops.aten
    x, w = graph.placeholder("x"), graph.get_attr("weight")
    if kind == "linear":
        y = graph.call_function(aten.linear.default, (x, w))
    elif kind == "biased":
        b = graph.get_attr("bias")
        b.meta["val"] = root.bias
        y = graph.call_function(aten.linear.default, (x, w, b))
    elif kind == "mm":
        y = graph.call_function(aten.mm.default, (x, w))
    else:
        y = graph.call_function(aten.embedding.default, (w, x))
        if kind == "tied":
            y = graph.call_function(aten.linear.default, (y, w))
    graph.output(y)
    return fx.GraphModule(root, graph)


def site_of(weight, kind="linear", **statistics):
    (site,) = find_sites(graph_of(weight, kind))
    return replace(site, statistics=Statistics(**statistics))


def weight_of(rows, columns, seed=0):
    """Singular values that fall like 1, 1/2, 1/3, ...; the digits mean nothing to it, as to a trained weight."""
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    u, _, vt = torch.linalg.svd(full, full_matrices=False)
    return (u / torch.arange(1, len(vt) + 1) @ vt).float()


def moment_of(columns, seed=1):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64) @ mix.T
    return x.T @ x / len(x)


def train_of(shapes, rank, dtype=torch.float64, seed=0):
    """Random cores of a train -> (cores, n, m, ranks)."""
    generator, ranks = torch.Generator().manual_seed(seed), bond_ranks(shapes, rank)
    cores = [
        torch.randn(ranks[k] * n, m * ranks[k + 1], generator=generator, dtype=torch.float64).to(dtype)
        for k, (n, m) in enumerate(shapes)
    ]
    return cores, [n for n, _ in shapes], [m for _, m in shapes], ranks


def dense_of(cores, shapes, ranks):
    """The formula of the op, one numpy einsum: W[(i..), (j..)] = sum G_1[., j_1, i_1, .] G_2 ..."""
    d, operands = len(shapes), []
    for k, (core, (n, m)) in enumerate(zip(cores, shapes)):
        operands += [core.detach().double().numpy().reshape(ranks[k], n, m, -1), [k, 20 + k, 40 + k, k + 1]]
    made = np.einsum(*operands, [0, *range(40, 40 + d), *range(20, 20 + d), d], optimize=True)
    return torch.from_numpy(made.reshape(math.prod(m for _, m in shapes), -1))


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


PAPER = [
    (768, 3072, 16, ((4, 4), (4, 4), (4, 4), (4, 4), (3, 12)), 13_120),
    (768, 3072, 32, ((8, 8), (8, 8), (12, 8), (1, 6)), 166_080),
    (768, 3072, 64, ((8, 8), (8, 8), (12, 8), (1, 6)), 659_840),
    (768, 3072, 80, ((16, 16), (16, 16), (3, 12)), 1_661_760),
    (1024, 4096, 72, ((16, 16), (16, 16), (4, 16)), 1_350_144),
]


@pytest.mark.parametrize(("columns", "rows", "rank", "shapes", "elements"), PAPER)
def test_the_digits_and_the_parameters_of_a_layer_are_the_papers(columns, rows, rank, shapes, elements):
    assert factor_shapes(columns, rows, rank) == shapes
    site = site_of(torch.empty(rows, columns))
    TensorTrain(rank).check(site)
    assert sum(r * c for r, c in TensorTrain(rank).matrices(site).values()) == elements
    assert core_elements(shapes, rank) == elements
    mirror = tuple((m, n) for n, m in shapes)
    assert factor_shapes(rows, columns, rank) == mirror
    assert core_elements(mirror, rank) == elements


def test_the_papers_medium_model_comes_out():
    """GPT-2 medium is 354,823,168 parameters, 48 of its weights 1024 x 4096 or the other way round; too large to build
    here (tests/test_restructure.py builds the small one)."""
    layers = sum(core_elements(factor_shapes(a, b, 72), 72) for a, b in [(1024, 4096), (4096, 1024)])
    assert 354_823_168 - 48 * 4_194_304 + 24 * layers == 218_303_488


@pytest.mark.parametrize("number", [1, 2, 97, 384, 30522, 50257, 151936])
def test_primes_multiply_up(number):
    assert math.prod(primes(number)) == number
    assert primes(number) == sorted(primes(number))
    assert all(p % q for p in primes(number) for q in range(2, min(p, 400)))


@pytest.mark.parametrize(("rows", "want"), [(30522, 31104), (50257, 52488), (97, 108), (32000, 32000), (61, 61)])
def test_rows_are_padded_only_where_a_prime_is_too_large_for_a_digit(rows, want):
    assert padded(rows) == want
    smooth = {2**a * 3**b for a in range(20) for b in range(13)}
    assert want == rows or want == min(s for s in smooth if s >= rows)


@pytest.mark.parametrize("rank", [16, 100, 128])
def test_trimming_merges_a_last_core_that_would_store_zeros(rank):
    shapes = factor_shapes(384, 1536, rank)
    short = trimmed(shapes, rank)
    assert math.prod(short[-1]) >= rank or len(short) == 1
    for side in (0, 1):
        assert math.prod(s[side] for s in short) == math.prod(s[side] for s in shapes)
    assert core_elements(short, rank) <= core_elements(shapes, rank)


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("shapes", [SHAPES, UNEVEN, ((4, 6), (6, 4))])
def test_the_projection_is_the_tt_svd(shapes, rank):
    weight, ranks = weight_of(24, 24), bond_ranks(shapes, rank)
    site = site_of(weight)
    got = TensorTrain(rank, shapes).unstored(site).numpy()
    want = tt_svd(weight, shapes, ranks).numpy()
    # The vectors come from Gram matrices: exact to 2e-16 of the largest singular value squared, over gaps that are
    # percents of it. The cores are rounded to float32: d + 1 times 6e-8 of the weight's norm, the scale of the entries.
    assert np.abs(got - want).max() <= 4e-7 * np.linalg.norm(weight)


@pytest.mark.parametrize("rank", [1, 2, 5, 7])
@pytest.mark.parametrize("shapes", [SHAPES, UNEVEN, ((4, 6), (6, 4))])
def test_the_error_lies_between_the_largest_tail_and_their_sum(shapes, rank):
    weight = weight_of(24, 24)
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
    site = site_of(weight_of(24, 24), **({"second_moment": moment_of(24)} if calibrated else {}))
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
    n, weight = [n for n, _ in shapes], weight_of(24, 24)
    parts = [moment_of(size, seed=size) for size in n]
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
    site, storage, structure = site_of(weight_of(24, 24)), Quantize(4, 0), TensorTrain(rank, SHAPES)
    plain, careless = Store(), Store(storage)
    structure.factor(site, plain)
    for name, core in plain.read.items():
        careless(name, core)
    error = local_error(site, Recipe(structure, storage).make(site).weight)
    assert error < share * local_error(site, structure.dense(careless.read, site))
    assert error > structure.error_bound(site)


@pytest.mark.parametrize("storage", [None, Quantize(8, 0), Quantize(4, 0)])
def test_bytes_claimed_are_bytes_stored(storage):
    site = site_of(weight_of(24, 24))
    recipe = Recipe(TensorTrain(5, SHAPES), storage)
    made = recipe.make(site)
    assert sum(t.numel() * t.element_size() for t in made.tensors.values()) == recipe.stored_bytes(site)
    if storage is None:
        matrices = recipe.structure.matrices(site)
        assert {k: tuple(t.shape) for k, t in made.tensors.items()} == matrices


@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        ("tensor_train{rank=64}", None),
        ("tensor_train{rank=64, shapes=((8, 8), (8, 8), (12, 8), (1, 6))}", ((8, 8), (8, 8), (12, 8), (1, 6))),
    ],
)
def test_the_spec_reads_back(spec, shapes):
    parsed = parse_spec(spec, {"tensor_train": TensorTrain})
    assert (str(parsed), parsed) == (spec, TensorTrain(64, shapes))


@pytest.mark.parametrize("rank", [0, -3, 2.5, 0.4, "4"])
def test_a_rank_that_is_no_whole_number_of_at_least_1_is_refused(rank):
    with pytest.raises(SpecError, match=f"tensor_train rank={rank!r} must be a whole number of at least 1"):
        TensorTrain(rank)


@pytest.mark.parametrize(
    "shapes", [(), ((8, 8),), ((8, 8), (3,)), ((8, 0), (3, 9)), (8, 8), 8, [[8, 8], [8, 8]], ((2.0, 2), (2, 2))]
)
def test_shapes_that_are_no_pairs_are_refused(shapes):
    with pytest.raises(SpecError, match="must be one pair \\(digit of the column, digit of the row\\) a core"):
        TensorTrain(4, shapes)


def test_shapes_that_do_not_multiply_up_are_refused_at_the_site():
    message = (
        r"tensor_train\{rank=2, shapes=\(\(4, 2\), \(5, 4\), \(2, 3\)\)\} at weight: the digits multiply up to "
        r"40 columns and 24 rows, but the weight has 24 columns and 24 rows"
    )
    with pytest.raises(SpecError, match=message):
        Recipe(TensorTrain(2, ((4, 2), (5, 4), (2, 3)))).at(site_of(weight_of(24, 24)))
    with pytest.raises(SpecError, match=r"the weight has 4 columns and 97 \(or, padded, 108\) rows"):
        TensorTrain(2, ((2, 10), (2, 10))).check(site_of(torch.zeros(97, 4), "embedding"))


@pytest.mark.parametrize(("shapes", "most"), [(SHAPES, 8), (UNEVEN, 16), (((4, 6), (6, 4)), 24)])
def test_a_rank_above_full_is_refused_with_the_range(shapes, most):
    site = site_of(weight_of(24, 24))
    assert full_rank(shapes) == most
    TensorTrain(most, shapes).check(site)
    message = f"is 24 x 24, and cut into {shapes} no bond needs more than {most}, so rank must be 1 to {most}."
    with pytest.raises(SpecError, match=re.escape(message)):
        TensorTrain(most + 1, shapes).check(site)


@pytest.mark.parametrize(("rank", "most"), [(17, 16), (64, 16), (10_000, 16)])
def test_a_rank_the_papers_digits_cannot_use_is_refused_with_one_they_can(rank, most):
    site = site_of(weight_of(24, 24))
    TensorTrain(most).check(site)
    with pytest.raises(SpecError, match=rf"needs more than \d+, so rank must be 1 to {most}\."):
        TensorTrain(rank).check(site)


@pytest.mark.parametrize(
    ("rows", "columns", "why"),
    [
        (24, 97, "its 97 columns have the prime factor 97, too large for a digit"),
        (24, 2 * 67, "its 134 columns have the prime factor 67, too large for a digit"),
        (31, 37, "neither side of a 31 x 37 weight can be factored"),
        (1, 1, "neither side of a 1 x 1 weight can be factored"),
        (97, 24, None),
        (24, 24, None),
    ],
)
def test_what_cannot_be_cut_into_digits_is_refused(rows, columns, why):
    assert TensorTrain.refuses(site_of(torch.ones(rows, columns))) == why


@pytest.mark.parametrize(("rows", "columns"), [(384, 384), (1536, 384), (384, 1536), (3072, 768), (24, 24), (97, 64)])
def test_the_space_runs_from_cheap_to_exact_below_three_quarters(rows, columns):
    site = site_of(torch.zeros(rows, columns))
    space = list(TensorTrain.space(site))
    assert 1 <= len(space) <= 7
    stored = [Recipe(s).stored_bytes(site) for s in space]
    assert stored == sorted(stored)
    assert stored[-1] < 0.75 * site.dense_bytes
    for s in space:
        s.check(site)
        last = s.shapes[-1]
        assert math.prod(last) >= s.rank  # no bond wider than what follows it can use


def test_a_vocabulary_is_offered_none():
    assert list(TensorTrain.space(site_of(torch.zeros(4096, 64), "embedding"))) == []


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
    site, generator = site_of(weight_of(24, 24)), torch.Generator().manual_seed(5)
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
    site = site_of(torch.zeros(24, 24), **({"second_moment": moment_of(24)} if calibrated else {}))
    assert float(Recipe(TensorTrain(3, SHAPES)).make(site).weight.abs().max()) == 0.0
    assert TensorTrain(3, SHAPES).error_bound(site) == 0.0


def test_inputs_that_are_all_zero_still_give_a_finite_train():
    site = site_of(weight_of(24, 24), second_moment=torch.zeros(24, 24, dtype=torch.float64))
    assert bool(torch.isfinite(Recipe(TensorTrain(3, SHAPES)).make(site).weight).all())


def test_half_precision_cores_stay_in_range():
    weight = (weight_of(24, 24) * 1e5).half()
    assert 1e4 < float(weight.abs().max()) < 65504
    made = Recipe(TensorTrain(full_rank(SHAPES), SHAPES)).make(site_of(weight))
    assert {t.dtype for t in made.tensors.values()} == {torch.float16}
    # Three cores rounded to 2^-11 each, and the weight they amount to.
    assert float((made.weight.float() - weight.float()).norm() / weight.float().norm()) < 4 * 2**-11


# The ops


@pytest.mark.parametrize("shapes", [SHAPES, UNEVEN, ((5, 1), (2, 3)), ((4, 4),) * 4])
@pytest.mark.parametrize("rank", [1, 3, 16])
def test_both_ways_agree_with_the_formula(shapes, rank):
    cores, n, m, ranks = train_of(shapes, rank, torch.float32)
    want = dense_of(cores, shapes, ranks)
    x = torch.randn(7, math.prod(n), generator=torch.Generator().manual_seed(1))
    # A sum of products of d + 1 numbers, each product and partial sum off by 2^-24: d R n of them a core at most, times
    # the same sum of absolute values.
    roundings = sum(r * size for r, size in zip(ranks, n)) + sum(ranks) + len(n)
    size = dense_of([c.abs() for c in cores], shapes, ranks)
    eps = 2**-24
    assert bool(((math_of.rebuild(cores, n, m) - want).abs() <= roundings * eps * size).all())
    room = (roundings + math.prod(n)) * eps * (x.abs().double() @ size.T)
    assert bool(((math_of.contract(x, cores, n, m) - x.double() @ want.T).abs() <= room).all())
    turned = math_of.turned(cores, n, m)
    assert torch.equal(dense_of(turned, [(b, a) for a, b in shapes], ranks), want.T)


@pytest.mark.parametrize("tokens", [1, 3, 50])
@pytest.mark.parametrize(("shapes", "rank"), [(SHAPES, 5), (UNEVEN, 3), (PAPER[0][3], 16), (((3, 5), (4, 2)), 6)])
def test_flops_are_those_counted_and_the_cheaper_way_is_taken(shapes, rank, tokens):
    cores, n, m, ranks = train_of(shapes, rank, torch.float32)
    x = torch.zeros(tokens, math.prod(n))
    with FlopCounterMode(display=False) as contract:
        math_of.contract(x, cores, n, m)
    with FlopCounterMode(display=False) as rebuild:
        x @ math_of.rebuild(cores, n, m).t()
    dense = 2 * tokens * math.prod(n) * math.prod(m)
    assert contract.get_total_flops() == tokens * math_of.contract_flops(n, m, ranks)
    assert rebuild.get_total_flops() == math_of.rebuild_flops(n, m, ranks) + dense
    cheaper = contract.get_total_flops() <= rebuild.get_total_flops()
    assert math_of.contracts(tokens, n, m, ranks) == cheaper
    with FlopCounterMode(display=False) as taken:
        linear_op.tensor_train_linear._init_fn(x, cores, n, m, math.prod(m), None)
    assert taken.get_total_flops() == min(contract.get_total_flops(), rebuild.get_total_flops())


def test_the_break_even_of_the_papers_layer():
    n, m = zip(*PAPER[0][3])
    ranks = bond_ranks(PAPER[0][3], 16)
    assert math_of.contract_flops(n, m, ranks) == 2 * 2_555_904  # 2.56 M multiplications a token, dense 2.36 M
    assert math_of.contracts(198, n, m, ranks)
    assert not math_of.contracts(199, n, m, ranks)


def test_the_split_is_the_best_of_all():
    for shapes, rank in [(SHAPES, 4), (UNEVEN, 5), (PAPER[0][3], 16), (PAPER[1][3], 64)]:
        cores, n, m, ranks = train_of(shapes, rank, torch.float32)
        counted = math_of.rebuild_flops(n, m, ranks)
        by_hand = []
        for split in range(1, len(n)):
            left, right, flops = cores[0].reshape(-1, ranks[1]), cores[-1].reshape(ranks[-2], -1), 0
            for k in range(1, split):
                flops += 2 * len(left) * cores[k].numel()
                left = torch.empty(len(left) * n[k] * m[k], ranks[k + 1])
            for k in range(len(n) - 2, split - 1, -1):
                flops += 2 * cores[k].numel() * right.shape[1]
                right = torch.empty(ranks[k], n[k] * m[k] * right.shape[1])
            by_hand.append(flops + 2 * left.numel() * right.shape[1])
        assert counted == min(by_hand)


def linear_sample(tokens=(2, 5), bias=True, rows=24, grad=False, dtype=torch.float32, shapes=SHAPES, rank=3):
    cores, n, m, _ = train_of(shapes, rank, dtype)
    x = torch.randn(*tokens, math.prod(n), generator=torch.Generator().manual_seed(2), dtype=dtype)
    b = torch.randn(rows, generator=torch.Generator().manual_seed(3), dtype=dtype) if bias else None
    floats = [x, *cores, *([b] if bias else [])]
    for t in floats:
        t.requires_grad_(grad)
    return x, cores, n, m, rows, b


def embedding_sample(ids=((0, 21, 3), (3, 3, 7)), rows=24, grad=False, dtype=torch.float32, shapes=UNEVEN, rank=3):
    cores, n, m, _ = train_of(shapes, rank, dtype)
    for core in cores:
        core.requires_grad_(grad)
    return torch.tensor(ids), cores, n, m, rows


LINEAR_SAMPLES = [
    lambda **k: linear_sample(**k),
    lambda **k: linear_sample(bias=False, **k),
    lambda **k: linear_sample(tokens=(), **k),
    lambda **k: linear_sample(tokens=(0, 3), **k),
    lambda **k: linear_sample(tokens=(300,), rows=22, **k),
    lambda **k: linear_sample(tokens=(2,), rows=21, shapes=UNEVEN, **k),
    lambda **k: linear_sample(tokens=(200,), rows=5, shapes=((2, 3), (3, 2)), rank=2, **k),
    lambda **k: linear_sample(bias=False, rows=6, shapes=((2, 3), (3, 2)), rank=1, **k),
]
EMBEDDING_SAMPLES = [
    lambda **k: embedding_sample(**k),
    lambda **k: embedding_sample(5, **k),
    lambda **k: embedding_sample(rows=22, **k),
    lambda **k: embedding_sample((0, 4), rows=5, shapes=((2, 3), (3, 2)), rank=2, **k),
]


@pytest.mark.parametrize("make", [*LINEAR_SAMPLES, *EMBEDDING_SAMPLES])
def test_torch_accepts_the_ops(make):
    args = make()
    op = LINEAR if len(args) == 6 else EMBEDDING
    assert set(torch.library.opcheck(op.default, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("make", [LINEAR_SAMPLES[6], LINEAR_SAMPLES[7], EMBEDDING_SAMPLES[3]])
def test_torch_accepts_the_ops_with_gradients(make):  # two cores: each is traced and compiled, for seconds
    args = make(grad=True)
    op = LINEAR if len(args) == 6 else EMBEDDING
    assert set(torch.library.opcheck(op.default, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("make", [*LINEAR_SAMPLES, *EMBEDDING_SAMPLES])
def test_the_fake_answer_has_the_shape_dtype_and_strides_of_the_real_one(make):
    args = make()
    op = LINEAR if len(args) == 6 else EMBEDDING
    real = op(*args)
    fake = op(*torch.utils._pytree.tree_map(lambda a: a.to("meta") if isinstance(a, torch.Tensor) else a, args))
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("make", LINEAR_SAMPLES)
def test_gradients_of_the_linear_op(make):
    x, cores, n, m, rows, bias = make(grad=True, dtype=torch.float64)
    tokens = x.numel() // x.shape[-1]
    if tokens > 20:
        x = x.detach()[:3].requires_grad_()

    def run(x, bias, *cores):
        return LINEAR(x, list(cores), n, m, rows, bias)

    assert torch.autograd.gradcheck(run, (x, bias, *cores))


@pytest.mark.parametrize("make", [*LINEAR_SAMPLES, *EMBEDDING_SAMPLES])
def test_gradients_are_those_of_the_dense_product(make):
    """Both ways of both products, through torch's own derivatives of `rebuild`."""
    x, cores, n, m, rows, *bias = make(grad=True, dtype=torch.float64)
    wanted = [t for t in (x, *cores, *bias) if t is not None and t.requires_grad]
    weight = math_of.rebuild(cores, n, m)[:rows]
    want = torch.nn.functional.linear(x, weight, *bias) if bias else weight[x]
    got = LINEAR(x, cores, n, m, rows, *bias) if bias else EMBEDDING(x, cores, n, m, rows)
    dy = torch.randn(want.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(got, wanted, dy), torch.autograd.grad(want, wanted, dy)):
        # Sums of some thousand products in float64, in another order.
        assert float((ours - theirs).norm()) <= 1e-12 * float(theirs.norm())


@pytest.mark.parametrize("make", EMBEDDING_SAMPLES)
def test_gradients_of_the_embedding_op(make):
    ids, cores, n, m, rows = make(grad=True, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *cores: EMBEDDING(ids, list(cores), n, m, rows), tuple(cores))


def test_gradients_only_where_asked_for():
    x, cores, n, m, rows, bias = linear_sample()
    cores[1].requires_grad_()
    LINEAR(x, cores, n, m, rows, bias).sum().backward()
    assert cores[1].grad is not None
    assert x.grad is None
    assert cores[0].grad is None
    with torch.no_grad():
        assert LINEAR(x, cores, n, m, rows, bias).requires_grad is False


def test_nothing_but_x_and_the_cores_is_kept_for_backward():
    for tokens in (2, 300):  # contracted, rebuilt
        x, cores, n, m, rows, bias = linear_sample(tokens=(tokens,), grad=True)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            LINEAR(x, cores, n, m, rows, bias)
        assert {t.untyped_storage().data_ptr() for t in kept} == {
            t.untyped_storage().data_ptr() for t in (x, *cores)
        }


def test_less_than_a_quarter_of_what_einsums_keep_is_kept():
    for shapes, rank in memory.LAYERS:
        x, cores, weight = memory.layer(shapes, rank, tokens=256)
        n, m = zip(*shapes)
        assert torch.allclose(memory.einsums(x, cores, shapes), x @ weight.T, rtol=1e-3, atol=1e-3)
        naive = memory.kept_bytes(partial(memory.einsums, x, cores, shapes))
        ours = memory.kept_bytes(partial(LINEAR, x, cores, n, m, len(weight), None))
        assert ours == (x.numel() + sum(c.numel() for c in cores)) * 4
        assert naive >= memory.BAR * ours


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_lookup_is_the_row_of_the_dense_table(dtype):
    cores, n, m, ranks = train_of(UNEVEN, 5)
    table = dense_of(cores, UNEVEN, ranks)
    for ids in (torch.arange(24), torch.tensor([[3, 3], [0, 23]]), torch.tensor(7), torch.zeros(2, 0)):
        got = EMBEDDING(ids.to(dtype), cores, n, m, 24)
        # Products of four numbers, summed over 5 x 5 x 5 paths, in float64.
        assert torch.allclose(got, table[ids.long()], rtol=1e-12, atol=1e-12)


def test_a_lookup_makes_only_the_rows_it_is_asked_for_and_each_once():
    cores, n, m, ranks = train_of(PAPER[0][3], 16, torch.float32)
    ids = torch.tensor([5, 3071, 5, 17, 5])
    with FlopCounterMode(display=False) as counter:
        math_of.rows_at(ids, cores, n, m)
    claimed = embedding_op.cost(3, n, m, ranks, 0, 4).flops
    assert counter.get_total_flops() == claimed
    assert claimed < math_of.rebuild_flops(n, m, ranks) / 50


@pytest.mark.parametrize("bad", [22, 23, 24, 2000, -1])
def test_an_id_outside_the_vocabulary_is_an_index_error_even_where_padding_has_a_row(bad):
    _, cores, n, m, rows = embedding_sample(rows=22)
    assert EMBEDDING(torch.tensor([0, 21]), cores, n, m, rows).shape == (2, 24)
    with pytest.raises(IndexError, match="out of range"):
        EMBEDDING(torch.tensor([0, bad]), cores, n, m, rows)


@pytest.mark.parametrize("storage", [None, Quantize(8, 0)])
@pytest.mark.parametrize("kind", ["linear", "biased", "mm", "embedding", "tied"])
@pytest.mark.parametrize("rows", [24, 97])
def test_the_graph_computes_with_the_dense_weight(kind, rows, storage):
    weight = weight_of(rows, 24)
    gm = graph_of(weight, kind)
    (site,) = find_sites(gm)
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
    want = want + gm.bias if kind == "biased" else want
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
