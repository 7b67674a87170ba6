"""What storing adds to structures that differ in size alone is inferred; no claim must be far below what is true."""

import math

import torch

from fxcompress.core.budget import Budget
from fxcompress.passes import propose
from fxcompress.passes.low_rank import LowRank
from fxcompress.passes.probes import MADE_EACH, Trial
from fxcompress.passes.quantize import Quantize
from fxcompress.passes.recipe import Recipe
from tests.sites import site_of


def positions(rows=1024, columns=128):
    """Sinusoids, of which half the rank holds nearly everything."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(0, columns, 2) / columns)
    angles = torch.arange(rows).unsqueeze(1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


def test_what_storing_adds_does_not_drown_in_what_the_smallest_of_a_series_loses(monkeypatch):
    """Pegasus' positions at rank 72 with 8 bits were claimed to lose next to nothing, and the model lost 15 times as
    much as before."""
    own, stored = {12: 0.1, 24: 0.01, 72: 0.0}, 1e-5
    monkeypatch.setattr(propose, "_own_error", lambda structure, site: own[structure.rank])
    monkeypatch.setattr(propose, "_error", lambda site, recipe: max(own[recipe.structure.rank], stored))
    site = site_of(positions())
    estimates = [
        Trial(recipe, recipe.net_bytes(site), lost, lost)
        for rank, lost in own.items()
        for recipe in [Recipe(LowRank(rank), Quantize(8, 0))]
    ]
    wanted = {str(e.recipe) for e in estimates}
    *_, largest = propose._measured(propose.Draft(site, [], estimates, wanted, []), wanted)
    assert largest.error == stored


def test_no_claim_is_far_below_what_a_recipe_loses():
    weight = positions()
    assert weight.numel() > MADE_EACH
    p = torch.full((len(weight),), 0.1 / len(weight), dtype=torch.float64)
    p[:16] += 0.9 / 16
    site = site_of(weight, "embedding", row_weight=p)
    ((site, trials, _),) = propose.trials_of([site], (Quantize, LowRank), Budget.parse("3x"))
    stored = [t for t in trials if isinstance(t.recipe.structure, LowRank) and t.recipe.storage is not None]
    assert len(stored) > 2
    for trial in stored:
        assert trial.error > 0.5 * trial.recipe.error(site, trial.recipe.make(site).weight), str(trial.recipe)
