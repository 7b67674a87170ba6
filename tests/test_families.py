"""More to choose from never loses: at equal bytes the mix predicts no more error than any family alone."""

from __future__ import annotations

import torch

from benchmarks._rivals import at_equal_sizes
from benchmarks.models import grokking
from benchmarks.quality_small import LastPosition
from fxcompress import Budget
from fxcompress.api import observe, plan_only, price, untouched
from fxcompress.cost_model.select import NEXT_TO_NOTHING
from fxcompress.passes import REWRITES
from fxcompress.passes.quantize import LARGE_TABLE

RATIOS = [1.3, 1.6, 2, 2.5, 3, 4, 5, 6, 8, 10, 12]


def adder(data):
    inputs, _ = (data(grokking.model), grokking.all_sums())[1]
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    return LastPosition(grokking.model()), list(inputs[order[:2048]].split(512))


def test_the_mix_is_never_worse_than_a_family_alone(data):
    model, batches = adder(data)
    anything = Budget(error=1e6)  # prices every candidate, and is met by all of them
    with untouched():
        original, known = observe(model, None, batches, False)
        mix = price(original, REWRITES, known, anything, False)
        alone = {r.name: price(original, (r,), known, anything, False, named=True) for r in REWRITES}
    compared = 0
    for name, plan in alone.items():
        for ratio, ours, theirs in at_equal_sizes(mix, plan, RATIOS):
            # One rewrite for Q, K and V may cost 2 % of the loss: the plan takes it as long as it is no dearer.
            allowed = (1 + NEXT_TO_NOTHING["loss"]) * theirs + 1e-12
            assert ours <= allowed, f"{name} alone at {ratio}x"
            compared += 1
    assert compared > 20


def test_what_else_is_allowed_does_not_change_what_a_width_is_predicted_to_lose():
    """Every storage has a probe of its own: one of row tiers once priced the plain bits of the same table."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(LARGE_TABLE, 32), torch.nn.Linear(32, 16))
    reads = (torch.rand(16, 64) ** 4 * LARGE_TABLE).long()  # few rows are read often
    plans = [
        plan_only(model, "4x", calibration=list(reads.split(4)), rewrites=allowed, progress=False)
        for allowed in (["quantize"], ["quantize", "quantize_rows", "low_rank"])
    ]
    alone, among = ({(c.site, c.spec): c.loss for c in plan.candidates} for plan in plans)
    assert any(spec.startswith("quantize_rows") for _, spec in among)
    assert len(alone) > 4
    assert {key: among[key] for key in alone} == alone
