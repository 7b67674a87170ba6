"""One candidate a site, the least predicted loss under every budget, from the candidates that a plan holds.

    a size, flops or a latency     the least loss within all bounds that are given
    an error alone                 the fewest bytes
    the least latency              the fewest seconds within the bounds, then the least loss at that speed

Sites tied by "units" always keep the same units; sites tied by "spec" get one rewrite where that hardly costs anything
(fxcompress.core.ties). The choice is exact (fxcompress.cost_model.knapsack).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fxcompress.core.budget import MORE_ERROR, Budget
from fxcompress.core.divergence import Kind, additive, readable
from fxcompress.core.errors import InfeasibleBudgetError
from fxcompress.core.plan import KEEP, Candidate, Plan
from fxcompress.core.ties import By, label_of
from fxcompress.core.units import format_bytes, format_seconds
from fxcompress.core.workload import weighted
from fxcompress.cost_model.knapsack import Axis, Item, Limits, Selection, Tie, select

NEXT_TO_NO_TIME = 1e-3  # of the fastest choice's seconds: far less than a profile is good for
# Of the free choice's: predictions are hardly exact to more.
NEXT_TO_NOTHING: Mapping[Axis, float] = {"loss": 0.02, "bytes": 0.01, "seconds": 0.01}


def choose(table: Plan, budget: Budget) -> Plan:
    """`table` with its choices made anew for `budget`, from the candidates it already holds; nothing is measured again.

    Where latency is asked, no choice is slower than the weight as it is (`Plan.slows`). Raises `InfeasibleBudgetError`
    with the achievable range, `PlanError` where latency is asked of a table without seconds.
    """
    groups = _groups(table, budget)
    size, share = budget.size_bytes(table.original_bytes), budget.flops_share()
    room = None if size is None else size - table.fixed_bytes
    flops = None if share is None else share * sum(_kept(g).flops for g in groups)
    loss = None if budget.error is None else additive(budget.error, table.kind)
    others = flops is None and loss is None and budget.latency is None
    if size is not None and size >= table.original_bytes and others:
        return replace(table, choices=tuple(_kept(g) for g in groups), budget=budget, gap=0.0)  # "1x": as it is
    limits, market = Limits(room, loss, flops, _seconds(table, budget)), _market(table, groups)
    try:
        selection = _fastest(market, limits, table.kind) if budget.fastest else _choice(market, limits)
    except InfeasibleBudgetError as error:
        raise InfeasibleBudgetError(_range(table, groups, market, budget)) from error
    picked = tuple(g[i] for g, i in zip(groups, selection.picked))
    return replace(table, choices=picked, budget=budget, gap=selection.gap)


def extreme(table: Plan, axis: Literal["bytes", "seconds"]) -> Plan:
    """The plan with the least of `axis`, and of those the one of least loss; its budget says how much that is."""
    gain = table.budget.min_gain
    free = Budget(1.0, min_gain=gain, latency="1x" if axis == "seconds" else None)
    groups = _groups(table, free)
    market = _market(table, groups)
    least = market.total(axis, select(market.items, Limits(), market.must, axis))
    selection = _choice(market, replace(Limits(), **{axis: least * (1 + NEXT_TO_NO_TIME if axis == "seconds" else 1)}))
    plan = replace(table, choices=tuple(g[i] for g, i in zip(groups, selection.picked)), gap=selection.gap)
    told = {"size": f"{plan.predicted_bytes} B"} if axis == "bytes" else {"latency": f"{plan.latency:.9g} s"}
    return replace(plan, budget=Budget(min_gain=gain, **told))  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Market:
    """What there is to choose from, the ties that must be kept, and those that should."""

    items: Sequence[Sequence[Item]]
    must: Sequence[Tie]
    should: Sequence[Tie]

    def total(self, axis: Axis, selection: Selection) -> float:
        return sum(float(getattr(of[i], axis)) for of, i in zip(self.items, selection.picked))


def _groups(table: Plan, budget: Budget) -> list[list[Candidate]]:
    """The candidates of each site that the budget admits."""
    of: dict[str, list[Candidate]] = {site.name: [] for site in table.sites}
    for candidate in table.candidates:
        of[candidate.site].append(candidate)
    kinds = {site.name: site.kind for site in table.sites}

    def admitted(c: Candidate, kept: Candidate) -> bool:
        slow = budget.latency is not None and table.slows(kinds[c.site], c, kept)
        return c.spec == KEEP or (c.bytes <= (1 - budget.min_gain) * kept.bytes and not slow)

    return [[c for c in group if admitted(c, kept)] for group in of.values() for kept in (_kept(group),)]


def _seconds(table: Plan, budget: Budget) -> float | None:
    """What the sites may take of a call, of the bound on the whole."""
    if budget.latency is None:
        return None
    bound = budget.latency_seconds(table.original_latency)
    return None if bound is None else bound - weighted(table.fixed_seconds, table.workload)


def _kept(group: Sequence[Candidate]) -> Candidate:
    return next(c for c in group if c.spec == KEEP)


def _market(table: Plan, groups: Sequence[Sequence[Candidate]]) -> _Market:
    items = [[Item(c.bytes, c.loss, c.flops, table.seconds_of(c)) for c in g] for g in groups]
    return _Market(items, _ties(table, groups, "units"), _ties(table, groups, "spec"))


def _ties(table: Plan, groups: Sequence[Sequence[Candidate]], by: By) -> list[Tie]:
    at = {site.name: i for i, site in enumerate(table.sites)}
    ties = [tie for tie in table.ties if tie.by == by]
    return [{at[name]: [label_of(by, c.spec) for c in groups[at[name]]] for name in t.sites} for t in ties]


def _choice(market: _Market, limits: Limits, goal: Axis | None = None) -> Selection:
    """The best choice that keeps the ties it must; one that keeps all of them where that costs next to nothing."""
    free = select(market.items, limits, market.must, goal)
    if not market.should:
        return free
    try:
        tied = select(market.items, limits, [*market.must, *market.should], goal)
    except InfeasibleBudgetError:
        return free
    costs = NEXT_TO_NOTHING.items()
    cheap = all(market.total(axis, tied) <= (1 + share) * market.total(axis, free) for axis, share in costs)
    return tied if cheap else free


def _fastest(market: _Market, limits: Limits, kind: Kind) -> Selection:
    """The least seconds within the bounds, and within MORE_ERROR of the least error where none was given; then the
    least loss at that speed, because many candidates run on one kernel and differ in nothing else."""
    if limits.loss is None:
        least = readable(market.total("loss", select(market.items, limits, market.must)), kind)
        limits = replace(limits, loss=additive(least * (1 + MORE_ERROR), kind))
    seconds = market.total("seconds", select(market.items, limits, market.must, "seconds"))
    return _choice(market, replace(limits, seconds=seconds * (1 + NEXT_TO_NO_TIME)), "loss")


def _range(table: Plan, groups: Sequence[Sequence[Candidate]], market: _Market, budget: Budget) -> str:
    def least(axis: Axis) -> list[Candidate]:
        return [g[i] for g, i in zip(groups, select(market.items, Limits(), market.must, axis).picked)]

    smallest = table.fixed_bytes + sum(c.bytes for c in least("bytes"))
    said = [
        f"the rewrites allowed reach from 1x ({format_bytes(table.original_bytes)}) "
        f"to {table.original_bytes / smallest:.2f}x ({format_bytes(smallest)})"
    ]
    if budget.flops is not None:
        fewest = sum(c.flops for c in least("flops")) / (sum(_kept(g).flops for g in groups) or 1.0)
        said.append(f"and from 100% to {fewest:.0%} of the flops")
    if budget.latency is not None:
        fixed, original = weighted(table.fixed_seconds, table.workload), table.original_latency
        kept, fast = (fixed + sum(map(table.seconds_of, of)) for of in ([_kept(g) for g in groups], least("seconds")))
        said.append(
            f"and on {', '.join(map(str, table.workload))} from {format_seconds(kept)} a call ({original / kept:.2f}x) "
            f"to {format_seconds(fast)} ({original / fast:.2f}x)"
        )
    if budget.error is not None:
        lowest = min((sum(min(c.loss for c in g) for g in groups), 0.0))
        said.append(f"and errors from {readable(lowest, table.kind):.4g} upwards, though not all at once")
    elif budget.latency is not None and (budget.size is not None or budget.flops is not None):
        said.append("though not all at once")
    return f"budget {budget} cannot be met: {' '.join(said)}. Ask for less, or allow more rewrites."
