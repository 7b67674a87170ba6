"""Quaternion weights: the Hamilton product written out, the projection against least squares, bytes and loss."""

import math
import re

import numpy as np
import pytest
import torch

from fxcompress import Budget
from fxcompress.codegen.ops.quaternion_linear import expand, fold, quaternion_linear
from fxcompress.core.errors import SpecError
from fxcompress.core.metric import local_error
from fxcompress.passes.low_rank import DAMPING
from fxcompress.passes.quantize import Quantize
from fxcompress.passes.quaternion import Quaternion, untrained_error
from fxcompress.passes.recipe import Recipe, parse
from tests.sites import moment_of, normal, site_of, weight_of

SHAPES = [(24, 40), (40, 24), (32, 32), (4, 4)]


def hamilton(p, q):
    """(a + bi + cj + dk)(e + fi + gj + hk), from ii = jj = kk = ijk = -1."""
    a, b, c, d = p
    e, f, g, h = q
    return (
        a * e - b * f - c * g - d * h,
        a * f + b * e + c * h - d * g,
        a * g - b * h + c * e + d * f,
        a * h + b * g - c * f + d * e,
    )


def product(components, x):
    """(out/4, in) components on (in,) features: a sum of Hamilton products, one quaternion at a time."""
    weights, features = np.split(components, 4, 1), np.split(x, 4)
    out = np.zeros((4, len(components)))
    for o in range(len(components)):
        for i in range(len(features[0])):
            out[:, o] += hamilton([w[o, i] for w in weights], [f[i] for f in features])
    return out.ravel()


def operands(tokens=(2, 5), bias=True, dtype=torch.float32, grad=False, rows=12, columns=20):
    generator = torch.Generator().manual_seed(0)
    x, c = (torch.randn(s, generator=generator, dtype=dtype) for s in ((*tokens, columns), (rows // 4, columns)))
    b = torch.randn(rows, generator=generator, dtype=dtype) if bias else None
    return tuple(t if t is None else t.requires_grad_(grad) for t in (x, c, b))


def test_the_hamilton_product_used_here_is_a_quaternion_algebra():
    generator = np.random.default_rng(0)
    p, q, r = generator.standard_normal((3, 4))
    left, right = hamilton(hamilton(p, q), r), hamilton(p, hamilton(q, r))
    np.testing.assert_allclose(left, right, atol=1e-14)
    assert np.linalg.norm(hamilton(p, q)) == pytest.approx(np.linalg.norm(p) * np.linalg.norm(q))
    one, i, j, k = np.eye(4)
    np.testing.assert_array_equal(hamilton(i, j), k)
    np.testing.assert_array_equal(hamilton(k, k), -one)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_op_is_the_hamilton_product(shape):
    x, c, b = operands((3,), dtype=torch.float64, rows=shape[0], columns=shape[1])
    got = quaternion_linear(x, c, b).numpy()
    want = np.stack([product(c.numpy(), row) + b.numpy() for row in x.numpy()])
    np.testing.assert_allclose(got, want, atol=1e-13)  # float64 sums of at most 40


def test_fold_is_the_adjoint_of_expand():
    generator = torch.Generator().manual_seed(0)
    c, w = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 20), (12, 20)))
    assert float((expand(c) * w).sum()) == pytest.approx(float((c * fold(w)).sum()), abs=1e-12)
    torch.testing.assert_close(fold(expand(c)), 4 * c)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_metric_it_is_the_nearest_quaternion_matrix(shape):
    weight = weight_of(shape).double()
    blocks = [row.chunk(4, 1) for row in weight.chunk(4)]
    closed_form = torch.cat(
        [
            blocks[0][0] + blocks[1][1] + blocks[2][2] + blocks[3][3],
            -blocks[0][1] + blocks[1][0] - blocks[2][3] + blocks[3][2],
            -blocks[0][2] + blocks[1][3] + blocks[2][0] - blocks[3][1],
            -blocks[0][3] - blocks[1][2] + blocks[2][1] + blocks[3][0],
        ],
        1,
    )
    made = Recipe(Quaternion()).make(site_of(weight))
    torch.testing.assert_close(made.tensors["components"], closed_form / 4)
    assert solved(weight, None) == pytest.approx(float((weight - made.weight).square().sum()), rel=1e-9)


