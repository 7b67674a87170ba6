"""The multiple-choice knapsack, solved exactly: one item a site, the least of one sum under bounds on the others.

    minimise    sum_i c_i x_i
    subject to  sum_{i in site} x_i = 1 for every site
                sum_i bytes_i x_i <= B,   sum_i flops_i x_i <= F,   sum_i seconds_i x_i <= T,   sum_i loss_i x_i <= E
                tied sites: sum of x_i over the items of one label is the same at each of them, for every label

Items that another of the same labels beats or equals on every axis are dropped first, then those that can be in no
better choice than one already found (fxcompress.cost_model.relaxation). Of many items a choice near enough the bound is
looked for first (fxcompress.cost_model.exchange). HiGHS (scipy.optimize.milp) settles the rest, and proves the gap.

Sinha & Zoltners, The multiple-choice knapsack problem, Operations Research 1979.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Literal

import numpy as np
import scipy.sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from fxcompress.core.errors import InfeasibleBudgetError
from fxcompress.cost_model.exchange import exchange
from fxcompress.cost_model.relaxation import relax

Axis = Literal["bytes", "loss", "flops", "seconds"]
AXES: tuple[Axis, ...] = ("bytes", "loss", "flops", "seconds")
GAP = 1e-6
# Of more items than MANY, a gap that is proven in a second or two (prices are far less exact), and the branches that a
# core is searched for: one that has nothing better soon leaves it to the next, in which it is easier to fit all bounds.
MANY, GAP_OF_MANY, NODES = 20_000, 1e-4, 30
# Items beyond one a site, those of least reduced cost, among which a choice as good nearly always lies. Two thirds of
# the instances of benchmarks/solver.py are settled in the first, in half the time that the second takes.
CORES = (200, 1000, 4000)
ROUNDING = 1e-12  # of sums in float64
TOLERANCE = 1e-6  # HiGHS's own, of a bound in units near 1


@dataclass(frozen=True)
class Item:
    """One candidate as the solver sees it: bytes stored, loss added, flops of one forward, seconds of the workload."""

    bytes: float
    loss: float
    flops: float
    seconds: float = 0.0


@dataclass(frozen=True)
class Limits:
    """Upper bounds on the sums; None is free."""

    bytes: float | None = None
    loss: float | None = None
    flops: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Selection:
    """picked[i] is the index of site i's item; gap is the proven relative distance from the optimum."""

    picked: tuple[int, ...]
    gap: float


Tie = Mapping[int, Sequence[str]]
"""{site: the label of each of its items}: sites decided together end up with items of one label."""


def undominated(items: Sequence[Item]) -> list[int]:
    """Indices of the items no other item beats or equals on every axis; of equal items the first stays."""
    return _undominated(np.array([astuple(item) for item in items]).reshape(-1, len(AXES)))


def _undominated(values: np.ndarray) -> list[int]:
    """values (items, axes)."""
    no_worse = (values[:, None] <= values[None]).all(2)  # [i, j]: i beats or equals j
    beaten = no_worse & (~no_worse.T | np.tri(len(values), k=-1, dtype=bool).T)
    return [int(i) for i in np.flatnonzero(~beaten.any(0))]


def select(
    sites: Sequence[Sequence[Item]], limits: Limits, ties: Sequence[Tie] = (), goal: Axis | None = None
) -> Selection:
    """The exact choice: the least of `goal` (by default loss, or bytes where loss alone is bounded).

    Raises `InfeasibleBudgetError`; `choose` says what would be feasible.
    """
    if goal is None:
        alone = limits.loss is not None and limits.bytes is limits.flops is limits.seconds is None
        goal = "bytes" if alone else "loss"
    if not sites:
        return Selection((), 0.0)
    every = _table(sites, limits, ties, goal)
    relaxed = relax(every.cost, every.rows, every.bounds, every.starts)
    tied = np.isin(every.site, [site for tie in ties for site in tie])
    many = len(tied) > MANY
    enough = GAP_OF_MANY if many else GAP
    if many and not ties:
        chosen = exchange(relaxed, every.rows, every.bounds, every.site, enough * abs(relaxed.lowest))
        if chosen is not None and (gap := _gap(float(every.cost[chosen].sum()), relaxed.lowest)) <= enough:
            return Selection(every.picked(chosen), gap)
    order = np.sort(relaxed.reduced)
    open_ = np.ones(len(tied), dtype=bool)
    for core in CORES:
        narrow = open_ & (tied | (relaxed.reduced <= order[min(len(sites) + core, len(tied)) - 1]))
        found = _solve(every, narrow, ties, enough, NODES if many else None)
        if found is None:
            continue
        gap = _gap(found.cost, relaxed.lowest)
        slack = ROUNDING * (abs(relaxed.lowest) + abs(found.cost) + float(np.abs(every.cost).max()))
        open_ &= relaxed.lowest + relaxed.reduced <= found.cost + slack  # what is not can be in no better choice
        if not (open_ & ~narrow).any():
            gap = min(gap, found.gap)  # HiGHS has seen every item that could do better
        if gap <= enough:
            return Selection(every.picked(found.chosen), gap)
    found = _solve(every, open_, ties, enough)
    if found is None:
        raise InfeasibleBudgetError("no choice of rewrites meets every bound")
    return Selection(every.picked(found.chosen), found.gap)


