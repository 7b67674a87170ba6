"""Choices next to a lower bound, by exchanging the items of two sites at a time.

With the multipliers m of the bound L(m) and its reduced costs r (fxcompress.cost_model.relaxation), a choice x costs

    c . x = L(m) + r . x + m . s,        s = b - A x  what it leaves of the bounds,  s >= 0 where it meets them

so its distance from the bound, and at most that from the best, is the L1 norm of a point in a few dimensions, (m_1 s_1,
..., m_k s_k, r . x). Another item at site i moves the point by p_i, whatever the other sites do: the best two exchanges
bring it nearest to zero, and a k-d tree of all p finds -(point + p_i) its nearest p_j, for every i at once. Millions of
pairs are weighed in tens of milliseconds: some large steps use the bounds up nearly, then a pair of small ones fits.

Nothing is promised: of the first 111 instances of benchmarks/solver.py (2,000 sites of 60 items) 109 come within 1e-4
of the bound. Where no choice comes near enough, the caller looks elsewhere.

Bentley, Multidimensional binary search trees used for associative searching, Communications of the ACM 1975.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import KDTree

from fxcompress.cost_model.relaxation import Relaxation

MOVES = 4000  # those of least reduced cost: 2,000 leave more instances unsettled, 8,000 mostly take over twice as long
NEIGHBOURS = 12  # of which one in 2^bounds overshoots none
# What goes into reduced costs is not got back, while what is left of bounds can be used up later.
LOST = 3.0
ROUNDS, STARTS = 20, 2


def exchange(
    relaxed: Relaxation, rows: np.ndarray, bounds: np.ndarray, site: np.ndarray, near: float
) -> np.ndarray | None:
    """(sites,) a choice that keeps every bound and costs at most `near` above `relaxed.lowest`; None where none is met.

    rows (bounds, items), site (items,): which site's item each is.
    """
    # Choices that the bound was made of: of those, little lost and little to make up for.
    starts = sorted(relaxed.picked, key=lambda one: float(_weighed(_point(relaxed, rows, bounds, one))))
    tried = (_descend(one, relaxed, rows, bounds, site, near) for one in starts[:STARTS])
    return next((chosen for chosen in tried if chosen is not None), None)


def _descend(
    chosen: np.ndarray, relaxed: Relaxation, rows: np.ndarray, bounds: np.ndarray, site: np.ndarray, near: float
) -> np.ndarray | None:
    """Two exchanges a round, until a choice is near enough or none is nearer than the last."""
    for _ in range(ROUNDS):
        point = _point(relaxed, rows, bounds, chosen)
        if (bounds >= rows[:, chosen].sum(1)).all() and np.abs(point).sum() <= near:
            return chosen
        moves = _moves(relaxed.reduced - relaxed.reduced[chosen][site], chosen)
        lost = relaxed.reduced[moves] - relaxed.reduced[chosen][site[moves]]
        used = rows[:, moves] - rows[:, chosen][:, site[moves]]  # (bounds, moves)
        steps = np.column_stack([(-relaxed.multipliers[:, None] * used).T, lost])  # (moves, bounds + 1)
        scale = np.array([*np.ones(len(bounds)), LOST])
        nearest = list(range(1, min(NEIGHBOURS, len(moves)) + 1))
        _, second = KDTree(steps * scale).query(-(point + steps) * scale, k=nearest, p=1)
        first = np.broadcast_to(np.arange(len(moves))[:, None], second.shape)
        reached = point + steps[first] + steps[second]  # (moves, neighbours, bounds + 1)
        stays = (moves == chosen[0])[:, None]
        apart = (site[moves[first]] != site[moves[second]]) | stays | stays[second, 0]
        fits = apart & ((bounds - rows[:, chosen].sum(1))[:, None, None] >= used[:, first] + used[:, second]).all(0)
        costs = np.where(fits, np.abs(reached).sum(-1), np.inf)
        if costs.min() > near:
            costs = np.where(apart, _weighed(reached), np.inf)
            if costs.min() >= _weighed(point):
                return None
        at = int(costs.argmin())
        chosen = chosen.copy()
        for move in moves[[first.flat[at], second.flat[at]]]:
            if move != chosen[0]:
                chosen[site[move]] = move
    return None


def _point(relaxed: Relaxation, rows: np.ndarray, bounds: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """(bounds + 1,) what the choice leaves of each bound, and what it adds in reduced costs, all as cost."""
    left = relaxed.multipliers * (bounds - rows[:, chosen].sum(1))
    return np.array([*left, relaxed.reduced[chosen].sum()])


def _weighed(points: np.ndarray) -> np.ndarray:
    """points (..., bounds + 1)."""
    return np.asarray(np.abs(points[..., :-1]).sum(-1) + LOST * np.abs(points[..., -1]))


def _moves(lost: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The items that lose least, after the first site's own: to leave everything as it is."""
    others = np.argsort(lost, kind="stable")[: MOVES + len(chosen)]
    return np.concatenate([chosen[:1], others[~np.isin(others, chosen)][:MOVES]])
