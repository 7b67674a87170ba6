"""int8 on both sides: exact integers against numpy, the error of rounding x as it is predicted, smoothing."""


import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.models import data as texts
from benchmarks.models import minilm
from fxcompress.codegen.ops.int8_dynamic_linear import cost, int8_dynamic_linear, rounded_tokens
from fxcompress.core.errors import SpecError
from fxcompress.core.metric import local_error
from fxcompress.core.site import use_cost
from fxcompress.core.surgery import finish
from fxcompress.passes.int8_dynamic import Int8Dynamic
from fxcompress.passes.recipe import Recipe, parse
from tests import sites
from tests.sites import normal


def outlying(tokens, columns, seed=1):
    """Inputs of which every sixteenth column is thirty times as large, as in transformers."""
    x = normal(tokens, columns, seed=seed)
    x[:, ::16] *= 30
    return x


def graph_of(weight, x=None, bias=None, kind="linear"):
    """One use of `weight` -> (graph module, its site, calibrated on the rows of x)."""
    if x is None:
        return sites.graph_of(weight, kind, bias)
    wide = x.double()
    seen = {"second_moment": wide.T @ wide / len(x), "mean": wide.mean(0), "sample": x[:256].float()}
    return sites.graph_of(weight, kind, bias, **seen)


class Unsmoothed(Int8Dynamic):
    """What smoothing is measured against: every divisor is 1."""

    def _divisors(self, site):
        return torch.ones(site.columns)