def solved(weight, metric):
    """The least squared error over all quaternion matrices, by numpy on the explicit linear map."""
    rows, columns = weight.shape
    basis = torch.eye(rows * columns // 4, dtype=torch.float64).reshape(-1, rows // 4, columns)
    root = np.eye(columns) if metric is None else np.linalg.cholesky(metric.numpy())
    design = np.stack([(expand(c).numpy() @ root).ravel() for c in basis], 1)
    target = (weight.double().numpy() @ root).ravel()
    return float(np.square(target - design @ np.linalg.lstsq(design, target, rcond=None)[0]).sum())


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (16, 16)])
def test_in_a_metric_it_is_the_nearest_in_that_metric(shape):
    weight, moment = weight_of(shape), moment_of(shape[1])
    site = site_of(weight, second_moment=moment)
    signal = float((weight.double() @ moment @ weight.double().T).trace())
    best = solved(weight, moment) / signal
    mine = local_error(site, Quaternion().unstored(site))
    # The pass answers G + 1e-4 mean(diag G) I; what that adds to the optimum is at most the damping of the residual.
    level = DAMPING * float(moment.diagonal().mean())
    assert best - 1e-6 <= mine <= best + level * float(weight.double().square().sum()) / signal + 1e-6
    plain = local_error(site, Quaternion().unstored(site_of(weight)))
    assert mine < 0.9 * plain


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_quaternion_matrix_projects_to_itself(shape, calibrated):
    _, c, _ = operands(rows=shape[0], columns=shape[1])
    site = site_of(expand(c), second_moment=moment_of(shape[1]) if calibrated else None)
    made = Recipe(Quaternion()).make(site)
    # Solved in float64 under a condition number of 1 / DAMPING at most, rounded once to float32.
    assert float((made.tensors["components"] - c).abs().max()) <= 2**-22 * float(c.abs().max())
    assert local_error(site, Quaternion().unstored(site)) < 1e-12
    again = Recipe(Quaternion()).make(site_of(made.weight, second_moment=site.statistics.second_moment))
    torch.testing.assert_close(again.weight, made.weight)


@pytest.mark.parametrize("calibrated", [False, True])
def test_whether_it_is_weighed_is_told_by_a_look(calibrated):
    _, c, _ = operands(rows=1024, columns=96)
    moment = moment_of(96) if calibrated else None
    assert untrained_error(site_of(expand(c), second_moment=moment)) < 1e-9
    site = site_of(expand(c) + 0.3 * c.std() * normal(1024, 96), second_moment=moment)
    whole = local_error(site, Quaternion().unstored(site))
    # Without a metric nothing is told from a few; with one 7 % is the most on MiniLM's weights.
    assert untrained_error(site) == pytest.approx(whole, rel=0.1 if calibrated else 1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-60, 1e-12, 1e12])
def test_a_look_at_inputs_of_any_size(scale):
    weight = weight_of((64, 48))
    told = untrained_error(site_of(weight, second_moment=moment_of(48) * scale))
    assert math.isfinite(told)
    if scale in (1e-12, 1e12):  # errors of fainter ones are judged in float32
        assert told == pytest.approx(untrained_error(site_of(weight, second_moment=moment_of(48))), rel=1e-4)


def test_a_generic_matrix_keeps_a_quarter_of_its_energy():
    generator = torch.Generator().manual_seed(0)
    site = site_of(torch.randn(384, 384, generator=generator))
    # The kept share is a mean of 36,864 squares over one of 147,456: chi-squared, relative deviation
    # sqrt(2 / 36864) = 0.7 %, four of them.
    lost = local_error(site, Quaternion().unstored(site))
    assert 1 - lost == pytest.approx(0.25, rel=0.03)
    assert lost**0.5 == pytest.approx(0.866, abs=0.005)


def test_a_trained_weight_loses_no_less(data):
    """Without calibration; the reason it is offered for training alone."""
    from benchmarks.models import minilm

    layer = data(minilm.model).encoder.layer[0]
    for linear in (layer.attention.self.query, layer.attention.self.value, layer.intermediate.dense):
        site = site_of(linear.weight.detach())
        assert 0.85 < local_error(site, Quaternion().unstored(site)) ** 0.5 < 0.88
        assert re.fullmatch(
            r"it loses 8[67]% of the output untrained; it is offered by name", Quaternion.unasked(site, Budget("4x"))
        )


def test_a_quaternion_weight_is_weighed_unasked():
    site = site_of(expand(weight_of((6, 40))))
    assert Quaternion.unasked(site, Budget("4x")) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_stores_exactly_a_quarter(dtype):
    site = site_of(weight_of((24, 40)).to(dtype))
    made = Recipe(Quaternion()).make(site)
    stored = sum(t.numel() * t.element_size() for t in made.tensors.values())
    assert 4 * stored == 4 * Recipe(Quaternion()).stored_bytes(site) == site.dense_bytes
    assert made.tensors["components"].dtype == dtype


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_components_are_quantized_in_their_own_metric(calibrated):
    _, c, _ = operands(rows=64, columns=64)
    site = site_of(expand(c), second_moment=moment_of(64) if calibrated else None)
    recipe = Recipe(Quaternion(), Quantize(4, 0))
    made = recipe.make(site)
    assert recipe.stored_bytes(site) == sum(t.numel() * t.element_size() for t in made.tensors.values())
    aware = local_error(site, made.weight)
    blind = local_error(site, Recipe(Quaternion(), Quantize(4, 0)).make(site_of(site.weight)).weight)
    assert aware < 0.8 * blind if calibrated else aware == blind


