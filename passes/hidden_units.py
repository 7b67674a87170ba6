"""Hidden units cut out:  what makes them, what carries them and what reads them all shrink; the model stays dense.

    h = f(x U^T)    y = h W^T + b     becomes     h_K = f(x U_K^T)    y = h_K W'^T + b'       K: the units kept

A unit is a neuron of a feed-forward layer, a head of attention, or the heads that share a key
(fxcompress.passes.dependency finds them). Only W can make up for what is gone, so units are chosen in its metric. With
G the metric of W's inputs (fxcompress.core.metric says what it is), damped, and S the units removed,

    W' = W G[:, K] G[K, K]^-1      with error      tr(W_S C W_S^T),   C = G[S, S] - G[S, K] G[K, K]^-1 G[K, S]

the least-squares answer and its exact error, a Schur complement. The best S is a combinatorial question; it is found
greedily, one unit after the other, each time the one that adds least. With P = G[K, K]^-1 over what is left and W'
refitted to it, unit u (one column, or a block of them) adds

    tr(W'_u P_uu^-1 W'_u^T)       and then       W' -= W'_u P_uu^-1 P_u:      P -= P_:u P_uu^-1 P_u:

so the order of removal of all n columns costs n rank-one updates, about n^3 flops. Several consumers add their errors,
each relative to its own output. A bias b' absorbs the mean of what is lost, as everywhere.

A refit has as many unknowns as W, so a damping that suits thousands of tokens fits noise where there are hundreds.
Where inputs were held out, the damping of the last refit is the one of `DAMPINGS` that does best on them.

Papers: Hassibi & Stork, Second order derivatives for network pruning: Optimal Brain Surgeon, NeurIPS 1992, the step;
Kurtic, Frantar & Alistarh, ZipLM, NeurIPS 2023 (arXiv 2302.04089), the step for blocks of columns, with neurons and
heads as the blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, fx

from fxcompress.core.budget import Budget
from fxcompress.core.cost import Cost
from fxcompress.core.errors import SpecError
from fxcompress.core.metric import Metric, local_error, rounding_metric
from fxcompress.core.rewrite import Operand, Store, Structure
from fxcompress.core.site import Site, Use, use_cost
from fxcompress.passes.dependency import HiddenGroup, Span
from fxcompress.passes.low_rank import DAMPING, damped

# Of mean(diag G). Held-out error of MiniLM's feed-forward layers 0, 2, 4 at 75 % of their 1,536 neurons, calibrated on
# 128 sentences of SST-2 (2,825 tokens, some held out): 0.045, 0.056, 0.099 at 1e-4 and 0.032, 0.043, 0.075 at 1e-1;
# on 640 sentences (15,008 tokens) the two are within 1 % of each other.
DAMPINGS = (1e-6, 1e-3, 1e-2, 1e-1, 1.0)
STEPS = 8  # instances a site is offered: eighths of its units
ONE_BY_ONE = 2048  # units; a wider layer loses several at a step, as every step judges all that are left anew
COMPACT = 0.75  # of the columns held: below it the removed ones are dropped from the matrices


def order_of_removal(consumers: Sequence[Site], group: HiddenGroup, most: int | None = None) -> Tensor:
    """Unit numbers, the first to go first (most,) int64; by default all but the last one standing.

    Greedy, so the order of fewer is a prefix of the order of more. Deterministic.
    """
    states = [_Elimination(site, group.span_of(site)) for site in consumers]
    order: list[int] = []
    most = group.units - 1 if most is None else most
    while len(order) < most:
        added = torch.stack([state.added() for state in states]).sum(0)
        count = 1 + (group.units - len(order)) // ONE_BY_ONE
        for unit in added.argsort(stable=True)[: min(count, most - len(order))].tolist():
            for state in states:
                state.remove(unit)
            order.append(unit)
    return torch.tensor(order, dtype=torch.int64)


class _Elimination:
    """P = G^-1 and W' of one consumer, columns in the order of units, while units go one by one."""

    def __init__(self, site: Site, span: Span) -> None:
        by_unit = span.by_unit()
        at = by_unit.reshape(-1)
        metric = _damped(site, DAMPING)[at][:, at]
        self.units, self.block = by_unit.shape
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(metric))  # (n, n)
        self.weight = site.weight.double()[:, at].T.contiguous()  # (n, rows)
        self.signal = max(float((metric @ self.weight * self.weight).sum()), 1e-200)
        self.held = torch.arange(self.units)  # units whose columns are in the matrices
        self.alive = torch.ones(self.units, dtype=torch.bool)  # of the held ones, those not removed

    def added(self) -> Tensor:
        """Squared relative error that the removal of each unit adds (units,); infinite for those gone already."""
        count = len(self.held)
        inverse = self.inverse.view(count, self.block, count, self.block).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        weight = self.weight.view(count, self.block, -1)
        errors = torch.linalg.solve(inverse, weight @ weight.mT).diagonal(dim1=1, dim2=2).sum(1) / self.signal
        errors[~self.alive] = torch.inf
        return torch.full((self.units,), torch.inf, dtype=torch.float64).index_copy(0, self.held, errors)

    def remove(self, unit: int) -> None:
        place = int((self.held == unit).nonzero())
        mine = slice(place * self.block, (place + 1) * self.block)
        column, pivot = self.inverse[:, mine].clone(), self.inverse[mine, mine].clone()
        self.weight.addmm_(column, torch.linalg.solve(pivot, self.weight[mine]), alpha=-1)
        self.inverse.addmm_(column, torch.linalg.solve(pivot, column.T), alpha=-1)
        self.weight[mine], self.inverse[mine], self.inverse[:, mine] = 0, 0, 0  # as they are, up to rounding
        self.inverse[mine, mine] = torch.eye(self.block, dtype=torch.float64)  # so that `added` can solve
        self.alive[place] = False
        if int(self.alive.sum()) < COMPACT * len(self.held):
            self._compact()

    def _compact(self) -> None:
        left = self.alive.repeat_interleave(self.block)
        self.inverse, self.weight = self.inverse[left][:, left].contiguous(), self.weight[left]
        self.held, self.alive = self.held[self.alive], self.alive[self.alive]


