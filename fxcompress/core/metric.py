"""The error of one site, in the metric of what flows through it.

    linear       e = tr(D G D^T) / tr(W H W^T)      D = W - W',  H = E[x x^T],  G = H, or H - mu mu^T where a bias absorbs D mu
    embedding    e = sum_r p_r D_r M D_r^T / sum_r p_r W_r M W_r^T      p the probability of row r, M how the output reacts to the row
    tied         the mean of both
    no data      G = H = M = I, p = 1

e is squared and relative: its root is ||y - y'|| / ||y||, exact, because E||D x + b - b'||^2 = tr(D (H - mu mu^T) D^T) once
b' = b + D mu. Rewrites minimise it over the calibration inputs (`rounding_metric`). Where inputs were held out it is judged by theirs
(`local_error`), with their moment H_c and mean mu_c:  G = H_c - mu_c mu^T - mu mu_c^T + mu mu^T, H = H_c.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.core.site import Site


@dataclass(frozen=True, eq=False)
class Metric:
    """What a rewrite of a matrix (rows, columns) should minimise: sum_r rows_r D_r columns D_r^T. None is the identity."""

    columns: Tensor | None = None  # (columns, columns) float64
    rows: Tensor | None = None  # (rows,) float64


def rounding_metric(site: Site) -> Metric:
    """The metric of the site's own weight."""
    s = site.statistics
    if s.second_moment is None:
        return Metric(s.column_metric, s.row_weight)
    if site.correctable and s.mean is not None:
        return Metric(s.second_moment - torch.outer(s.mean, s.mean), s.row_weight)
    return Metric(s.second_moment, s.row_weight)


def local_error(site: Site, approximation: Tensor) -> float:
    """e of `approximation` (rows, columns) in place of the site's weight."""
    w, d = site.weight.double(), site.weight.double() - approximation.double()
    s, errors = site.statistics, []
    if s.second_moment is not None:
        moment, _ = s.check or (s.second_moment, s.mean)
        errors.append(_energy(d, _judging_metric(site)) / _signal(w, moment))
    if s.row_weight is not None:
        root = s.row_weight.sqrt().unsqueeze(1)
        errors.append(_energy(d * root, s.column_metric) / _signal(w * root, s.column_metric))
    if not errors:
        errors.append(_energy(d, None) / _signal(w, None))
    return sum(errors) / len(errors)


def _judging_metric(site: Site) -> Tensor | None:
    s = site.statistics
    if s.check is None:
        return rounding_metric(site).columns
    moment, mean = s.check
    if not site.correctable or s.mean is None:
        return moment
    cross = torch.outer(mean, s.mean)
    return moment - cross - cross.T + torch.outer(s.mean, s.mean)


def corrected_bias(site: Site, approximation: Tensor, bias: Tensor) -> Tensor:
    """b' = b + (W - W') mu, in the dtype of b; b itself where there is no mean or no bias to correct."""
    mean = site.statistics.mean
    if mean is None or not site.correctable:
        return bias
    return (bias.double() + (site.weight.double() - approximation.double()) @ mean).to(bias.dtype)


def _energy(a: Tensor, metric: Tensor | None) -> float:
    """tr(A G A^T)"""
    return max(0.0, float(a.square().sum() if metric is None else ((a @ metric) * a).sum()))


def _signal(w: Tensor, metric: Tensor | None) -> float:
    """The same, to be divided by: never 0, though a weight or its inputs may be."""
    return max(_energy(w, metric), 1e-200)
