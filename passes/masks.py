"""Which weights to drop, and what to make of the rest:  W (rows, columns)  ->  W' with zeros where the pattern has them

A `Pattern` keeps a fixed number of units of every group of columns, so that every row keeps as many weights as every
other and the kept ones are one matrix (rows, kept). With G the metric of the site's inputs (fxcompress.core.metric):

    magnitude   the largest |W_ij|                       kept as they are
    wanda       the largest |W_ij| sqrt(G_jj)            kept as they are; row by row (Sun et al., arXiv 2306.11695)
    sparsegpt   the largest W_ij^2 / [G^-1]_jj           the others make up for what is lost (arXiv 2301.00774)

W_ij^2 / [G^-1]_jj is what dropping W_ij alone costs once all others of its row have moved to their best (optimal brain
surgeon). `sparsegpt` here takes three steps:

1. pick    by the cost above over whole groups: how many each stretch of 128 columns keeps, row by row. (The paper gives
           every stretch the same share; at 50 % on MiniLM's linear weights this loses 3 % less, in squared error.)
2. sweep   columns left to right, U the upper Cholesky factor of G^-1 (G = (U^T U)^-1): a stretch chooses anew by
           W_ij^2 / U_jj^2 when it is reached, and what column j loses is spread over those to come,
           W_k -= (W_j / U_jj) U_jk.
3. refit   the kept weights of each row to their least-squares values, min tr((W' - W) G (W' - W)^T) on the support
           found, by conjugate gradients: the sweep could not move columns it had passed.

Rows never interact, except in tiles. Without a metric G = I: all three drop the smallest weights, nothing else moves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fxcompress.core.errors import SpecError
from fxcompress.core.metric import Metric, rounding_metric, row_errors
from fxcompress.core.sample import Sample, draw, enough
from fxcompress.core.site import Site
from fxcompress.passes import rounding

CRITERIA = ("magnitude", "wanda", "sparsegpt")
STRETCH = 128  # columns that choose together in a sweep
REFIT_STEPS = 10  # 20 lower the squared error by less than a hundredth of itself
ROW_CHUNK = 8192  # rows worked on at once, about: bounds memory on a vocabulary
SAMPLE_ROWS = 64  # what `error_bound` looks at
SURE = 0.8  # of what `Told` tells
OFFERED = (0.75, 0.5, 0.25)  # sparsities tried everywhere


@dataclass(frozen=True)
class Pattern:
    """Of every `group` columns (0: the whole row), the units of `tile` x `tile` weights that stay: `kept` of them."""

    kept: int
    group: int = 0
    tile: int = 1

    def pick(self, cost: Tensor) -> Tensor:
        """cost (columns, rows) of losing each weight, a root -> keep (columns, rows) bool."""
        units = self._units(cost)  # (units, unit rows)
        groups = torch.unflatten(units, 0, (-1, self.group // self.tile if self.group else len(units)))
        return self._spread(_largest(groups, torch.full_like(groups[:, 0], self.kept, dtype=torch.long)).flatten(0, 1))

    def pick_again(self, cost: Tensor, keep: Tensor) -> Tensor:
        """As many units of these columns as `keep` has (same shape), by `cost`."""
        counts = keep[:: self.tile, :: self.tile].sum(0, keepdim=True)  # (1, unit rows)
        return self._spread(_largest(self._units(cost).unsqueeze(0), counts)[0])

    def all_but_a_quarter(self, columns: int) -> Pattern:
        """The pattern of the same tiles that drops a quarter of every row, anywhere in it."""
        return Pattern(kept_of(columns // self.tile, 0.25), tile=self.tile)

    def stretch(self, columns: int) -> int:
        """How many columns choose together in a sweep: whole units, no more than a group."""
        group = self.group or columns
        return group if group <= STRETCH else max(1, STRETCH // self.tile) * self.tile

    def _units(self, cost: Tensor) -> Tensor:
        if self.tile == 1:
            return cost
        tiles = torch.unflatten(torch.unflatten(cost.square(), 1, (-1, self.tile)), 0, (-1, self.tile))
        return tiles.sum((1, 3))

    def _spread(self, units: Tensor) -> Tensor:
        if self.tile == 1:
            return units
        return units.repeat_interleave(self.tile, 0).repeat_interleave(self.tile, 1)


def _largest(cost: Tensor, counts: Tensor) -> Tensor:
    """cost (groups, units, rows), counts (groups, rows) -> which are the `counts` largest; equal ones from the left."""
    order = cost.transpose(1, 2).contiguous().argsort(dim=2, descending=True, stable=True)  # (groups, rows, units)
    first = torch.arange(order.shape[2]) < counts.unsqueeze(2)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(2, order, first).transpose(1, 2).contiguous()


class Pruned(NamedTuple):
    """keep (rows, columns) bool, as many in every row; values (rows, kept) float32, each row's from left to right."""

    keep: Tensor
    values: Tensor

    def dense(self) -> Tensor:
        """W' (rows, columns) float32."""
        return torch.zeros(self.keep.shape).masked_scatter_(self.keep, self.values)


