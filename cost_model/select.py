"""One candidate a site, the least total loss under every budget: the multiple-choice knapsack, solved exactly.

    minimise    sum_i loss_i x_i
    subject to  sum_{i in site} x_i = 1 for every site
                sum_i bytes_i x_i <= B,   sum_i flops_i x_i <= F,   sum_i loss_i x_i <= E
                tied sites: sum of x_i over the items of one label is the same at each of them, for every label
                (ties by "units" always; ties by "spec" where they hardly cost anything, fxcompress.core.ties)

With an error budget alone, bytes and loss change places. Candidates that another of the same labels beats or equals on
every axis are dropped first. HiGHS (scipy.optimize.milp) proves the gap it reports. Sinha & Zoltners, The
multiple-choice knapsack problem, Operations Research 1979.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from fxcompress.core.budget import Budget
from fxcompress.core.divergence import additive, readable
from fxcompress.core.errors import InfeasibleBudgetError
from fxcompress.core.plan import KEEP, Candidate, Plan
from fxcompress.core.ties import By, label_of
from fxcompress.core.units import format_bytes

GAP = 1e-6
UNBOUNDED = 1e300
NEXT_TO_NOTHING = {"loss": 0.05, "bytes": 0.01}  # of the free choice's: predictions are not exact to more than that


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


Tie = Mapping[int, Sequence[str]]
"""{site: the label of each of its items}: sites decided together end up with items of one label."""


def undominated(items: Sequence[Item]) -> list[int]:
    """Indices of the items no other item beats or equals on bytes, loss and flops; of equal items the first stays."""
    order = sorted(range(len(items)), key=lambda i: (items[i].bytes, items[i].loss, items[i].flops, i))
    kept: list[int] = []
    for i in order:
        if not any(items[k].loss <= items[i].loss and items[k].flops <= items[i].flops for k in kept):
            kept.append(i)
    return sorted(kept)


def select(sites: Sequence[Sequence[Item]], limits: Limits, ties: Sequence[Tie] = ()) -> Selection:
    """The exact choice. Raises `InfeasibleBudgetError`; `choose` says what would be feasible."""
    flat = [(s, i, items[i]) for s, items in enumerate(sites) for i in _front(items, [t[s] for t in ties if s in t])]
    columns = {axis: np.array([getattr(item, axis) for _, _, item in flat]) for axis in ("bytes", "loss", "flops")}
    goal = "bytes" if limits.loss is not None and limits.bytes is None and limits.flops is None else "loss"
    one_each = scipy.sparse.csr_array(
        (np.ones(len(flat)), ([s for s, _, _ in flat], range(len(flat)))), shape=(len(sites), len(flat))
    )
    constraints = [LinearConstraint(one_each, 1, 1)]
    if rows := [row for tie in ties for row in _together(tie, flat)]:
        constraints.append(LinearConstraint(scipy.sparse.csr_array(np.array(rows)), 0, 0))
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


def _front(items: Sequence[Item], labels: Sequence[Sequence[str]]) -> list[int]:
    """The undominated items among those of the same labels."""
    classes: dict[tuple[str, ...], list[int]] = {}
    for i in range(len(items)):
        classes.setdefault(tuple(of[i] for of in labels), []).append(i)
    return sorted(mine[k] for mine in classes.values() for k in undominated([items[i] for i in mine]))


def _together(tie: Tie, flat: Sequence[tuple[int, int, Item]]) -> Iterator[np.ndarray]:
    """Rows r with r . x = 0: each label is picked as often at every tied site as at the first of them."""
    first, *others = tie
    for label in sorted({label for labels in tie.values() for label in labels}):
        mine = {s: np.array([site == s and tie[s][i] == label for site, i, _ in flat], dtype=float) for s in tie}
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
    items, must, should = _items(groups), _ties(table, groups, "units"), _ties(table, groups, "spec")
    try:
        selection = _choice(items, Limits(room, loss, flops), must, should)
    except InfeasibleBudgetError as error:
        raise InfeasibleBudgetError(_range(table, groups, must, budget)) from error
    picked = tuple(g[i] for g, i in zip(groups, selection.picked))
    return replace(table, choices=picked, budget=budget, gap=selection.gap)


def _kept(group: Sequence[Candidate]) -> Candidate:
    return next(c for c in group if c.spec == KEEP)


def _items(groups: Sequence[Sequence[Candidate]]) -> list[list[Item]]:
    return [[Item(c.bytes, c.loss, c.flops) for c in g] for g in groups]


def _ties(table: Plan, groups: Sequence[Sequence[Candidate]], by: By) -> list[Tie]:
    at = {site.name: i for i, site in enumerate(table.sites)}
    ties = [tie for tie in table.ties if tie.by == by]
    return [{at[name]: [label_of(by, c.spec) for c in groups[at[name]]] for name in t.sites} for t in ties]


def _choice(items: Sequence[Sequence[Item]], limits: Limits, must: Sequence[Tie], should: Sequence[Tie]) -> Selection:
    """The best choice that keeps the ties it must; one that keeps all of them where that costs next to nothing."""
    free = select(items, limits, must)
    if not should:
        return free
    try:
        tied = select(items, limits, [*must, *should])
    except InfeasibleBudgetError:
        return free

    def total(axis: str, selection: Selection) -> float:
        return sum(float(getattr(of[i], axis)) for of, i in zip(items, selection.picked))

    cheap = all(total(axis, tied) <= (1 + share) * total(axis, free) for axis, share in NEXT_TO_NOTHING.items())
    return tied if cheap else free


def _range(table: Plan, groups: Sequence[Sequence[Candidate]], ties: Sequence[Tie], budget: Budget) -> str:
    least_bytes = select(_items(groups), Limits(loss=UNBOUNDED), ties).picked
    smallest = table.fixed_bytes + sum(g[i].bytes for g, i in zip(groups, least_bytes))
    by_flops = [[Item(c.flops, c.loss, c.bytes) for c in g] for g in groups]
    least_flops = select(by_flops, Limits(loss=UNBOUNDED), ties).picked
    fewest = sum(g[i].flops for g, i in zip(groups, least_flops)) / (sum(_kept(g).flops for g in groups) or 1.0)
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
