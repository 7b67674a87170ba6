"""Plans held against each other: what each predicts at equal bytes of weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from fxcompress.core.budget import Budget
from fxcompress.core.errors import InfeasibleBudgetError
from fxcompress.core.plan import Plan
from fxcompress.cost_model.select import choose


def at_equal_sizes(mix: Plan, alone: Plan, ratios: Iterable[float]) -> Iterator[tuple[float, float, float]]:
    """(ratio, loss of `mix`, loss of `alone`), inf where the mix fits no more.

    Left out: sizes that `alone` cannot meet, or only with an error as large as the output itself: no model any more.
    """
    for ratio in ratios:
        budget = Budget(size=f"{ratio}x")
        try:
            # A plan with more candidates is itself a few hundred bytes longer: compare at equal bytes of weights.
            theirs = choose(replace(alone, fixed_bytes=mix.fixed_bytes), budget).predicted_loss
        except InfeasibleBudgetError:
            continue
        if theirs > 1:
            continue
        try:
            ours = choose(mix, budget).predicted_loss
        except InfeasibleBudgetError:
            ours = float("inf")
        yield ratio, ours, theirs
