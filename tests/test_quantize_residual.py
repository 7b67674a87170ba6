"""A low-rank correction of a quantized weight: the closed form of the paper, never worse, ranks that fit."""

from dataclasses import replace

import pytest
import scipy.linalg
import torch

from fxcompress.core.errors import SpecError
from fxcompress.core.metric import Metric
from fxcompress.passes.quantize import Quantize
from fxcompress.passes.quantize_residual import FACTORS, QuantizeResidual
from fxcompress.passes.recipe import Recipe
from tests.sites import graph_of, moment_of, normal
from tests.storing import energy, round_trip

MARKET = {
    "normal": normal(40, 56),
    "tall": normal(70, 31),
    "low rank": normal(40, 3) @ normal(3, 56, seed=5),
    "zero column": normal(40, 56) * (torch.arange(56) != 7),
    "zero": torch.zeros(40, 56),
    "outliers": normal(40, 56) + 30 * (normal(40, 56, seed=6) > 2.5),
    "wide range": normal(40, 56) * torch.logspace(-6, 6, 40).unsqueeze(1),
    "tiny": normal(3, 5),
}


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("name", MARKET)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_correction_never_makes_it_worse(name, bits, calibrated):
    weight = MARKET[name]
    moment = moment_of(weight.shape[1]) if calibrated else torch.eye(weight.shape[1], dtype=torch.float64)
    metric = Metric(moment if calibrated else None)
    base = energy(weight - round_trip(Quantize(bits, 32), weight, metric), moment)
    for rank in (1, 2, min(weight.shape)):
        corrected = energy(weight - round_trip(QuantizeResidual(bits, 32, rank), weight, metric), moment)
        # Least squares cannot lose; rounding the factors to 8 bits may, by little of what they correct. No scale is
        # below 1e-12, so a correction of nothing at all is of that size.
        assert corrected <= base * (1 + 1e-6) + 1e-21, rank


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_the_correction_is_the_closed_form_of_the_paper(rank):
    weight, moment = normal(40, 56), moment_of(56)
    storage = QuantizeResidual(2, 32, rank)
    base = round_trip(storage.base, weight, Metric(moment))
    lost = (weight - base).double().numpy()
    root = scipy.linalg.sqrtm(moment.numpy()).real
    s = scipy.linalg.svdvals(lost @ root)
    want = float((s[rank:] ** 2).sum())  # the error of Q + SVD_r((W - Q) R^.5) R^-.5, the least a term of rank r leaves
    got = energy(weight - round_trip(storage, weight, Metric(moment)), moment)
    assert want * (1 - 1e-6) <= got
    # Both factors are rounded to 8 bits: 2^-7 / sqrt 3 of the largest of a row, 4 root mean squares or so, 3e-4 of the
    # square of what is corrected, twice; the metric that finds V is damped by a ten-thousandth, too little to see.
    assert got <= want + 1e-3 * float((s[:rank] ** 2).sum())


def test_a_correction_of_full_rank_leaves_what_8_bits_lose():
    weight = normal(24, 32)
    got = round_trip(QuantizeResidual(2, 32, 24), weight)
    base = round_trip(Quantize(2, 32), weight)
    assert float((got - weight).norm()) < 0.02 * float((base - weight).norm())


def test_ranks_that_do_not_fit_are_refused_with_what_is_allowed():
    for rank in (0, -1, 1.5, True):
        with pytest.raises(SpecError, match=f"quantize_residual rank={rank} must be a whole number of at least 1"):
            QuantizeResidual(4, 64, rank)
    with pytest.raises(SpecError, match="allowed are 2, 3, 4, 8"):
        QuantizeResidual(5, 64, 4)
    _, site = graph_of(normal(12, 40), "linear")
    site = replace(site, name="encoder.up")
    with pytest.raises(SpecError, match=r"rank=13\} at encoder.up: the weight is 12 x 40, so rank must be 1 to 12"):
        Recipe(storage=QuantizeResidual(4, 32, 13)).at(site)
    with pytest.raises(SpecError, match=r"rank=13\}: the matrix is 12 x 40, so rank must be 1 to 12"):
        QuantizeResidual(4, 32, 13).encode(normal(12, 40), Metric())
    assert Recipe(storage=QuantizeResidual(4, 32, 12)).at(site).storage.rank == 12


def test_factors_of_a_correction_are_what_they_would_be_alone():
    made = QuantizeResidual(3, 32, 4).encode(normal(12, 40), Metric(moment_of(40)))
    assert {k for k in made if k[:2] in ("u_", "v_")} == {f"{f}_{k}" for f in "uv" for k in FACTORS.keys}
    alone = Quantize(3, 32).encode(normal(12, 40), Metric(moment_of(40)))
    assert all(torch.equal(made[k], t) for k, t in alone.items())