class Curvature(NamedTuple):
    """G damped, U, and diag G^-1, all in a unit that makes mean(diag G) 1; float32."""

    damped: Tensor  # (columns, columns)
    upper: Tensor  # (columns, columns)
    inverse: Tensor  # (columns,)


def curvature(metric: Metric) -> Curvature:
    """Factor G once for every pattern: G = R R^T with R upper, so U = R^-1."""
    assert metric.columns is not None
    g, r = rounding.factored(metric, torch.arange(len(metric.columns)))
    u = _inverted(r)
    return Curvature(g, u, torch.linalg.vector_norm(u, dim=0).square())


def _inverted(r: Tensor) -> Tensor:
    """R^-1 of an upper triangular R, by halves: a third of the work of solving for the identity."""
    if len(r) <= STRETCH:
        found: Tensor = torch.linalg.solve_triangular(r, torch.eye(len(r), dtype=r.dtype), upper=True)
        return found
    half, found = len(r) // 2, torch.zeros_like(r)
    found[:half, :half], found[half:, half:] = _inverted(r[:half, :half]), _inverted(r[half:, half:])
    found[:half, half:] = found[:half, :half] @ r[:half, half:] @ -found[half:, half:]
    return found


@dataclass(frozen=True)
class Projection:
    """A site's weight -> `Pruned`; equal ones are one analysis of a site."""

    pattern: Pattern
    by: str

    def __call__(self, site: Site) -> Pruned:
        return prune(site.weight, rounding_metric(site), self.pattern, self.by)