def refit(site: Site, span: Span, kept: Tensor) -> Tensor:
    """W' (rows, columns) float64 of a consumer that reads the units `kept` alone: zero at the others' columns."""
    if site.statistics.check is None:
        return _refit(site, span, kept, DAMPING)
    return min((_refit(site, span, kept, share) for share in DAMPINGS), key=functools.partial(local_error, site))


def _refit(site: Site, span: Span, kept: Tensor, damping: float) -> Tensor:
    at, weight, metric = span.positions(kept), site.weight.double(), _damped(site, damping)
    chol, failed = torch.linalg.cholesky_ex(metric[at][:, at])
    if int(failed):  # moments summed in float32 need not be positive
        return _refit(site, span, kept, 10 * damping)
    answer = torch.cholesky_solve(metric[at] @ weight.T, chol)  # (kept, rows)
    return torch.zeros_like(weight).index_copy(1, at, answer.T)


def _damped(site: Site, share: float) -> Tensor:
    metric = rounding_metric(site).columns
    return torch.eye(site.columns, dtype=torch.float64) if metric is None else damped(metric, share)


def units_left(order: Tensor, units: int, kept: int) -> Tensor:
    """The units (kept,) that an order of removal leaves, ascending."""
    alive = torch.ones(units, dtype=torch.bool)
    alive[order[: units - kept]] = False
    return alive.nonzero().squeeze(1)


@dataclass(frozen=True, eq=False)
class Role:
    """What a site has to do with a group of hidden units."""

    group: HiddenGroup
    makes: bool  # its rows make the units; otherwise its columns read them
    order: Callable[[], Tensor]  # `order_of_removal` of the group, the same at each of its sites; may be slow once
    loose: int = 0  # bytes one unit fills in stored tensors that are no site's weight and count as this site's


NO_UNITS = "it neither makes nor reads hidden units that can be cut"


@dataclass(frozen=True, eq=False)
class HiddenSite(Site):
    """A site that makes or reads hidden units."""

    role: Role | None = None
    why: str = NO_UNITS  # it has no role


