"""One candidate a site, the least total loss under every budget: the multiple-choice knapsack, solved exactly.

    minimise    sum_i loss_i x_i
    subject to  sum_{i in site} x_i = 1 for every site
                sum_i bytes_i x_i <= B,   sum_i flops_i x_i <= F,   sum_i loss_i x_i <= E

With an error budget alone, bytes and loss change places. Dominated candidates (no better on any axis) are dropped
first. HiGHS (scipy.optimize.milp) proves the gap it reports. Sinha & Zoltners, The multiple-choice knapsack problem,
Operations Research 1979.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from fxcompress.core.budget import Budget
from fxcompress.core.divergence import additive, readable
from fxcompress.core.errors import InfeasibleBudgetError
from fxcompress.core.plan import KEEP, Candidate, Plan
from fxcompress.core.units import format_bytes

GAP = 1e-6


@dataclass(frozen=True)
class Item:
    """One candidate as the solver sees it: bytes stored, loss added, flops of one forward."""

    bytes: float
    loss: float
    flops: float


@dataclass(frozen=True)
class Limits:
    """Upper bounds on the sums; None is free."""

    bytes: float | None = None
    loss: float | None = None
    flops: float | None = None


@dataclass(frozen=True)
class Selection:
    """picked[i] is the index of site i's item; gap is the solver's proven relative distance from the optimum."""

    picked: tuple[int, ...]
    gap: float


def undominated(items: Sequence[Item]) -> list[int]:
    """Indices of the items no other item beats or equals on bytes, loss and flops; of equal items the first stays."""
    order = sorted(range(len(items)), key=lambda i: (items[i].bytes, items[i].loss, items[i].flops, i))
    kept: list[int] = []
    for i in order:
        if not any(items[k].loss <= items[i].loss and items[k].flops <= items[i].flops for k in kept):
            kept.append(i)
    return sorted(kept)


def select(sites: Sequence[Sequence[Item]], limits: Limits) -> Selection:
    """The exact choice. Raises `InfeasibleBudgetError`; `choose` says what would be feasible."""
    fronts = [undominated(items) for items in sites]
    flat = [(s, i, sites[s][i]) for s, front in enumerate(fronts) for i in front]
    columns = {axis: np.array([getattr(item, axis) for _, _, item in flat]) for axis in ("bytes", "loss", "flops")}
    goal = "bytes" if limits.loss is not None and limits.bytes is None and limits.flops is None else "loss"
    one_each = scipy.sparse.csr_array(
        (np.ones(len(flat)), ([s for s, _, _ in flat], range(len(flat)))), shape=(len(sites), len(flat))
    )
    constraints = [LinearConstraint(one_each, 1, 1)]
    for axis, values in columns.items():
        bound = getattr(limits, axis)
        if bound is not None:
            unit = max(abs(bound), float(values.max(initial=0.0)), 1e-300)  # HiGHS's tolerances are absolute
            constraints.append(LinearConstraint(values[None] / unit, -np.inf, bound / unit))
    scale = _scale(columns[goal])
    with _quiet():
        solved = milp(
            columns[goal] / scale,
            constraints=constraints,
            integrality=np.ones(len(flat), dtype=np.int64),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": GAP},
        )
    if solved.x is None:
        raise InfeasibleBudgetError("no choice of rewrites meets every bound")
    picked = [0] * len(sites)
    for value, (s, i, _) in zip(solved.x, flat):
        if value > 0.5:
            picked[s] = i
    return Selection(tuple(picked), float(solved.mip_gap or 0.0))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """HiGHS (in scipy 1.17) leaves a debugging printf in its MIP solver, which would end up in `--json` output."""
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except (OSError, ValueError, AttributeError):  # no standard output to keep clean
        yield
        return
    try:
        with open(os.devnull, "w", encoding="ascii") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _scale(values: np.ndarray) -> float:
    """Puts the typical cost near 1, so that the solver's absolute tolerances do not blur it."""
    positive = values[values > 0]
    return max(float(np.median(positive)), 1e-9 * float(positive.max())) if len(positive) else 1.0


def choose(table: Plan, budget: Budget) -> Plan:
    """`table` with its choices made anew for `budget`, from the candidates it already holds; nothing is measured again.

    Raises `InfeasibleBudgetError` with the achievable range.
    """
    groups = [[c for c in table.candidates if c.site == site.name] for site in table.sites]
    groups = [[c for c in g if c.spec == KEEP or c.bytes <= (1 - budget.min_gain) * _kept(g).bytes] for g in groups]
    size, share = budget.size_bytes(table.original_bytes), budget.flops_share()
    room = None if size is None else size - table.fixed_bytes
    flops = None if share is None else share * sum(_kept(g).flops for g in groups)
    loss = None if budget.error is None else additive(budget.error, table.kind)
    if size is not None and size >= table.original_bytes and flops is None and loss is None:
        return replace(table, choices=tuple(_kept(g) for g in groups), budget=budget, gap=0.0)  # "1x": as it is
    try:
        selection = select([[Item(c.bytes, c.loss, c.flops) for c in g] for g in groups], Limits(room, loss, flops))
    except InfeasibleBudgetError as error:
        raise InfeasibleBudgetError(_range(table, groups, budget)) from error
    picked = tuple(g[i] for g, i in zip(groups, selection.picked))
    return replace(table, choices=picked, budget=budget, gap=selection.gap)


def _kept(group: Sequence[Candidate]) -> Candidate:
    return next(c for c in group if c.spec == KEEP)


def _range(table: Plan, groups: Sequence[Sequence[Candidate]], budget: Budget) -> str:
    smallest = table.fixed_bytes + sum(min(c.bytes for c in g) for g in groups)
    fewest = sum(min(c.flops for c in g) for g in groups) / (sum(_kept(g).flops for g in groups) or 1.0)
    ratio = table.original_bytes / smallest
    said = [
        f"the rewrites allowed reach from 1x ({format_bytes(table.original_bytes)}) "
        f"to {ratio:.2f}x ({format_bytes(smallest)})"
    ]
    if budget.flops is not None:
        said.append(f"and from 100% to {fewest:.0%} of the flops")
    if budget.error is not None:
        least = min((sum(min(c.loss for c in g) for g in groups), 0.0))
        said.append(f"and errors from {readable(least, table.kind):.4g} upwards, though not all at once")
    return f"budget {budget} cannot be met: {' '.join(said)}. Ask for less, or allow more rewrites."