@pytest.mark.parametrize("calibrated", [False, True])
def test_awkward_weights_and_inputs_give_finite_components(calibrated):
    base = weight_of((24, 16))
    steep = base * torch.logspace(0, -9, 24).unsqueeze(1)
    for weight in (torch.zeros(24, 16), steep, base.t().contiguous().t(), base.bfloat16(), (base * 3e4).half()):
        site = site_of(weight, second_moment=moment_of(16) if calibrated else None)
        made = Recipe(Quaternion()).make(site)
        assert bool(torch.isfinite(made.weight).all())
        assert local_error(site, made.weight) <= 1
    dead = moment_of(16)
    dead[:, [0, 4, 8, 12]] = 0  # one input of each chunk: nothing says what that quaternion column should be
    dead[[0, 4, 8, 12]] = 0
    for moment in (dead, torch.zeros(16, 16, dtype=torch.float64)):
        site = site_of(base, second_moment=moment)
        made = Recipe(Quaternion()).make(site)
        plain = Recipe(Quaternion()).make(site_of(base))
        unseen = [0, 4, 8, 12]
        torch.testing.assert_close(made.weight[:, unseen], plain.weight[:, unseen])


def test_sides_that_are_no_multiples_of_four_are_refused():
    for shape in ((6, 8), (8, 6)):
        site = site_of(torch.ones(shape))
        assert Quaternion.refuses(site) == (
            f"the sides of a {shape[0]} x {shape[1]} weight are not both multiples of 4"
        )
        message = f"quaternion at weight: the weight is {shape[0]} x {shape[1]}, but both sides must be multiples of 4"
        for act in (Quaternion().check, Quaternion().at, Recipe(Quaternion()).make):
            with pytest.raises(SpecError, match=message):
                act(site)
    assert Quaternion.refuses(site_of(torch.ones(8, 8), "embedding")) == "it has no op for embedding tables"
    assert Quaternion.refuses(site_of(torch.ones(8, 8))) is None


def test_its_spec_is_its_name():
    assert [str(s) for s in Quaternion.space(site_of(torch.ones(8, 8)))] == ["quaternion"]
    assert parse("quaternion", [Quaternion]).structure == Quaternion()


def test_work_is_counted():
    cost = Recipe(Quaternion()).cost(site_of(torch.ones(24, 40))).at(tokens=10)
    assert cost.flops == 2 * 10 * 24 * 40
    assert cost.weight_bytes == 24 * 40
    assert cost.bytes == 4 * (10 * (24 + 40) + 2 * 24 * 40) + 24 * 40


def test_a_random_start_has_the_spread_of_the_weight():
    site = site_of(torch.randn(64, 96, generator=torch.Generator().manual_seed(1)) * 0.03)
    made = Recipe(Quaternion()).draw(site, torch.Generator().manual_seed(0))
    assert float(made.weight.std()) == pytest.approx(float(site.weight.std()), rel=1e-4)
    # Outputs vary as much as a real layer's too: every output sums over all inputs, as there.
    x = torch.randn(4096, 96, generator=torch.Generator().manual_seed(2))
    assert float((x @ made.weight.T).std()) == pytest.approx(float((x @ site.weight.T).std()), rel=0.05)


def test_the_dense_weight_is_differentiable_in_its_components():
    _, c, _ = operands(dtype=torch.float64, grad=True, rows=8, columns=8)
    assert torch.autograd.gradcheck(lambda q: Quaternion().dense({"components": q}, site_of(torch.ones(8, 8))), (c,))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [(2, 5), (), (0,), (1,), (3, 0, 2)])
def test_torch_accepts_the_op(tokens, bias):
    args = operands(tokens, bias)
    assert set(torch.library.opcheck(quaternion_linear, args).values()) == {"SUCCESS"}
    got = quaternion_linear(*args)
    fake = quaternion_linear(*(t if t is None else t.to("meta") for t in args))
    assert (fake.shape, fake.dtype, fake.stride()) == (got.shape, got.dtype, got.stride())


@pytest.mark.parametrize("tokens", [(2, 3), (), (0,)])
def test_the_gradient_of_the_op_is_that_of_the_product(tokens):
    assert torch.autograd.gradcheck(
        quaternion_linear, operands(tokens, dtype=torch.float64, grad=True, rows=8, columns=8)
    )
    assert set(torch.library.opcheck(quaternion_linear, operands((3,), grad=True)).values()) == {"SUCCESS"}


def test_backward_keeps_the_inputs_and_the_components_alone():
    x, c, b = operands(grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        quaternion_linear(x, c, b)
    assert sorted(kept) == sorted([x.data_ptr(), c.data_ptr()])
