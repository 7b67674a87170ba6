"""8-bit floats: the nearest of all codes, error feedback, where they beat int8, scales that train."""

import numpy as np
import pytest
import torch

from fxcompress.codegen.ops.dequantize_float8 import dequantize_float8
from fxcompress.codegen.ops.float8_embedding import float8_embedding
from fxcompress.core.budget import Budget
from fxcompress.core.metric import Metric, local_error
from fxcompress.core.surgery import finish
from fxcompress.passes.float8 import Float8
from fxcompress.passes.quantize import Quantize
from fxcompress.passes.recipe import Recipe
from tests.sites import graph_of, moment_of, normal
from tests.storing import energy, round_trip


def test_a_float8_code_is_the_nearest_of_all_there_are():
    weight = normal(7, 50) * torch.logspace(-4, 4, 7).unsqueeze(1)
    made = Float8().encode(weight, Metric())
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    every = np.sort(every[np.isfinite(every)]).astype(np.float64)
    assert every[-1] == 448
    wanted = weight.numpy().astype(np.float64) / made["scales"].numpy()
    off = np.abs(wanted[..., None] - every).min(-1)
    codes = made["codes"].view(torch.float8_e4m3fn).float()
    got = np.abs(wanted - codes.numpy())
    # The division was rounded in float32: 2^-24 of at most 448.
    assert (got <= off + 448 * 2**-24).all()
    assert codes.abs().amax(1).tolist() == [448] * 7


def test_a_float8_weight_is_off_by_a_sixteenth_of_itself_at_most():
    weight = normal(20, 300)
    got = round_trip(Float8(), weight)
    smallest = weight.abs().amax(1, keepdim=True) / 448 * 2**-10  # half the least step, below 2^-6
    assert bool(((got - weight).abs() <= weight.abs() * 2**-4 * (1 + 1e-5) + smallest).all())


@pytest.mark.parametrize("seed", range(3))
def test_error_feedback_helps_8_bit_floats_too(seed):
    weight, moment = normal(40, 96, seed=seed), moment_of(96)
    fed = round_trip(Float8(), weight, Metric(moment))
    assert energy(weight - fed, moment) < 0.8 * energy(weight - round_trip(Float8(), weight), moment)


def heavy_tailed(rows=64, columns=1024):
    even = torch.rand(rows, columns, generator=torch.Generator().manual_seed(1))
    return torch.distributions.Cauchy(0.0, 1.0).icdf(even)


def test_8_bit_floats_are_weighed_unasked_where_they_win():
    whole_row = Quantize(8, 0)
    for weight, floats_win in ((normal(64, 1024), False), (heavy_tailed(), True)):
        _, site = graph_of(weight, "linear")
        why = Float8.unasked(site, Budget("4x"))
        assert why == (None if floats_win else "the ranges of its rows are narrow, where the steps of int8 are smaller")
        errors = [float((round_trip(q, weight) - weight).norm()) for q in (Float8(), whole_row)]
        assert (errors[0] < errors[1]) == floats_win
        for storage, error in Float8.dense_errors(site).items():
            assert error == local_error(site, Recipe(storage=storage).make(site).weight)


@pytest.mark.parametrize("weight", [torch.zeros(4, 9), torch.full((4, 9), 1e30), torch.full((4, 9), -1e-30)], ids=str)
def test_extreme_weights_stay_finite_as_8_bit_floats(weight):
    for metric in (Metric(), Metric(moment_of(9))):
        got = round_trip(Float8(), weight, metric)
        assert bool(torch.isfinite(got).all())
        if metric.columns is None:
            torch.testing.assert_close(got, weight, rtol=2**-4, atol=1e-32)


def test_scales_of_8_bit_floats_can_be_trained():
    made = Float8().encode(normal(6, 9), Metric())
    scales = made["scales"].double().requires_grad_()
    ids = torch.tensor([[0, 5], [5, 2]])
    assert torch.autograd.gradcheck(lambda s: dequantize_float8(made["codes"], s, torch.float64), (scales,))
    assert torch.autograd.gradcheck(lambda s: float8_embedding(ids, made["codes"], s, torch.float64), (scales,))


@pytest.mark.parametrize("bad", [12, -1])
def test_an_id_outside_a_table_of_8_bit_floats_is_an_index_error(bad):
    made = Float8().encode(normal(12, 9), Metric())
    with pytest.raises(IndexError, match="out of range"):
        float8_embedding(torch.tensor([0, bad]), made["codes"], made["scales"], torch.float32)


def test_a_cast_of_the_model_leaves_8_bit_floats_alone():
    gm, site = graph_of(normal(12, 40), "embedding")
    Recipe(storage=Float8()).make(site).apply(gm, site)
    finish(gm)
    want = gm.codes.clone()
    gm.half()
    assert torch.equal(gm.codes, want)
    assert gm.codes.dtype == torch.uint8