def prune(weight: Tensor, metric: Metric, pattern: Pattern, by: str) -> Pruned:
    """W (rows, columns) of any floating dtype, whose sizes the pattern divides, by one of CRITERIA."""
    parts = []
    chunk = max(1, ROW_CHUNK // pattern.tile) * pattern.tile
    importance = torch.ones(len(weight)) if metric.rows is None or pattern.tile == 1 else metric.rows.sqrt().float()
    largest = float(weight.abs().max()) or 1.0  # so that squares stay in range
    for part, p in zip(torch.split(weight, chunk), torch.split(importance, chunk)):
        x = (part.float() / largest).T.contiguous()
        y, keep = _prune(x, metric, pattern, by, p)
        keep = keep.T.contiguous()
        values = y.T.masked_select(keep).reshape(len(part), -1) * largest
        # The refit may grow a weight past what float16 holds; values are float32.
        limit = min(torch.finfo(weight.dtype).max, torch.finfo(values.dtype).max)
        parts.append(Pruned(keep, values.clamp(-limit, limit)))
    return Pruned(*(torch.cat(t) for t in zip(*parts)))


def _prune(x: Tensor, metric: Metric, pattern: Pattern, by: str, root_p: Tensor) -> tuple[Tensor, Tensor]:
    """X = W^T (columns, rows), where a column of all rows is contiguous -> W'^T, keep."""
    curve = metric.analysis(curvature) if by == "sparsegpt" else None
    if curve is not None:
        first = pattern.pick(x.abs() / curve.inverse.sqrt().unsqueeze(1) * root_p)
        swept, keep = _sweep(x, first, pattern, curve.upper, root_p)
        return _refit(x, swept, keep, curve.damped), keep
    cost = x.abs() * root_p
    if by == "wanda" and metric.columns is not None:
        cost = cost * metric.columns.diagonal().clamp_min(0).sqrt().float().unsqueeze(1)
    keep = pattern.pick(cost)
    return x * keep, keep


def _sweep(x: Tensor, first: Tensor, pattern: Pattern, u: Tensor, root_p: Tensor) -> tuple[Tensor, Tensor]:
    """Step 2. What is lost is spread at once within a block of stretches, over the rest when the block is done."""
    columns, rows = x.shape
    w, keep, diagonal = x.clone(), first.clone(), u.diagonal().unsqueeze(1)
    stretch = pattern.stretch(columns)
    block = max(1, STRETCH // stretch) * stretch
    for a in range(0, columns, block):
        b = min(a + block, columns)
        errors, own = torch.empty(b - a, rows), u[a:b, a:b].contiguous()
        for start in range(a, b, stretch):
            mine = slice(start, min(start + stretch, b))
            keep[mine] = pattern.pick_again(w[mine].abs() / diagonal[mine] * root_p, first[mine])
            times = ~keep[mine] / diagonal[mine]
            columns_of = zip(w[mine].unbind(), times.unbind(), errors[start - a : mine.stop - a].unbind())
            for i, (wj, times_j, error) in enumerate(columns_of, start - a + 1):
                torch.mul(wj, times_j, out=error)
                w[a + i : b].addr_(own[i - 1, i:], error, alpha=-1)
            w[mine] *= keep[mine]
        w[b:].addmm_(u[a:b, b:].T, errors, alpha=-1)
    return w, keep


def _refit(x: Tensor, start: Tensor, keep: Tensor, damped: Tensor) -> Tensor:
    """Step 3: conjugate gradients on the kept weights, every row its own system, G_jj as preconditioner."""
    diagonal, tiny = damped.diagonal().unsqueeze(1), torch.finfo(torch.float32).tiny
    y = start.clone()
    residual = (damped @ (x - y)).mul_(keep)
    scaled = residual / diagonal
    direction, size = scaled.clone(), (residual * scaled).sum(0)
    for _ in range(REFIT_STEPS):
        curved = (damped @ direction).mul_(keep)
        step = size / (direction * curved).sum(0).clamp_min(tiny)
        y.addcmul_(direction, step)
        residual.addcmul_(curved, step, value=-1)
        scaled = residual / diagonal
        before, size = size, (residual * scaled).sum(0)
        direction = direction.mul_(size / before.clamp_min(tiny)).add_(scaled)
    return y


@dataclass(frozen=True)
class Bound:
    """The error of a projection, looked at from below; equal ones are one analysis of a site."""

    projection: Projection

    def __call__(self, site: Site) -> float:
        return error_bound(site, self.projection)


def error_bound(site: Site, projection: Projection) -> float:
    """The error of `projection` at the site, as `local_error` judges it, told from a few rows, low.

    Rows do not interact, and each loses much the same share of what losing all its weights one by one would cost,
    c_r = p_r sum_j W_rj^2 / [G^-1]_jj. SAMPLE_ROWS of them, drawn by c_r, tell the whole, less three standard errors.
    Exact where a weight has no more rows than that.
    """
    tile = projection.pattern.tile
    costs = site.analysis(_row_costs).reshape(-1, tile).sum(1)  # of each unit row
    if float(costs.sum()) <= 0:
        return 0.0
    sample, rows = _sample(site, costs, tile)
    lost = row_errors(site, rows, _rows_pruned(site, projection, rows)).reshape(-1, tile).sum(1)
    return max(0.0, sample.total(lost) - 3 * sample.standard_error(lost))


def some_pruned(site: Site, projection: Projection, rows: Tensor) -> Tensor:
    """Some rows (n,) of the site's weight under `projection`, (n, columns) float32. Others of their tiles are all that
    they depend on."""
    tile = projection.pattern.tile
    units, at = torch.unique(rows // tile, return_inverse=True)
    return _rows_pruned(site, projection, _rows_of(units, tile))[at * tile + rows % tile]


def _rows_pruned(site: Site, projection: Projection, rows: Tensor) -> Tensor:
    """Rows of whole tiles."""
    metric = rounding_metric(site)
    mine = replace(metric, rows=None if metric.rows is None else metric.rows[rows])  # with all that is known of G
    return prune(site.weight[rows], mine, projection.pattern, projection.by).dense()


@dataclass(frozen=True)
class Told:
    """Lower bound on the error of a projection by SparseGPT, from what a quarter of every row loses; an analysis of a
    site.

    Beside the sum of what the same weights would cost if each were dropped alone, many lose more than few: the fewer
    are left, the less they make up. Of the weights of MiniLM, a BERT, two grokked networks, stories260K and vit_mnist
    3/8, 1/2 and 3/4 lose at least .97, .99 and 1.07 times as much as that says, 2 of 4 at least .91 times; of one of
    two values alone 2 of 4 lose .81 times.
    """

    projection: Projection

    def __call__(self, site: Site) -> float:
        pattern = self.projection.pattern
        quarter = pattern.all_but_a_quarter(site.columns)
        if self.projection.by != "sparsegpt" or pattern == quarter:
            return 0.0
        alone = site.analysis(DroppedAlone(quarter))
        known = site.analysis(Bound(Projection(quarter, "sparsegpt")))
        return SURE * known * site.analysis(DroppedAlone(pattern)) / alone if alone > 0 else 0.0


@dataclass(frozen=True)
class DroppedAlone:
    """What the weights a pattern drops would cost if each were dropped alone, up to a factor, told from the rows that
    `error_bound` looks at; an analysis of a site."""

    pattern: Pattern

    def __call__(self, site: Site) -> float:
        costs, tile = site.analysis(_row_costs), self.pattern.tile
        sample, rows = _sample(site, costs.reshape(-1, tile).sum(1), tile)
        curve, p = rounding_metric(site).analysis(curvature), rounding_metric(site).rows
        roots = site.weight[rows].float().T.contiguous()
        if curve is not None:
            roots = roots / curve.inverse.sqrt().unsqueeze(1)
        if p is not None:
            roots = roots * p[rows].sqrt().float()
        dropped = (roots.square() * ~self.pattern.pick(roots.abs())).sum(0, dtype=torch.float64)
        return sample.total(dropped.reshape(-1, tile).sum(1))


def _sample(site: Site, costs: Tensor, tile: int) -> tuple[Sample, Tensor]:
    """Unit rows of `tile` rows each, drawn by their costs, and their rows."""
    sample = draw(costs, max(4, enough(SAMPLE_ROWS, site.columns) // tile))
    return sample, _rows_of(sample.rows, tile)


def _rows_of(units: Tensor, tile: int) -> Tensor:
    """The rows of some rows of tiles."""
    return (units.unsqueeze(1) * tile + torch.arange(tile)).flatten()


def _row_costs(site: Site) -> Tensor:
    """c_r, what the weights of each row would cost if each were dropped alone, up to a factor, (rows,) float64."""
    metric = rounding_metric(site)
    curve, squares = metric.analysis(curvature), site.weight.double().square()
    costs = squares.sum(1) if curve is None else squares @ curve.inverse.double().reciprocal()
    return costs if metric.rows is None else costs * metric.rows


def kept_of(columns: int, sparsity: float) -> int:
    """How many of `columns` units a sparsity leaves."""
    return columns - round(sparsity * columns)


def sparsities(units: Tensor) -> list[float]:
    """Shares to drop of each row of `units` (unit rows, units), True where a unit is not all zeros; cheapest first.

    The fixed ones, and the weight's own: what every row can drop without losing anything.
    """
    columns = units.shape[1]
    own = 1 - int(units.sum(1).max()) / columns
    by_count = {kept_of(columns, s): s for s in (own, *OFFERED)}
    return [by_count[kept] for kept in sorted(by_count) if 0 < kept < columns]


def check_share(name: str, sparsity: float) -> None:
    """Raise `SpecError` unless `sparsity` is a share between 0 and 1."""
    if not isinstance(sparsity, int | float) or isinstance(sparsity, bool) or not 0 < sparsity < 1:
        raise SpecError(f"{name} sparsity={sparsity!r} must be the share of weights to drop, between 0 and 1.")
