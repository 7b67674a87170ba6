"""Held-out inputs, kept as they are or as moments: the errors they judge are the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fxcompress.core.calibrate import calibrate
from fxcompress.core.capture import capture
from fxcompress.core.held import Few, Identity, Many
from fxcompress.core.metric import local_error
from fxcompress.core.moment import HeldMoment, Moment, held, pooled
from fxcompress.core.site import find_sites
from fxcompress.passes.quantize import Quantize
from fxcompress.passes.recipe import Recipe
from tests.sites import normal, site_of


def tokens(count, columns, seed=0):
    """Correlated, with a mean far from zero."""
    return normal(count, columns, seed=seed) @ normal(columns, columns, seed=1) / columns**0.5 + 3.0


def moments_of(x):
    x = x.double()
    return x.T @ x / len(x), x.mean(0)


@pytest.mark.parametrize("around", [False, True])
def test_few_and_many_judge_alike(around):
    x, rows = tokens(12, 40), normal(7, 40, seed=2)
    point = x.double().mean(0) * 0.9 if around else None
    away = x.double() - (0 if point is None else point)
    want = (rows.double() @ away.T).square().mean(1)
    for seen, rel in ((Few(x), 1e-6), (Many(*moments_of(x)), 1e-5)):  # a moment is a sum of products that cancel
        gram = seen.around(point)
        torch.testing.assert_close(gram.energies(rows), want, rtol=rel, atol=0)
        torch.testing.assert_close(gram.diagonal(), away.square().mean(0), rtol=1e-5, atol=0)
        torch.testing.assert_close(seen.second, moments_of(x)[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(seen.mean, moments_of(x)[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(Identity(40).energies(rows), rows.double().square().sum(1), rtol=1e-6, atol=0)
    assert Identity(40).diagonal().tolist() == [1.0] * 40


@pytest.mark.parametrize("batches", [[5], [5, 6], [5, 7], [12], [30], [5, 30, 4]])
def test_inputs_are_kept_while_they_are_fewer_than_they_are_wide(batches):
    parts = [tokens(n, 12, seed=i) for i, n in enumerate(batches)]
    moment, whole = HeldMoment(), torch.cat(parts)
    for part in parts:
        moment.add(part)
        part.zero_()  # a graph may write into what it gave
    found = held([moment])
    assert isinstance(found, Few if sum(batches) < 12 else Many)
    assert moment.count == len(whole)
    assert bool(moment.inputs) == (sum(batches) < 12)
    for got, want in zip((found.second, found.mean), moments_of(whole)):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_uses_of_one_weight_are_judged_together():
    parts = [tokens(n, 12, seed=i) for i, n in enumerate((4, 5, 6, 20))]
    seen = [HeldMoment() for _ in parts]
    for moment, part in zip(seen, parts):
        moment.add(part)
    for some in ((0, 1), (0, 1, 2), (0, 3), (3,)):
        found = held([seen[i] for i in some])
        whole = torch.cat([parts[i] for i in some])
        assert isinstance(found, Few if len(whole) < 12 else Many)
        torch.testing.assert_close(found.second, moments_of(whole)[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.mean, moments_of(whole)[1], rtol=1e-5, atol=1e-5)
    assert held([]) is None
    assert held([HeldMoment()]) is None


def test_fitted_inputs_are_summed_at_once():
    moment = Moment()
    moment.add(tokens(5, 12))
    assert moment.second is not None
    torch.testing.assert_close(pooled([moment])[0], moments_of(tokens(5, 12))[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_a_rewrite_loses_the_same_either_way(bias):
    x, columns = tokens(30, 64), 64
    second, mean = moments_of(tokens(200, columns, seed=5))
    own_bias = normal(48, seed=3) if bias else None
    site = site_of(normal(48, columns, seed=4), bias=own_bias, second_moment=second, mean=mean, check=Few(x))
    other = replace(site, statistics=replace(site.statistics, check=Many(*moments_of(x))), _analyses={})
    made = Recipe(storage=Quantize(3, 32)).make(site)
    away = x.double() - (mean if bias else 0)  # a bias absorbs what is lost of the mean
    lost = (site.weight.double() - made.weight.double()) @ away.T
    want = float(lost.square().sum() / (site.weight.double() @ x.double().T).square().sum())
    assert local_error(site, made.weight) == pytest.approx(want, rel=1e-5)
    assert local_error(other, made.weight) == pytest.approx(want, rel=1e-4)


def test_calibration_keeps_what_is_few():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 8)).eval()
    gm = capture(model, (torch.randn(2, 8),))
    sites = {site.name: site for site in find_sites(gm)}
    known = calibrate(gm, [*sites.values()], [torch.randn(40, 8) for _ in range(2)], progress=False)
    narrow, wide = (known.statistics(sites[name]).check for name in ("0", "2"))
    assert isinstance(narrow, Many)  # 20 held-out inputs of 8 numbers
    assert isinstance(wide, Few)  # and of 64
    assert wide.inputs.shape == (20, 64)
    x = torch.cat([call[0][0] for call in known.held_out])
    torch.testing.assert_close(wide.inputs, model[1](model[0](x)).detach(), rtol=1e-5, atol=1e-6)
