"""The Pareto front of a plan: exact, without dominated points, with ends that nothing goes beyond."""

import itertools
import random

import pytest

from fxcompress import Budget, Plan
from fxcompress.core.plan import KEEP, Candidate, SiteInfo
from fxcompress.core.workload import Workload
from fxcompress.cost_model.pareto import ParetoPoint, front, pareto
from fxcompress.cost_model.select import choose


def table(seed, sites=3, priced=True):
    """Whole bytes and milliseconds; nothing is slower than keep, so that every choice is allowed."""
    rng = random.Random(seed)
    candidates = []
    for s in range(sites):
        candidates.append(Candidate(f"s{s}", KEEP, 1000, 1.0, 0.0, 0.0, (9.0,) if priced else ()))
        for i in range(5):
            loss, seconds = rng.randint(1, 99) / 100, (float(rng.randint(1, 9)),) if priced else ()
            candidates.append(Candidate(f"s{s}", f"r{i}", rng.randint(50, 900), 1.0, loss**0.5, loss, seconds))
    names = tuple(SiteInfo(f"s{s}", "linear", 10, 10) for s in range(sites))
    timed = ((Workload("w", 1, 1),), (3.0,), (50.0,), "eager") if priced else ((), (), (), "")
    return Plan(
        names, (), tuple(candidates), (), (), Budget("1x"), 1000 * sites, 0, "relative", True, 0.0, *timed
    )


def key(point):
    return point.bytes, point.seconds or 0.0, point.error


def every_choice(plan):
    groups = [[c for c in plan.candidates if c.site == s.name] for s in plan.sites]
    for chosen in itertools.product(*groups):
        seconds = sum(c.seconds[0] for c in chosen) + 3.0 if plan.workload else 0.0
        yield sum(c.bytes for c in chosen), seconds, sum(c.loss for c in chosen) ** 0.5


def beats(a, b):
    return all(x <= y + 1e-9 for x, y in zip(a, b)) and any(x < y - 1e-9 for x, y in zip(a, b))


@pytest.mark.parametrize("priced", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_no_choice_of_all_there_are_beats_a_point(seed, priced):
    plan = table(seed, priced=priced)
    points = pareto(plan, sizes=8, latencies=3)
    choices = list(every_choice(plan))
    for point in points:
        # The fastest of a bound is the best within a thousandth of its seconds; whole seconds leave nothing between.
        assert not any(beats(choice, key(point)) for choice in choices), point.plan.budget


@pytest.mark.parametrize("seed", range(6))
def test_points_are_what_their_plans_are_predicted_to_be_and_none_beats_another(seed):
    plan = table(seed)
    points = pareto(plan)
    assert len(points) > 5
    assert [key(p) for p in points] == sorted(key(p) for p in points)
    for point in points:
        assert key(point) == (point.plan.predicted_bytes, point.plan.latency, point.plan.predicted_error)
        assert not any(beats(key(other), key(point)) for other in points)
        again = choose(plan, point.plan.budget)
        assert (again.predicted_bytes, again.predicted_error) == (point.bytes, point.error)


def test_the_ends_are_the_smallest_the_fastest_and_the_model_as_it_is():
    plan = table(0)
    points, choices = pareto(plan), list(every_choice(plan))
    assert min(p.bytes for p in points) == min(c[0] for c in choices)
    assert min(p.seconds for p in points) == min(c[1] for c in choices)
    assert [p.plan.spec_of("s0") for p in points if p.error == 0.0] == [KEEP]


def test_a_plan_makes_its_own_front():
    plan = table(1)
    assert plan.pareto(sizes=5, latencies=2) == pareto(plan, 5, 2)


def test_a_finer_grid_finds_more():
    plan = table(2, sites=6)
    assert len(pareto(plan, sizes=20)) > len(pareto(plan, sizes=5)) > 3


def test_dominated_points_are_dropped_and_of_equal_ones_the_first_stays():
    plan = table(0)
    points = [ParetoPoint(*at, plan) for at in [(2, 2.0, 0.2), (1, 3.0, 0.2), (2, 2.0, 0.2), (3, 2.0, 0.3)]]
    assert front(points) == [points[1], points[0]]
    assert front([]) == []
