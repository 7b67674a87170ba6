"""The knapsack against an independent exact solver, OR-Tools' CP-SAT: whole numbers, bounds and ties that bind."""

import random

import numpy as np
import pytest
from ortools.sat.python import cp_model

from fxcompress.core.errors import InfeasibleBudgetError
from fxcompress.cost_model import knapsack
from fxcompress.cost_model.knapsack import AXES, Item, Limits, select
from fxcompress.cost_model.relaxation import relax

KINDS = {
    "three bounds": (("bytes", "flops", "seconds"), "loss"),
    "seconds": (("seconds",), "loss"),
    "size and error, the least time": (("bytes", "loss"), "seconds"),
    "an error": (("loss",), "bytes"),
    "all but time": (("bytes", "loss", "flops"), "seconds"),
}


def instance(seed, sites=30, items=8, most=40):
    """Whole numbers, so that sums are exact; few values, so that equal items and equal optima abound."""
    rng = random.Random(seed)
    return [[Item(*(rng.randint(0, most) for _ in AXES)) for _ in range(rng.randint(1, items))] for _ in range(sites)]


def bounds(sites, axes, rng):
    """Between the least sum and that of the cheapest by the goal: some bind, some together cannot be met."""
    limits = {}
    for axis in axes:
        low, high = (sum(of(getattr(i, axis) for i in items) for items in sites) for of in (min, max))
        limits[axis] = round(low + rng.uniform(0.12, 0.5) * (high - low))
    return Limits(**limits)


def ties(sites, rng):
    chosen = rng.sample(range(len(sites)), 6)
    labels = {s: [rng.choice("ab") for _ in sites[s]] for s in chosen}
    return [{s: labels[s] for s in chosen[:3]}, {s: labels[s] for s in chosen[3:]}]


def by_cp_sat(sites, limits, tied, goal):
    """The least goal, proven; None where nothing is feasible."""
    model = cp_model.CpModel()
    x = [[model.new_bool_var(f"{s} {i}") for i in range(len(items))] for s, items in enumerate(sites)]
    for row in x:
        model.add_exactly_one(row)

    def total(axis):
        return sum(int(getattr(i, axis)) * v for items, row in zip(sites, x) for i, v in zip(items, row))

    for axis in AXES:
        if (bound := getattr(limits, axis)) is not None:
            model.add(total(axis) <= int(bound))
    for tie in tied:
        first, *others = tie
        for label in "ab":
            count = {s: sum(v for v, at in zip(x[s], tie[s]) if at == label) for s in tie}
            for other in others:
                model.add(count[first] == count[other])
    model.minimize(total(goal))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    status = solver.solve(model)
    assert status in (cp_model.OPTIMAL, cp_model.INFEASIBLE)
    return round(solver.objective_value) if status == cp_model.OPTIMAL else None


def solved(seed, kind, with_ties):
    rng, sites, (axes, goal) = random.Random(seed), instance(seed), KINDS[kind]
    limits = bounds(sites, axes, rng)
    return sites, limits, ties(sites, rng) if with_ties else [], goal


@pytest.mark.parametrize("cores", [(0,), (10, 30), (1000, 4000)])
@pytest.mark.parametrize("with_ties", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_cp_sat_s(seed, kind, with_ties, cores, monkeypatch):
    """cores: how many items the first solves look at; with none they miss, and the bounds must find the rest."""
    monkeypatch.setattr(knapsack, "CORES", cores)
    sites, limits, tied, goal = solved(seed, kind, with_ties)
    best = by_cp_sat(sites, limits, tied, goal)
    if best is None:
        with pytest.raises(InfeasibleBudgetError, match="no choice of rewrites meets every bound"):
            select(sites, limits, tied, goal)
        return
    found = select(sites, limits, tied, goal)
    total = {axis: sum(getattr(items[i], axis) for items, i in zip(sites, found.picked)) for axis in AXES}
    assert all(getattr(limits, axis) is None or total[axis] <= getattr(limits, axis) for axis in AXES)
    assert all(len({tie[s][found.picked[s]] for s in tie}) == 1 for tie in tied)
    assert total[goal] == best  # whole numbers below 1,200: the next best is further than GAP allows
    assert found.gap <= knapsack.GAP


def test_feasible_and_infeasible_both_occur_above():
    outcomes = {
        by_cp_sat(*solved(seed, kind, with_ties)) is None
        for seed in range(8) for kind in KINDS for with_ties in (False, True)
    }  # fmt: skip
    assert outcomes == {True, False}


@pytest.mark.parametrize("seed", range(30))
def test_no_choice_costs_less_than_the_bound_nor_an_item_less_than_its_reduced_cost_says(seed):
    rng = random.Random(seed)
    sites = instance(seed, sites=4, items=4)
    flat = [item for items in sites for item in items]
    starts = np.cumsum([0, *[len(items) for items in sites[:-1]]])
    limits = bounds(sites, ("bytes", "seconds"), rng)
    rows = np.array([[i.bytes for i in flat], [i.seconds for i in flat]], dtype=float)
    relaxed = relax(
        np.array([i.loss for i in flat], dtype=float), rows, np.array([limits.bytes, limits.seconds], float), starts
    )
    assert (relaxed.reduced >= 0).all()
    for at, site in enumerate(sites):
        for i, item in enumerate(site):
            forced = [[item] if s == at else items for s, items in enumerate(sites)]
            best = by_cp_sat(forced, limits, [], "loss")
            if best is not None:
                assert relaxed.lowest + relaxed.reduced[starts[at] + i] <= best * (1 + 1e-9) + 1e-9


def test_no_sites_are_no_choice():
    assert select([], Limits(bytes=3)).picked == ()
