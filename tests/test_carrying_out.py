"""Carrying a plan out: the room that a budget leaves is used where another plan of that size loses less."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress import Budget, api, carrying_out
from tests.sites import normal

TEXT = 16  # bytes by which other digits change what a plan compresses to
EVERYWHERE = "quantize{bits=8, group_size=0}"


class Residual(nn.Module):
    """Small weights, all alike: two of them on another grid change how well the files of all compress."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


@pytest.mark.parametrize(("depth", "width"), [(10, 40), (14, 64)])
def test_a_mix_is_no_worse_than_one_setting_of_its_size(depth, width):
    torch.manual_seed(depth)
    model, batches = Residual(depth, width).eval(), [normal(32, width, seed=seed) for seed in range(8)]
    original, known = api.observe(model, None, batches, False)
    table = api.price(original, api.resolve(["quantize"]), known, Budget("2x"), False, True)
    of = {(c.site, c.spec): c for c in table.candidates}
    uniform = replace(table, choices=tuple(of[site.name, EVERYWHERE] for site in table.sites))
    size = uniform.predicted_bytes
    for _ in range(2):  # it says what it was asked for, as the mix does
        alone = carrying_out.carry_out(original, known, replace(uniform, budget=Budget(f"{size} B")), None)
        size = alone.report.measured_bytes + TEXT
    mix = fxcompress.compile(model, f"{size} B", plan=table, calibration=batches, progress=False)
    assert mix.report.measured_bytes <= size
    assert mix.report.measured_error <= alone.report.measured_error


def test_a_plan_that_would_be_too_large_is_not_kept(monkeypatch):
    monkeypatch.setattr(carrying_out, "SLACK", 4000)  # what is tried cannot fit
    tried = []
    own = carrying_out._filled
    monkeypatch.setattr(carrying_out, "_filled", lambda *args: tried.append(own(*args)) or tried[-1])
    torch.manual_seed(1)
    model, batches = Residual(10, 40).eval(), [normal(32, 40, seed=seed) for seed in range(8)]
    compiled = fxcompress.compile(model, "24.9 KB", calibration=batches, rewrites=["quantize"], progress=False)
    assert tried != []
    assert tried[0] is not None
    assert tried[0].predicted_bytes > 24_900
    assert compiled.report.measured_bytes <= 24_900
