"""Exchanges: what they find keeps every bound and is as near the lower bound as was asked."""

import numpy as np
import pytest

from fxcompress.cost_model import knapsack
from fxcompress.cost_model.exchange import exchange
from fxcompress.cost_model.knapsack import GAP_OF_MANY, Item, Limits, select
from fxcompress.cost_model.relaxation import relax

SITES, ITEMS, NEAR = 1000, 21, 1e-4


def instance(seed):
    """Whole bytes, flops and seconds below 2^24, so that sums are exact; losses that fall with bytes and flops."""
    rng = np.random.default_rng(seed)
    size, kappa = 10 ** rng.uniform(3, 5.5, (SITES, 1)), 10 ** rng.uniform(-4, 0, (SITES, 1))
    bits, work = rng.uniform(1.5, 16, (SITES, ITEMS)), rng.uniform(0.1, 1, (SITES, ITEMS))
    loss = kappa * (4**-bits * rng.uniform(0.5, 2, bits.shape) + 1e-3 * (1 - work))
    axes = (size * bits).round(), loss, (size * work).round(), (size * work * rng.uniform(0.3, 1, work.shape)).round()
    values = np.stack(axes, axis=-1)
    low, high = values.min(1).sum(0), values.max(1).sum(0)
    bounds = (low + rng.uniform(0.25, 0.5, 4) * (high - low)).round()
    return values, bounds


def flat(values):
    """-> (loss, the other axes, site, starts)."""
    items = values.reshape(-1, 4)
    return items[:, 1], items[:, [0, 2, 3]].T, np.repeat(np.arange(SITES), ITEMS), np.arange(SITES) * ITEMS


@pytest.mark.parametrize("seed", range(4))
def test_the_choice_keeps_every_bound_and_is_near_the_lower_bound(seed):
    values, limits = instance(seed)
    cost, rows, site, starts = flat(values)
    bounds = limits[[0, 2, 3]]
    scaled, ones = rows / bounds[:, None], np.ones(3)
    cost = cost / np.median(cost)
    relaxed = relax(cost, scaled, ones, starts)
    chosen = exchange(relaxed, scaled, ones, site, NEAR * relaxed.lowest)
    assert chosen is not None
    assert site[chosen].tolist() == list(range(SITES))
    # Sums of 1,000 quotients are exact to 1,000 roundings; whole sums below 2^53 to none.
    assert (rows[:, chosen].sum(1) <= bounds * (1 + 1000 * np.finfo(float).eps)).all()
    assert relaxed.lowest <= cost[chosen].sum() <= relaxed.lowest * (1 + NEAR)


def test_choices_that_the_bound_was_made_of_do_not_keep_the_bounds_above():
    values, limits = instance(0)
    cost, rows, _, starts = flat(values)
    relaxed = relax(cost, rows / limits[[0, 2, 3], None], np.ones(3), starts)
    assert not any((rows[:, one].sum(1) <= limits[[0, 2, 3]]).all() and
                   cost[one].sum() <= relaxed.lowest * (1 + NEAR) for one in relaxed.picked)  # fmt: skip


def test_nothing_is_returned_where_nothing_comes_near():
    values = np.array([[[3.0, 1.0], [1.0, 2.0]]] * 2)  # two sites of (bytes, loss); 5 bytes leave one of 6 unused
    cost, rows = values[..., 1].ravel(), values[..., 0].reshape(1, -1)
    relaxed = relax(cost, rows, np.array([5.0]), np.array([0, 2]))
    site = np.array([0, 0, 1, 1])
    assert relaxed.lowest == pytest.approx(2.5)
    assert exchange(relaxed, rows, np.array([5.0]), site, 0.49) is None  # the best costs 3
    found = exchange(relaxed, rows, np.array([5.0]), site, 0.51)
    assert found is not None
    assert cost[found].sum() == 3.0


def test_many_items_are_settled_without_a_search_and_always_alike(monkeypatch):
    def unexpected(*_):
        raise AssertionError("HiGHS was asked")

    monkeypatch.setattr(knapsack, "_solve", unexpected)
    monkeypatch.setattr(knapsack, "MANY", 0)
    values, limits = instance(1)
    sites = [[Item(*row) for row in site] for site in values.tolist()]
    bounds = Limits(bytes=limits[0], flops=limits[2], seconds=limits[3])
    first, again = select(sites, bounds), select(sites, bounds)
    assert first == again
    assert first.gap <= GAP_OF_MANY