def stored(rows, columns, seed=0):
    """codes, scales, smooth of no particular weight; the codes reach both ends."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
    codes[0] = 127
    return codes, torch.rand(rows, generator=generator) / 127, torch.rand(columns, generator=generator) + 0.5


@pytest.mark.parametrize(("rows", "columns"), [(5, 7), (3, 1024), (4, 1025), (6, 5000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_op_is_its_formula_in_whole_numbers(rows, columns, dtype):
    codes, scales, smooth = stored(rows, columns)
    x, bias = normal(2, 3, columns).to(dtype), normal(rows, seed=5).to(dtype)
    x[0, 0] = smooth.to(dtype)  # every q is 127: with 127 in every code the sum passes 2^24 from 1041 columns on
    got = int8_dynamic_linear(x, codes, scales, smooth, bias)
    q, step = rounded_tokens(x, smooth)
    assert q[0, 0].tolist() == [127] * columns
    total = q.numpy().astype(np.int64) @ codes.numpy().astype(np.int64).T
    want = total * step.numpy().astype(np.float64) * scales.numpy().astype(np.float64) + bias.numpy()
    # The sum is exact. Its conversion, two products and one sum are each off by half a unit in the last place.
    eps = float(torch.finfo(dtype).eps)
    size = np.abs(total) * step.numpy() * scales.numpy() + np.abs(bias.numpy())
    assert (np.abs(got.numpy() - want) <= 2 * eps * size).all()


def test_x_is_rounded_to_the_nearest_of_255_steps_of_its_own_token():
    x, smooth = normal(6, 40) * torch.logspace(-3, 3, 6).unsqueeze(1), stored(2, 40)[2]
    q, step = rounded_tokens(x, smooth)
    assert q.abs().amax(1).tolist() == [127] * 6
    assert torch.equal(q, q.round())
    even = x.double() / smooth.double()
    # Half a step, and two divisions rounded in float32 of at most 127 steps.
    assert bool(((q * step.double() - even).abs() <= step * (0.5 + 127 * 2**-22)).all())


def test_a_token_of_zeros_gives_the_bias():
    codes, scales, smooth = stored(5, 7)
    bias = normal(5)
    assert torch.equal(int8_dynamic_linear(torch.zeros(2, 7), codes, scales, smooth, bias), bias.expand(2, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_float32_answer_rounded_once(dtype):
    codes, scales, smooth = stored(5, 70)
    x, bias = normal(3, 70).to(dtype), normal(5).to(dtype)
    exact = int8_dynamic_linear(x.float(), codes, scales, smooth, bias.float())
    assert torch.equal(int8_dynamic_linear(x, codes, scales, smooth, bias), exact.to(dtype))


SHAPES = [(2, 5, 21), (3, 21), (21,), (0, 21), (2, 0, 21)]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_accepts_the_op(shape, grad, biased):
    x = normal(*shape).requires_grad_(grad)
    args = (x, *stored(6, 21), normal(6).requires_grad_(grad) if biased else None)
    assert set(torch.library.opcheck(int8_dynamic_linear, args).values()) == {"SUCCESS"}
    real = int8_dynamic_linear(*args)
    fake = int8_dynamic_linear(*(None if a is None else a.to("meta") for a in args))
    assert real.shape == (*shape[:-1], 6)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradient_is_that_of_the_dense_product(shape):
    # Rounding has no slope, so gradcheck cannot judge it: the backward pass is held against autograd of x W^T + b.
    codes, scales, smooth = stored(6, 21)
    dense = codes.double() * scales.double().unsqueeze(1) / smooth.double()
    x, bias = normal(*shape).double().requires_grad_(), normal(6).double().requires_grad_()
    dy = normal(*shape[:-1], 6, seed=9).double()
    got = torch.autograd.grad(int8_dynamic_linear(x, codes, scales, smooth, bias), (x, bias), dy)
    want = torch.autograd.grad(F.linear(x, dense, bias), (x, bias), dy)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spec", [Int8Dynamic(), Int8Dynamic(0.85), Int8Dynamic(0), Int8Dynamic(1.0)])
def test_specs_parse_back(spec):
    assert parse(str(spec), [Int8Dynamic]).structure == spec


def test_the_default_is_left_out_of_the_spec():
    assert str(Int8Dynamic()) == "int8_dynamic"
    assert str(Int8Dynamic(0.65)) == "int8_dynamic{smooth=0.65}"


@pytest.mark.parametrize("smooth", [-0.1, 1.01, "0.5", None, True])
def test_shares_outside_0_to_1_are_refused(smooth):
    with pytest.raises(SpecError, match=f"int8_dynamic smooth={smooth!r} must be a number from 0 to 1"):
        Int8Dynamic(smooth)


def test_it_says_where_it_cannot_act():
    assert Int8Dynamic.refuses(graph_of(normal(9, 40), kind="embedding")[1]) == "it has no op for embedding tables"
    assert Int8Dynamic.refuses(graph_of(normal(9, 40))[1]) == "only calibration can tell what rounding its inputs costs"
    small = graph_of(normal(3, 4), outlying(60, 4))[1]
    assert Int8Dynamic.refuses(small) == "12 weights are too few for a grid of their own"
    assert Int8Dynamic.refuses(graph_of(normal(9, 40), outlying(60, 40))[1]) is None


AWKWARD = {
    "normal": normal(24, 48),
    "tall": normal(60, 16),
    "zero": torch.zeros(24, 48),
    "zero column": normal(24, 48) * (torch.arange(48) != 16),
    "zero row": normal(24, 48) * (torch.arange(24) != 3).unsqueeze(1),
    "wide range": normal(24, 48) * torch.logspace(-8, 8, 24).unsqueeze(1),
    "transposed": normal(48, 24).t(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("name", AWKWARD)
def test_bytes_and_graph_of_awkward_weights(name, dead, dtype):
    weight = AWKWARD[name].to(dtype)
    x = outlying(400, weight.shape[1])
    if dead:
        x[:, 5:12] = 0
    bias = normal(len(weight), seed=4).to(dtype)
    gm, site = graph_of(weight, x, bias)
    recipe = Recipe(Int8Dynamic())
    made = recipe.make(site)
    assert recipe.stored_bytes(site) == sum(t.numel() * t.element_size() for t in made.tensors.values())
    assert all(t.is_contiguous() and (t.dtype == torch.int8 or bool(torch.isfinite(t).all())) for t in
               made.tensors.values())  # fmt: skip
    made.apply(gm, site)
    finish(gm)
    given = x[:6].to(dtype)
    got = gm(given)
    parts = [made.tensors[name] for name in ("codes", "scales", "smooth")]
    assert torch.equal(got, int8_dynamic_linear(given, *parts, made.bias))
    assert bool(torch.isfinite(got).all())
    # Against the dense product: half a step of x an element at most, in every column of |W| m.
    _, step = rounded_tokens(given, made.tensors["smooth"])
    room = 0.51 * step * (made.weight.double().abs() * made.tensors["smooth"]).sum(1)
    want = F.linear(given.double(), made.weight.double(), made.bias.double())
    eps = torch.finfo(dtype).eps
    size = F.linear(given.double().abs(), made.weight.double().abs(), made.bias.double().abs())
    assert bool(((got.double() - want).abs() <= room + 2 * eps * size + 1e-30).all())


def test_weights_are_rounded_with_feedback_in_the_metric_of_their_inputs():
    mix = normal(48, 48, seed=8) * torch.logspace(0, -1.5, 48)
    x = normal(2000, 48) @ mix.T
    _, site = graph_of(normal(24, 48), x)
    smooth = Int8Dynamic()._divisors(site)
    scaled = site.weight * smooth
    scales = scaled.abs().amax(1, keepdim=True) / 127
    nearest = (scaled / scales).round() * scales / smooth
    assert local_error(site, Int8Dynamic().unstored(site)) < 0.8 * local_error(site, nearest)


@pytest.mark.parametrize("smooth", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(3))
def test_the_predicted_error_is_the_measured_one(smooth, seed):
    weight, x, fresh = normal(64, 96, seed=seed), outlying(4000, 96, seed + 10), outlying(4000, 96, seed + 20)
    gm, site = graph_of(weight, x)
    structure = Int8Dynamic(smooth)
    made = Recipe(structure).make(site)
    predicted = local_error(site, made.weight) + structure.input_error(site)
    made.apply(gm, site)
    finish(gm)
    want = F.linear(fresh.double(), weight.double())
    measured = float((gm(fresh).double() - want).square().sum() / want.square().sum())
    # The sample holds 256 tokens, and few of the 96 columns decide a token's largest: each token's share of the error
    # varies by about its own size, 1 / sqrt 256 = 6 %; three times that.
    assert measured == pytest.approx(predicted, rel=0.19)
    assert structure.input_error(site) > 0.1 * predicted  # not a rounding of the rest
    assert structure.error_bound(site) <= predicted


@pytest.mark.parametrize("seed", range(3))
def test_smoothing_beats_none_where_some_columns_are_outliers(seed):
    _, site = graph_of(normal(64, 96, seed=seed), outlying(2000, 96, seed + 10))
    lost = {s: local_error(site, s.unstored(site)) + s.input_error(site) for s in (Int8Dynamic(), Int8Dynamic(0))}
    plain = Unsmoothed()
    none = local_error(site, plain.unstored(site)) + plain.input_error(site)
    # Outliers of 30 cost the other columns 30 times the step; half of that in octaves goes to the weight.
    assert lost[Int8Dynamic()] < 0.5 * none
    assert lost[Int8Dynamic()] < 0.5 * lost[Int8Dynamic(0)]


def test_smoothing_beats_none_on_real_activations(data):
    model = data(minilm.model)
    lines = [text for text, _ in data(texts.sst2, "dev")][:16]
    seen = {}

    def keep(name):
        def hook(_module, args):
            seen.setdefault(name, []).append(args[0].detach().reshape(-1, args[0].shape[-1]))

        return hook

    layer = model.encoder.layer[3]
    linears = {
        "query": layer.attention.self.query,
        "attention output": layer.attention.output.dense,
        "intermediate": layer.intermediate.dense,
    }
    handles = [module.register_forward_pre_hook(keep(name)) for name, module in linears.items()]
    with torch.no_grad():
        for line in lines:  # one at a time: no padding
            model(**minilm.tokenize([line]))
    for handle in handles:
        handle.remove()
    for name, module in linears.items():
        _, site = graph_of(module.weight.detach(), torch.cat(seen[name]))
        smoothed, plain = (
            local_error(site, s.unstored(site)) + s.input_error(site) for s in (Int8Dynamic(), Unsmoothed())
        )
        assert smoothed < plain, name


def test_a_random_start_is_of_the_same_kind_and_spread():
    _, site = graph_of(normal(64, 96) * 0.02, outlying(400, 96))
    made = Recipe(Int8Dynamic()).draw(site, torch.Generator().manual_seed(3))
    again = Recipe(Int8Dynamic()).draw(site, torch.Generator().manual_seed(3))
    assert {k: t.shape for k, t in made.tensors.items()} == {"codes": (64, 96), "scales": (64,), "smooth": (96,)}
    assert all(torch.equal(t, again.tensors[k]) for k, t in made.tensors.items())
    assert not torch.equal(made.weight, Recipe(Int8Dynamic()).make(site).weight)
    # 6144 draws settle a standard deviation to 1 / sqrt(2 * 6144) = 0.9 %; both are drawn.
    assert float(made.weight.std()) == pytest.approx(0.02, rel=0.05)


def test_it_multiplies_as_often_as_the_dense_product_and_moves_a_quarter_of_its_weight():
    _, site = graph_of(normal(64, 96), outlying(400, 96))
    (use,) = site.uses
    use.node.args[0].meta["val"] = torch.empty(10, 96, device="meta")
    mine, dense = Recipe(Int8Dynamic()).cost(site), use_cost(use, 64, 96, site.dense_bytes, 4)
    assert mine.flops == dense.flops == 2 * 10 * 64 * 96
    assert mine.weight_bytes == 64 * 96 + 4 * (64 + 96)
    assert mine == cost(10, 64, 96, mine.weight_bytes, 4)
    assert mine.bytes == 10 * (64 + 96) * 4 + 2 * 10 * 96 + mine.weight_bytes