@dataclass(frozen=True)
class HiddenUnits(Structure):
    """One weight of a group that keeps `kept` units. All sites of the group must be given the same."""

    name: ClassVar[str] = "hidden_units"
    paper: ClassVar[str] = "arXiv 2302.04089"
    joint: ClassVar[bool] = True  # who makes the units loses nothing, who reads them pays

    kept: int | float  # a share of the group's units where it is no whole number

    def __post_init__(self) -> None:
        whole = isinstance(self.kept, int) and not isinstance(self.kept, bool) and self.kept >= 1
        if not whole and not (isinstance(self.kept, float) and 0 < self.kept <= 1):
            raise SpecError(
                f"hidden_units kept={self.kept!r} must be a whole number of at least 1, or a share of the units above "
                "0 and up to 1."
            )

    def count(self, group: HiddenGroup) -> int:
        """How many units of `group` that is. Raises `SpecError` where it has fewer."""
        if isinstance(self.kept, float):
            return max(1, int(self.kept * group.units))
        if self.kept > group.units:
            raise SpecError(
                f"hidden_units{{kept={self.kept}}} at {group.name}: it reads {group.units} units of {group.width} "
                f"columns, so kept must be 1 to {group.units}."
            )
        return self.kept

    def at(self, site: Site) -> Self:
        return type(self)(self.count(_role(site).group))

    def check(self, site: Site) -> None:
        self.count(_role(site).group)

    @classmethod
    def refuses(cls, site: Site) -> str | None:
        if why := cls.unserved(site):
            return why
        if not isinstance(site, HiddenSite):
            return NO_UNITS
        return site.why if site.role is None else None

    @classmethod
    def unasked(cls, site: Site, budget: Budget) -> str | None:
        if budget.flops is not None or budget.latency is not None:
            return None
        return "for bytes alone quantized weights lose less; it is weighed where flops or time are bounded, or by name"

    @classmethod
    def space(cls, site: Site) -> Iterator[Self]:
        """Even steps, from one of them to all but one."""
        units = _role(site).group.units
        yield from (cls(kept) for kept in sorted({units * i // STEPS for i in range(1, STEPS)} - {0}))

    def matrices(self, site: Site) -> dict[str, tuple[int, int]]:
        role = _role(site)
        span = role.group.span_of(site)
        small = span.size // span.units * self.count(role.group)
        return {"weight": (small, site.columns) if role.makes else (site.rows, small)}

    def kept_rows(self, site: Site) -> Tensor | None:
        return self._positions(site) if _role(site).makes else None

    def freed_bytes(self, site: Site) -> int:
        role = _role(site)
        return role.loose * (role.group.units - self.count(role.group))

    def factor(self, site: Site, store: Store) -> None:
        role, at, metric = _role(site), self._positions(site), rounding_metric(site)
        if role.makes:
            store("weight", site.weight[at], Metric(metric.columns))
            return
        weight = site.analysis(_Refitted(self.count(role.group)))
        store("weight", weight, Metric(None if metric.columns is None else metric.columns[at][:, at], metric.rows))

    def dense(self, factors: Mapping[str, Tensor], site: Site) -> Tensor:
        """At a consumer zero where nothing is read. At a producer the old rows where nothing is made: nobody will see
        them, so that the error is that of storing the others."""
        weight, at = factors["weight"], self._positions(site)
        if _role(site).makes:
            return site.weight.to(weight.dtype).index_copy(0, at, weight)
        return weight.new_zeros(site.rows, site.columns).index_copy(1, at, weight)

    def emit(self, graph: fx.Graph, use: Use, operands: Mapping[str, Operand], bias: fx.Node | None) -> fx.Node:
        """The same product of smaller tensors; fxcompress.core.resize does what lies between the sites."""
        args = (use.x, operands["weight"].read())
        return graph.call_function(torch.ops.aten.linear.default, (*args, bias) if bias is not None else args)

    def cost(self, use: Use, rows: int, columns: int, weight_bytes: int, itemsize: int) -> Cost:
        return use_cost(use, rows, columns, weight_bytes, itemsize)

    def cost_at(self, site: Site, use: Use, weight_bytes: int, itemsize: int) -> Cost:
        """A product of the size that is left."""
        return self.cost(use, *self.matrices(site)["weight"], weight_bytes, itemsize)

    def units(self, site: Site) -> Tensor:
        """Those that stay (kept,), ascending."""
        role = _role(site)
        return units_left(role.order(), role.group.units, self.count(role.group))

    def _positions(self, site: Site) -> Tensor:
        return _role(site).group.span_of(site).positions(self.units(site))


@dataclass(frozen=True)
class _Refitted:
    """The columns that are left of a consumer (rows, columns left); made once a site, every storage rounds the same."""

    kept: int

    def __call__(self, site: Site) -> Tensor:
        units, span = HiddenUnits(self.kept).units(site), _role(site).group.span_of(site)
        return refit(site, span, units)[:, span.positions(units)].to(site.weight.dtype)


def _role(site: Site) -> Role:
    if not isinstance(site, HiddenSite) or site.role is None:
        raise SpecError(f"hidden_units at {site.name}: {HiddenUnits.refuses(site)}.")
    return site.role
