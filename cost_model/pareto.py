"""The best plans there are between small, fast and exact: each the exact choice under budgets on a grid.

    sizes       in even ratios from the smallest size the candidates reach to that of the model as it is
    latencies   free, and in even ratios from the fastest plan to the model with nothing compressed; where priced

What another point equals or beats in bytes, seconds and error is dropped. Points are supported by bounds, not by
weights, so that hollows of the front are found, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fxcompress.core.budget import Budget
from fxcompress.core.errors import InfeasibleBudgetError
from fxcompress.core.plan import KEEP, Plan
from fxcompress.cost_model.select import choose, extreme

SIZES, LATENCIES = 12, 4


@dataclass(frozen=True)
class ParetoPoint:
    """bytes on disk, seconds a call (the weighted mean; None where no latency was priced), error as the plan's."""

    bytes: int
    seconds: float | None
    error: float
    plan: Plan


def pareto(table: Plan, sizes: int = SIZES, latencies: int = LATENCIES) -> list[ParetoPoint]:
    """By growing bytes, then seconds. The plans are chosen from the candidates of `table`."""
    kept = replace(table, choices=tuple(c for c in table.candidates if c.spec == KEEP), budget=Budget("1x"), gap=0.0)
    plans = [kept, extreme(table, "bytes")]
    times: list[float | None] = [None]
    if table.workload:
        plans.append(extreme(table, "seconds"))
        times += _even(plans[-1].latency, kept.latency, latencies)
    for size in _even(plans[1].predicted_bytes, kept.predicted_bytes, sizes)[1:]:
        for seconds in times:
            bound = None if seconds is None else f"{seconds:.9g} s"
            with contextlib.suppress(InfeasibleBudgetError):  # a corner of the grid that nothing reaches
                plans.append(choose(table, Budget(f"{size:.0f} B", latency=bound, min_gain=table.budget.min_gain)))
    return front([point_of(plan) for plan in plans])


def front(points: Sequence[ParetoPoint]) -> list[ParetoPoint]:
    """Those no other equals or beats; of equal ones the first."""

    def key(point: ParetoPoint) -> tuple[float, float, float]:
        return point.bytes, point.seconds or 0.0, point.error

    ordered = sorted(points, key=key)
    found: list[ParetoPoint] = []
    for point in ordered:  # what comes before has no more bytes
        if not any(all(a <= b for a, b in zip(key(other), key(point))) for other in found):
            found.append(point)
    return found


def point_of(plan: Plan) -> ParetoPoint:
    """What a plan is predicted to be."""
    return ParetoPoint(plan.predicted_bytes, plan.latency if plan.workload else None, plan.predicted_error, plan)


def _even(low: float, high: float, count: int) -> list[float]:
    """`count` numbers in even ratios, both ends among them."""
    return [low * (high / low) ** (i / (count - 1)) for i in range(count)]
