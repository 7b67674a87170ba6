"""Prices that did not add up are put right, and a better plan is found by them."""

import pytest
import torch
from torch import nn

import fxcompress
from benchmarks.models import grokking
from fxcompress.carrying_out import OFF, SLIGHT, _is_off
from fxcompress.core.capture import capture
from fxcompress.core.divergence import additive
from fxcompress.core.site import find_sites
from fxcompress.cost_model.corrections import corrected, shares


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)).eval()


def test_shares_are_what_taking_a_choice_back_leaves():
    model, x = net(), torch.randn(64, 8)
    gm = capture(model, (x,))
    sites = find_sites(gm)
    off = {site.name: (site.weight + 0.1 * torch.randn_like(site.weight), None) for site in sites}
    off["2"] = (off["2"][0], torch.zeros(8))  # its bias goes too
    found = shares(gm, sites, off, [((x,), {})])

    def loss(names):
        other = net()
        for name in names:
            layer = other.get_submodule(name)
            layer.weight.data = off[name][0]
            if off[name][1] is not None:
                layer.bias.data = off[name][1]
        y, z = model(x), other(x)
        return float((y - z).double().square().sum() / y.double().square().sum())

    assert found.whole == pytest.approx(loss(["0", "2", "4"]), rel=1e-5)
    for name in ("0", "2", "4"):
        rest = [n for n in ("0", "2", "4") if n != name]
        assert found.of[name] == pytest.approx(max(0.0, found.whole - loss(rest)), rel=1e-4, abs=1e-9)
    assert torch.equal(gm(x), model(x))  # nothing was left behind


def test_shares_of_a_tied_weight():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids).tanh())

    torch.manual_seed(0)
    model, ids = Tied().eval(), torch.randint(12, (4, 5))
    gm = capture(model, (ids,))
    (site,) = find_sites(gm)
    off = site.weight + 0.1 * torch.randn_like(site.weight)
    found = shares(gm, [site], {site.name: (off, None)}, [((ids,), {})])
    before = model(ids)
    model.table.weight.data = off
    expected = float((model(ids) - before).double().square().sum() / before.double().square().sum())
    assert found.whole == pytest.approx(expected, rel=1e-5)
    assert found.of[site.name] == pytest.approx(expected, rel=1e-5)


def test_corrected_prices_add_up_to_what_was_measured():
    model, x = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64), nn.Linear(64, 64)), torch.randn(64, 64)
    plan = fxcompress.compile(model.eval(), "3x", calibration=[(x,)], rewrites=["quantize"], progress=False).plan
    of = {choice.site: choice.loss * factor for choice, factor in zip(plan.choices, (100.0, 2.0, 0.0))}
    put = corrected(plan, 0.5, of)
    assert put.predicted_loss == pytest.approx(0.5)
    assert [c.spec for c in put.choices] == [c.spec for c in plan.choices]
    factors = {c.site: new.loss / c.loss for c, new in zip(plan.choices, put.choices) if c.loss > 0}
    for before, after in zip(plan.candidates, put.candidates):
        assert after.loss == pytest.approx(before.loss * factors.get(before.site, 1.0))


def test_a_report_tells_of_corrections_only_where_there_were_some():
    model, x = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64)).eval(), torch.randn(256, 64)
    report = fxcompress.compile(model, "3.9x", calibration=[(x,)], rewrites=["quantize"], progress=False).report
    assert not _is_off(report)
    assert report.first_error is None
    assert "corrected" not in str(report)


def test_when_prices_are_off():
    class Told:
        def __init__(self, predicted, measured):
            self.predicted_error, self.measured_error = predicted, measured

    assert not _is_off(Told(0.0, 0.0))
    assert not _is_off(Told(0.1, 0.1 * OFF))
    assert _is_off(Told(0.1, 0.101 * OFF))
    assert _is_off(Told(0.1, 0.099 / OFF))
    assert not _is_off(Told(SLIGHT / 3, SLIGHT / 1.01))


def test_the_grokked_adder_at_16x_keeps_more_of_its_sums(data):
    """Its prices are several times too low there. Before they were corrected, 12,048 sums came out right."""
    from benchmarks.quality_small import LastPosition

    model = LastPosition(data(grokking.model, "grokked"))
    inputs, targets = grokking.all_sums()
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    compiled = fxcompress.compile(model, "16x", calibration=list(inputs[order[:4096]].split(512)), progress=False)
    report = compiled.report
    assert report.first_error < 0.1 < report.measured_error < 0.2
    with torch.no_grad():
        assert int((compiled(inputs).argmax(-1) == targets).sum()) > 12_500
    assert additive(report.predicted_error, report.kind) == pytest.approx(compiled.plan.predicted_loss)
    assert "was predicted before prices were corrected" in str(report)
