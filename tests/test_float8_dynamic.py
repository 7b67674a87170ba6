"""e4m3 on both sides: the op against its formula, the error of rounding x as it is predicted, what is stored."""

import pytest
import torch
import torch.nn.functional as F

from fxcompress.codegen.ops.float8_dynamic_linear import cost, float8_dynamic_linear, numbers, rounded_tokens
from fxcompress.core.errors import SpecError
from fxcompress.core.metric import local_error
from fxcompress.core.site import use_cost
from fxcompress.core.surgery import finish
from fxcompress.passes.float8_dynamic import Float8Dynamic
from fxcompress.passes.recipe import Recipe, parse
from tests.sites import normal
from tests.test_int8_dynamic import AWKWARD, SHAPES, graph_of, outlying


def stored(rows, columns, seed=0):
    """codes, scales, smooth of no particular weight; the codes reach both ends, and the smallest numbers."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 2, columns)
    drawn[0, :2] = torch.tensor([448.0, -448.0])
    codes = drawn.to(torch.float8_e4m3fn).view(torch.uint8)
    return codes, torch.rand(rows, generator=generator) / 448, torch.rand(columns, generator=generator) + 0.5


@pytest.mark.parametrize(("rows", "columns"), [(5, 7), (6, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_op_is_its_formula(rows, columns, dtype):
    codes, scales, smooth = stored(rows, columns)
    x, bias = normal(2, 3, columns).to(dtype), normal(rows, seed=5).to(dtype)
    got = float8_dynamic_linear(x, codes, scales, smooth, bias)
    q, step = rounded_tokens(x, smooth)
    weight = numbers(codes).double()
    want = q.double() @ weight.T * step.double() * scales.double() + bias.double()
    # A sum of `columns` exact products; two more products and a sum.
    size = q.double().abs() @ weight.abs().T * step.double() * scales.double() + bias.double().abs()
    assert bool(((got.double() - want).abs() <= (columns + 3) * float(torch.finfo(dtype).eps) / 2 * size).all())


def test_every_token_reaches_the_largest_number_and_is_off_by_a_sixteenth_at_most():
    x, smooth = normal(6, 40) * torch.logspace(-3, 3, 6).unsqueeze(1), stored(2, 40)[2]
    q, step = rounded_tokens(x, smooth)
    assert q.abs().amax(1).tolist() == [448.0] * 6
    even = x.double() / smooth.double()
    # Three bits of mantissa: 2^-4 of a number, or half of the smallest step, 2^-10; and the division's rounding.
    assert bool(((q * step.double() - even).abs() <= even.abs() * (2**-4 + 2**-22) + step * 2**-10).all())


def test_a_token_of_zeros_gives_the_bias():
    codes, scales, smooth = stored(5, 7)
    bias = normal(5)
    assert torch.equal(float8_dynamic_linear(torch.zeros(2, 7), codes, scales, smooth, bias), bias.expand(2, 5))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_accepts_the_op(shape, grad, biased):
    x = normal(*shape).requires_grad_(grad)
    args = (x, *stored(6, 21), normal(6).requires_grad_(grad) if biased else None)
    assert set(torch.library.opcheck(float8_dynamic_linear, args).values()) == {"SUCCESS"}
    real = float8_dynamic_linear(*args)
    fake = float8_dynamic_linear(*(None if a is None else a.to("meta") for a in args))
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradient_is_that_of_the_dense_product(shape):
    codes, scales, smooth = stored(6, 21)
    dense = numbers(codes).double() * scales.double().unsqueeze(1) / smooth.double()
    x, bias = normal(*shape).double().requires_grad_(), normal(6).double().requires_grad_()
    dy = normal(*shape[:-1], 6, seed=9).double()
    got = torch.autograd.grad(float8_dynamic_linear(x, codes, scales, smooth, bias), (x, bias), dy)
    want = torch.autograd.grad(F.linear(x, dense, bias), (x, bias), dy)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_specs_parse_back_and_say_what_is_wrong():
    for spec in (Float8Dynamic(), Float8Dynamic(0.85)):
        assert parse(str(spec), [Float8Dynamic]).structure == spec
    assert str(Float8Dynamic()) == "float8_dynamic"
    with pytest.raises(SpecError, match=r"float8_dynamic smooth=1\.5 must be a number from 0 to 1"):
        Float8Dynamic(1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", AWKWARD)
def test_bytes_and_graph_of_awkward_weights(name, dtype):
    weight = AWKWARD[name].to(dtype)
    x = outlying(400, weight.shape[1])
    bias = normal(len(weight), seed=4).to(dtype)
    gm, site = graph_of(weight, x, bias)
    recipe = Recipe(Float8Dynamic())
    made = recipe.make(site)
    assert recipe.stored_bytes(site) == sum(t.numel() * t.element_size() for t in made.tensors.values())
    assert made.tensors["codes"].dtype == torch.uint8
    assert all(t.is_contiguous() for t in made.tensors.values())
    made.apply(gm, site)
    finish(gm)
    given = x[:6].to(dtype)
    parts = [made.tensors[name] for name in ("codes", "scales", "smooth")]
    got = gm(given)
    assert torch.equal(got, float8_dynamic_linear(given, *parts, made.bias))
    assert bool(torch.isfinite(got).all())


@pytest.mark.parametrize("seed", range(3))
def test_the_predicted_error_is_the_measured_one(seed):
    weight, x, fresh = normal(64, 96, seed=seed), outlying(4000, 96, seed + 10), outlying(4000, 96, seed + 20)
    gm, site = graph_of(weight, x)
    made = Recipe(Float8Dynamic()).make(site)
    predicted = local_error(site, made.weight) + Float8Dynamic().input_error(site)
    made.apply(gm, site)
    finish(gm)
    want = F.linear(fresh.double(), weight.double())
    measured = float((gm(fresh).double() - want).square().sum() / want.square().sum())
    assert measured == pytest.approx(predicted, rel=0.19)  # a sample of 256 tokens: test_int8_dynamic.py


def test_it_costs_what_int8_costs():
    _, site = graph_of(normal(64, 96), outlying(400, 96))
    (use,) = site.uses
    use.node.args[0].meta["val"] = torch.empty(10, 96, device="meta")
    mine, dense = Recipe(Float8Dynamic()).cost(site), use_cost(use, 64, 96, site.dense_bytes, 4)
    assert mine.flops == dense.flops
    assert mine == cost(10, 64, 96, 64 * 96 + 4 * (64 + 96), 4)