@dataclass(frozen=True)
class _Table:
    """Every item worth weighing; those of a site are neighbours. Sums and bounds in units that put both near 1."""

    site: np.ndarray  # (items,)
    index: np.ndarray  # (items,) among the site's items as they were given
    starts: np.ndarray  # (sites,)
    cost: np.ndarray  # (items,)
    rows: np.ndarray  # (bounds, items)
    bounds: np.ndarray  # (bounds,)

    def picked(self, chosen: np.ndarray) -> tuple[int, ...]:
        """chosen: one position a site, in order."""
        return tuple(int(i) for i in self.index[chosen])


@dataclass(frozen=True)
class _Solution:
    chosen: np.ndarray  # (sites,) positions in the table
    cost: float
    gap: float


def _table(sites: Sequence[Sequence[Item]], limits: Limits, ties: Sequence[Tie], goal: Axis) -> _Table:
    fronts, values = [], []
    for at, items in enumerate(sites):
        each = np.array([(item.bytes, item.loss, item.flops, item.seconds) for item in items], dtype=float)
        fronts.append(_front(each, [tie[at] for tie in ties if at in tie]))
        values.append(each[fronts[-1]])
    of = dict(zip(AXES, np.concatenate(values).T))
    rows, bounds = [], []
    for axis in AXES:
        if (bound := getattr(limits, axis)) is not None:
            unit = max(abs(bound), float(of[axis].max(initial=0.0)), 1e-300)  # HiGHS's tolerances are absolute
            rows.append(of[axis] / unit)
            bounds.append(bound / unit)
    sizes = [len(front) for front in fronts]
    starts = np.cumsum([0, *sizes[:-1]])
    columns = np.array(rows).reshape(len(rows), sum(sizes))
    site = np.repeat(np.arange(len(sites)), sizes)
    cost = of[goal] / _scale(of[goal])
    return _Table(site, np.concatenate(fronts).astype(int), starts, cost, columns, np.array(bounds))


def _front(values: np.ndarray, labels: Sequence[Sequence[str]]) -> list[int]:
    """The undominated items among those of the same labels."""
    if not labels:
        return _undominated(values)
    classes: dict[tuple[str, ...], list[int]] = {}
    for i in range(len(values)):
        classes.setdefault(tuple(of[i] for of in labels), []).append(i)
    return sorted(mine[k] for mine in classes.values() for k in _undominated(values[mine]))


def _solve(
    every: _Table, open_: np.ndarray, ties: Sequence[Tie], gap: float, nodes: int | None = None
) -> _Solution | None:
    """The best choice of the items that are `open_`, to half of `gap`; None where none was found, after `nodes`."""
    at = np.flatnonzero(open_)
    site, cost, rows = every.site[at], every.cost[at], every.rows[:, at]
    alone = np.bincount(site, minlength=len(every.starts))[site] == 1  # decided: constants, unless ties read them
    alone &= ~np.isin(site, [one for tie in ties for one in tie])
    free = np.flatnonzero(~alone)
    bounds = every.bounds - rows[:, alone].sum(1)
    fixed = float(cost[alone].sum())
    if not len(free):
        fits = bool((bounds >= -TOLERANCE).all())
        return _Solution(at, fixed, 0.0) if fits else None
    names, mine = np.unique(site[free], return_inverse=True)
    one_each = scipy.sparse.csr_array((np.ones(len(free)), (mine, range(len(free)))), shape=(len(names), len(free)))
    constraints = [LinearConstraint(one_each, 1, 1)]
    flat = list(zip(site[free].tolist(), every.index[at[free]].tolist()))
    if together := [row for tie in ties for row in _together(tie, flat)]:
        constraints.append(LinearConstraint(scipy.sparse.csr_array(np.array(together)), 0, 0))
    if len(bounds):
        constraints.append(LinearConstraint(rows[:, free], -np.inf, bounds))
    with _quiet():
        solved = milp(
            cost[free],
            constraints=constraints,
            integrality=np.ones(len(free), dtype=np.int64),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": gap / 2, **({} if nodes is None else {"node_limit": nodes})},
        )
    if solved.x is None:
        return None
    chosen = np.sort(np.concatenate([at[alone], at[free[solved.x > 0.5]]]))
    total = float(every.cost[chosen].sum())
    lowest = fixed + float(solved.mip_dual_bound)
    return _Solution(chosen, total, _gap(total, lowest) if solved.mip_gap else 0.0)


def _gap(cost: float, lowest: float) -> float:
    return max(0.0, cost - lowest) / max(abs(cost), 1e-300)


def _together(tie: Tie, flat: Sequence[tuple[int, int]]) -> Iterator[np.ndarray]:
    """Rows r with r . x = 0: each label is picked as often at every tied site as at the first of them."""
    first, *others = tie
    for label in sorted({label for labels in tie.values() for label in labels}):
        mine = {s: np.array([site == s and tie[s][i] == label for site, i in flat], dtype=float) for s in tie}
        yield from (mine[first] - mine[s] for s in others)


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
