"""Rounding a matrix W (rows, columns) to a grouped grid so that tr(D G D^T), D = W - W', is small.

    w' = s (q - z),   q in 0 .. 2^bits - 1,   s and z one for a group of a row (fxcompress.passes.grid)

1. `fit`       s and z of each group by search and Lloyd steps, minimising sum_j G_jj D_j^2; snapped as they are stored.
2. `feed_back` columns in order of falling G_jj; each column's rounding error is spread over the columns still to come,
               W_k += (W_j - W'_j) R_jk / R_kk with G = R R^T, R upper. It is GPTQ (Frantar et al., arXiv 2210.17323),
               which factors G^-1 = U^T U and spreads what W_j has moved by then as well: U = R^-1, so the targets are
               the same, and nothing is inverted (Babai's nearest plane; Chen et al., arXiv 2507.18553).
3. `descend`   one cyclic sweep of exact coordinate descent over the codes (QuantEase, Behdin et al., arXiv 2309.01885).
4. `refit`     for the codes found, the least-squares scales of each row in the metric G, snapped to the same grid.
5. `descend`   once more: a scale that snapping moved shifts all its weights alike, which no rounding error does, and at
               8 bits it would be most of the error; the codes make up for it. On MiniLM the second sweep takes off
               2 to 4 % of the squared error.

Rows never interact, so several bit widths and group sizes are extra rows of one pass. Everything works on X = W^T
(columns, rows), where a column of all rows is one contiguous vector. Without a metric, G = I: columns do not interact
either, and only step 1 is left, which is the MSE-optimal data-free rounding.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fxcompress.core.metric import Metric
from fxcompress.passes.grid import PLAIN, ROW_CHUNK, Grid, Lattice, cut, rescale, snap, spread

# Of mean(diag G): a hundred sentences say little about the smallest directions of 1536. Of pruning 0.01 (the paper's)
# loses 6 % more on held-out sentences, 0.3 3 % more.
DAMPING = 0.1
# Shares of the group's range, and of twice its largest magnitude around the grid's middle.
_STARTS = ((1.0, 0.75), (0.65, 0.45, 0.33))
# Nothing is worth clipping at 8 bits, and zeros fall on sixteenths of the range: some room is needed for that.
_STARTS_AT_8_BITS = ((1.07, 1.0), (0.5,))
_LLOYD_STEPS = 2
_BLOCK = 64
# Weights: what is made of them stays in a core's cache. Of 768 columns 16,384 rows take a fifth of the time that they
# take 8192 at once (8 bits, one core of an EPYC with 1 MB), 768 as long, 3072 half; the grids are the same.
_SEARCHED = 2**18
_LANES = 64  # rows: parts are whole vectors of any width, because a vector's sums and a remainder's differ in last bits


class Curvature(NamedTuple):
    """What steps 2-4 need of G: damped (columns, columns) float32, the order, R_jk / R_kk of the ordered G."""

    damped: Tensor
    steps: Tensor
    order: Tensor


@dataclass(frozen=True)
class _Damped:
    """An analysis of a metric: G damped, in a unit that makes its mean diagonal 1, (columns, columns) float32; `times`
    ten times more than the time before."""

    times: int

    def __call__(self, metric: Metric) -> Tensor:
        assert metric.columns is not None
        mean = metric.columns.diagonal().abs().mean()
        level = (DAMPING * mean + torch.finfo(torch.float64).tiny ** 0.5) * 10**self.times
        g = torch.div(metric.columns, mean + level, out=torch.empty(metric.columns.shape))  # in float64, then rounded
        g.diagonal().add_(level / (mean + level))
        return g


def factored(metric: Metric, order: Tensor) -> tuple[Tensor, Tensor]:
    """G damped, (columns, columns) in a unit that makes its mean diagonal 1, and the upper triangular R of
    R R^T = G[order][:, order]; float32.

    R^T D is what is left of an error D once the columns behind have made up for those before, as far as they can.
    Single precision does: an element of R R^T is wrong by a share of sqrt(G_jj G_kk), whatever the other columns hold.
    """
    backwards = order.flip(0)
    for times in itertools.count():
        g = metric.analysis(_Damped(times))
        assert g is not None
        lower, info = torch.linalg.cholesky_ex(g.index_select(0, backwards).index_select(1, backwards))
        if not int(info):
            return g, lower.flip(0, 1)
        # Moments are summed in float32: of inputs that never vary, or are too faint for their squares, what is left is
        # rounding, and can be far from positive definite.
    raise AssertionError("a multiple of the identity is positive definite")


def curvature(metric: Metric) -> Curvature:
    """Factor G once for all bit widths and group sizes."""
    assert metric.columns is not None
    order = torch.argsort(metric.columns.diagonal(), descending=True, stable=True)
    g, r = factored(metric, order)
    return Curvature(g, r.div_(r.diagonal().clone()), order)


def fit(x: Tensor, bits: int, group: int, importance: Tensor | None, lattice: Lattice = PLAIN) -> Grid:
    """Step 1 for X (columns, rows) float32; importance (columns,) is diag G or None."""
    some = max(_SEARCHED // len(x), _LANES) // _LANES * _LANES
    parts = [_search(part, bits, group, importance, lattice) for part in torch.split(x, some, 1)]
    scale, zero = (torch.cat(t, 1) for t in zip(*parts))
    return snap(scale, zero, bits, lattice)


def nearest(x: Tensor, grid: Grid, bits: int, group: int) -> Tensor:
    """Codes (columns, rows) uint8 of plain rounding."""
    codes = torch.empty(x.shape, dtype=torch.uint8)
    for start in range(0, x.shape[1], ROW_CHUNK):
        rows = slice(start, start + ROW_CHUNK)
        scale, zero = spread(cut(grid, rows), group, len(x))
        codes[:, rows] = (x[:, rows] / scale).add_(zero).round_().clamp_(0, 2**bits - 1)
    return codes


def roughly(x: Tensor, grid: Grid, bits: int, group: int, curve: Curvature | None) -> Tensor:
    """Codes (columns, rows) uint8 of steps 1 and 2 alone: the same kind of errors, somewhat larger, in a fifth of the
    time."""
    if curve is None:
        return nearest(x, grid, bits, group)
    parts = []
    for start in range(0, x.shape[1], ROW_CHUNK):
        rows = slice(start, start + ROW_CHUNK)
        near = integers(torch.full_like(x[0, rows], 2.0**bits - 1))
        parts.append(feed_back(x[:, rows], *spread(cut(grid, rows), group, len(x)), near, curve).to(torch.uint8))
    return torch.cat(parts, 1)


def round_with(
    x: Tensor, grids: list[Grid], bits: list[int], groups: list[int], curve: Curvature
) -> list[tuple[Tensor, Grid]]:
    """Steps 2-5 for several settings at once -> [(uint8 codes (columns, rows), grid)]."""
    parts: list[list[tuple[Tensor, Grid]]] = []
    chunk = max(1, ROW_CHUNK // len(bits))
    for start in range(0, x.shape[1], chunk):
        rows = slice(start, start + chunk)
        parts.append(_round_rows(x[:, rows], [cut(g, rows) for g in grids], bits, groups, curve))
    result = []
    for grid, made in zip(grids, zip(*parts)):
        scale, scale_codes = (torch.cat([getattr(g, key) for _, g in made], 1) for key in ("scale", "scale_codes"))
        codes = torch.cat([q for q, _ in made], 1)
        result.append((codes, grid._replace(scale=scale, scale_codes=scale_codes)))
    return result


def _round_rows(
    x: Tensor, grids: list[Grid], bits: list[int], groups: list[int], curve: Curvature
) -> list[tuple[Tensor, Grid]]:
    """-> per setting (uint8 codes, grid with refitted scales) of a few thousand rows."""
    columns, rows = x.shape
    scale, zero = _side_by_side(grids, groups, columns)
    near = integers(torch.cat([torch.full((rows,), 2.0**b - 1) for b in bits]))
    stacked = x.repeat(1, len(bits))
    codes = descend(stacked, feed_back(stacked, scale, zero, near, curve), scale, zero, near, curve.damped)
    split = torch.split(codes, rows, 1)
    image = functools.cache(lambda: curve.damped @ x)
    scales = (
        refit(image(), q, g, n, curve.damped) if n < columns else refit_rows(x, q, g, curve.damped)
        for q, g, n in zip(split, grids, groups)
    )
    refitted = [rescale(g, s) for g, s in zip(grids, scales)]
    scale, zero = _side_by_side(refitted, groups, columns)
    codes = descend(stacked, codes, scale, zero, near, curve.damped)
    return [(q.to(torch.uint8), grid) for q, grid in zip(torch.split(codes, rows, 1), refitted)]


def _side_by_side(grids: list[Grid], groups: list[int], columns: int) -> tuple[Tensor, ...]:
    """scale, zero per weight (columns, settings rows)."""
    return tuple(torch.cat(t, 1) for t in zip(*(spread(g, n, columns) for g, n in zip(grids, groups))))


Near = Callable[[Tensor], Tensor]  # w / s + z -> the nearest code, as a float; may change its argument


def integers(top: Tensor) -> Near:
    """Codes 0 .. top; top is one for a row."""
    bottom = torch.zeros_like(top)
    return lambda t: t.round_().clamp_(bottom, top)


def feed_back(x: Tensor, scale: Tensor, zero: Tensor, near: Near, curve: Curvature) -> Tensor:
    """Step 2 for scale, zero (columns, rows) -> codes (columns, rows) float32."""
    steps, order = curve.steps, curve.order
    w, s, z = x[order], scale[order], zero[order]
    q = torch.empty_like(w)
    for a in range(0, len(x), _BLOCK):
        mine = slice(a, a + _BLOCK)
        errors, own = x[order[mine]], steps[mine, mine].contiguous()
        columns = zip(*(t[mine].unbind() for t in (w, s, z, q)), errors.unbind())
        for i, (wj, sj, zj, qj, error) in enumerate(columns):
            qj.copy_(near(torch.addcdiv(zj, wj, sj)))
            error.addcmul_(qj - zj, sj, value=-1)
            w[a + i + 1 : a + _BLOCK].addr_(own[i, i + 1 :], error)
        w[a + _BLOCK :].addmm_(steps[mine, a + _BLOCK :].T, errors)
    codes = torch.empty_like(q)
    codes[order] = q
    return codes


def descend(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, near: Near, damped: Tensor) -> Tensor:
    """Step 3: each code in turn to its best value with all others fixed. Changes `codes` and returns it.

    With D = (C - z) s - X the best value of code j is  C_j - (G D)_j / (G_jj s_j).
    """
    d = (codes - zero) * scale - x
    per_step = (scale * damped.diagonal().unsqueeze(1)).reciprocal_()
    for a in range(0, len(x), _BLOCK):
        mine = slice(a, a + _BLOCK)
        gradient, before = damped[mine] @ d, codes[mine].clone()
        own = damped[mine, mine].T.contiguous()
        columns = zip(*(t[mine].unbind() for t in (codes, per_step, scale)), gradient.unbind())
        for i, (code, step, unit, slope) in enumerate(columns):
            q = near(torch.addcmul(code, slope, step, value=-1))
            change = (q - code).mul_(unit)
            code.copy_(q)
            gradient[i + 1 :].addr_(own[i, i + 1 :], change)
        d[mine].addcmul_(codes[mine] - before, scale[mine])
    return codes


def refit(image: Tensor, codes: Tensor, grid: Grid, group: int, damped: Tensor) -> Tensor:
    """Step 4: scales (groups, rows) with  min_s tr((C s - X)^T G (C s - X)),  C = q - z,  a ridge near the old ones.
    image: G X."""
    columns, rows = image.shape
    groups = len(grid.scale)
    _, zero = spread(grid, group, columns)
    c = codes - zero
    right = _by_group(c * image, group).T  # (rows, groups)
    normal = torch.empty(rows, groups, groups)
    for i in range(groups):
        part, rest = slice(i * group, min((i + 1) * group, columns)), slice(i * group, columns)
        sums = _by_group((damped[rest, part] @ c[part]).mul_(c[rest]), group).T
        normal[:, i, i:], normal[:, i:, i] = sums, sums  # it is symmetric
    ridge = _ridge(normal.diagonal(dim1=1, dim2=2).mean(1, keepdim=True))
    normal = normal + torch.diag_embed(ridge.expand(-1, groups))
    return _grown(torch.linalg.solve(normal, right + ridge * grid.scale.T).T, grid.scale)


def refit_rows(x: Tensor, codes: Tensor, grid: Grid, damped: Tensor) -> Tensor:
    """The same of one scale a row, (1, rows): there is no system to solve, and C^T G X is (G C)^T X."""
    c = codes - grid.zero
    image = damped @ c
    normal, right = (image * c).sum(0, keepdim=True), image.mul_(x).sum(0, keepdim=True)
    ridge = _ridge(normal)
    return _grown((right + ridge * grid.scale) / (normal + ridge), grid.scale)


def _ridge(normal: Tensor) -> Tensor:
    return 1e-4 * normal + 1e-12


def _grown(new: Tensor, old: Tensor) -> Tensor:
    """The new scales, but for those that would be hardly any."""
    return torch.where(new > 0.3 * old, new, old)


def _by_group(values: Tensor, group: int) -> Tensor:
    """(columns, rows) -> sums (groups, rows)."""
    return _grouped(values, group).sum(1)


def _grouped(values: Tensor, group: int) -> Tensor:
    """(columns, rows) -> (groups, group, rows), a short last group padded with zeros."""
    pad = -len(values) % group
    if pad:
        values = torch.nn.functional.pad(values, (0, 0, 0, pad))
    return torch.unflatten(values, 0, (-1, group))


_Tried = tuple[Tensor, Tensor, Tensor, Tensor]  # scale, zero, error (groups, rows), codes (groups, group, rows)


def _search(x: Tensor, bits: int, group: int, importance: Tensor | None, lattice: Lattice) -> tuple[Tensor, Tensor]:
    """Best scale, zero (groups, rows) of a few starting ranges; then Lloyd steps: fit the line q -> w, round again."""
    top, middle, tiny = 2**bits - 1, (2**bits - 1) / 2, 1e-12
    ranges, symmetric = _STARTS_AT_8_BITS if bits == 8 else _STARTS
    v = _grouped(x, group)  # (groups, group, rows)
    ones = torch.ones(len(x)) if importance is None else importance.float() + DAMPING * importance.float().mean()
    weight = _grouped((ones / ones.mean().clamp_min(tiny)).unsqueeze(1), group)  # (groups, group, 1), 0 on the padding

    def placed(zero: Tensor) -> Tensor:
        return lattice.zeros.place(zero, bits)[0]

    def tried(scale: Tensor, zero: Tensor) -> _Tried:
        q = (v / scale.unsqueeze(1) + zero.unsqueeze(1)).round_().clamp_(0, top)
        d = (q - zero.unsqueeze(1)).mul_(scale.unsqueeze(1)).sub_(v)
        return scale, zero, (d.square_() * weight).sum(1), q

    low, high = lattice.zeros.ends(v.amin(1).clamp_max(0), v.amax(1).clamp_min(0))
    reach = torch.maximum(-low, high).clamp_min(tiny)
    starts = [((high - low) * share, (high + low) / 2) for share in ranges]  # width and centre of what the codes span
    starts += [(reach * 2 * share, torch.zeros_like(reach)) for share in symmetric]
    found = (
        tried(scale, placed(middle - centre / scale))
        for width, centre in starts
        for scale in lattice.scales.around((width / top).clamp_min(tiny))
    )
    best = functools.reduce(_better, found)
    total = weight.sum(1)
    for _ in range(_LLOYD_STEPS):
        scale, _, _, q = best
        mean_q, mean_v = (weight * q).sum(1) / total, (weight * v).sum(1) / total
        centred = q - mean_q.unsqueeze(1)
        slope = (weight * centred * v).sum(1) / (weight * centred.square()).sum(1).clamp_min(tiny)
        for near in lattice.scales.around(torch.where(slope > tiny, slope, scale)):
            zero = placed(mean_q - mean_v / near)
            c = q - zero.unsqueeze(1)
            fitted = (weight * c * v).sum(1) / (weight * c.square()).sum(1).clamp_min(tiny)
            for other in lattice.scales.around(torch.where(fitted > tiny, fitted, scale)):
                best = _better(best, tried(other, zero))
    return best[0], best[1]


def _better(a: _Tried, b: _Tried) -> _Tried:
    """Per group, whichever has the smaller error."""
    wins = b[2] < a[2]
    scale, zero, error = (torch.where(wins, y, x) for x, y in zip(a[:3], b[:3]))
    return scale, zero, error, torch.where(wins.unsqueeze(1), b[3], a[3])
