"""The error of one site, in the metric of what flows through it.

    linear       e = tr(D G D^T) / tr(W H W^T)      D = W - W',  H = E[x x^T]
                 G = H, or H - mu mu^T where a bias absorbs D mu
    embedding    e = sum_r p_r D_r M D_r^T / sum_r p_r W_r M W_r^T
                 p_r the probability of row r, M how the output reacts to the row
    convolution  as linear, with the patches it sees in place of x
    tied         the mean of both
    no data      G = H = M = I, p = 1

e is squared and relative: its root is ||y - y'|| / ||y||, exact, because E||D x + b - b'||^2 = tr(D (H - mu mu^T) D^T)
once b' = b + D mu. Rewrites minimise it over the calibration inputs (`rounding_metric`). Where inputs were held out it
is judged by theirs (`local_error`), with their moment H_c and mean mu_c:

    G = H_c - mu_c mu^T - mu mu_c^T + mu mu^T      H = H_c
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fxcompress.core.held import ROW_CHUNK, Gram, Identity, Many, OfMatrix
from fxcompress.core.sample import Sample, draw, enough
from fxcompress.core.site import Site

T = TypeVar("T")

STAND_INS = 256  # draws of rows of 384
CENTRED_FLOOR = 1e-6  # of mean(diag H): what summing x x^T batch by batch in float32 leaves uncertain


@dataclass(frozen=True, eq=False)
class Metric:
    """What a rewrite of a matrix (rows, columns) should minimise: sum_r rows_r D_r columns D_r^T; None is I."""

    columns: Tensor | None = None  # (columns, columns) float64
    rows: Tensor | None = None  # (rows,) float64
    _analyses: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def analysis(self, compute: Callable[[Metric], T]) -> T | None:
        """`compute(self)`, once: all bit widths share one factorization. None for the identity."""
        if self.columns is None:
            return None
        if compute not in self._analyses:
            self._analyses[compute] = compute(self)
        found: T = self._analyses[compute]
        return found


def rounding_metric(site: Site) -> Metric:
    """The metric of the site's own weight; made once."""
    return site.analysis(_rounding_metric)


def _rounding_metric(site: Site) -> Metric:
    s = site.statistics
    if s.second_moment is None:
        return Metric(s.column_metric, s.row_weight)
    if site.correctable and s.mean is not None:
        # Inputs that hardly vary ([CLS] before any attention) leave a difference of equals, not even positive definite.
        centred = torch.addr(s.second_moment, s.mean, s.mean, alpha=-1)
        centred.diagonal().add_(CENTRED_FLOOR * s.second_moment.diagonal().mean())
        return Metric(centred, s.row_weight)
    return Metric(s.second_moment, s.row_weight)


def local_error(site: Site, approximation: Tensor) -> float:
    """e of `approximation` (rows, columns) in place of the site's weight."""
    parts = (slice(start, start + ROW_CHUNK) for start in range(0, site.rows, ROW_CHUNK))
    return sum(float(row_errors(site, part, approximation[part]).sum()) for part in parts)


def row_errors(site: Site, rows: Tensor | slice, approximation: Tensor) -> Tensor:
    """What each of `rows` (n,) adds to `local_error` if it is `approximation` (n, columns); (n,) float64."""
    judge = site.analysis(judge_of)
    d, errors = site.weight[rows].float() - approximation.float(), []
    if judge.inputs is not None:
        errors.append(judge.inputs.gram.energies(d) / judge.inputs.signal)
    if judge.rows is not None:
        errors.append(judge.rows.gram.energies(d * judge.rows.root[rows]) / judge.rows.signal)
    return torch.stack(errors).mean(0)


def image(site: Site) -> Tensor:
    """W G (rows, columns) float64, G what is minimised; an analysis of the site."""
    metric = rounding_metric(site).columns
    return site.weight.double() if metric is None else site.weight.double() @ metric


def stand_ins(site: Site) -> Sample:
    """Rows of the site that stand for all; an analysis of the site. Half of the draws are by what each row is of the
    signal, half even: where few rows are most of the signal (MiniLM's weights of 1536 columns) the others lose more of
    theirs, and draws by signal alone told what structures lose 21 % wrong (rms; these 1 to 3 %)."""
    signal = row_signals(site)
    return draw(signal + signal.mean(), enough(STAND_INS, site.columns))


def row_signals(site: Site) -> Tensor:
    """What each row is of the squared output, up to a factor, (rows,) float64."""
    if site.kind in ("embedding", "tied"):
        return row_errors(site, torch.arange(site.rows), torch.zeros(()))
    return (site.analysis(image) * site.weight).sum(1).clamp_min(0)


class ByInputs(NamedTuple):
    """What the products of a weight are judged by."""

    gram: Gram
    signal: float


class ByRows(NamedTuple):
    """What the lookups in a weight are judged by."""

    gram: Gram
    signal: float
    root: Tensor  # sqrt(p) (rows, 1) float32


class Judge(NamedTuple):
    """What every candidate of a site is judged by; None where the site has no such use."""

    inputs: ByInputs | None
    rows: ByRows | None


def judge_of(site: Site) -> Judge:
    w, s = site.weight.float(), site.statistics
    if s.second_moment is None and s.row_weight is None:
        gram: Gram = Identity(site.columns)
        return Judge(ByInputs(gram, _signal(w, gram)), None)
    inputs, rows = None, None
    if s.second_moment is not None:
        seen = s.check or Many(s.second_moment, torch.zeros(site.columns) if s.mean is None else s.mean)
        inputs = ByInputs(seen.around(s.mean if site.correctable else None), _signal(w, seen.around(None)))
    if s.row_weight is not None:
        root = s.row_weight.sqrt().unsqueeze(1).float()
        gram = Identity(site.columns) if s.column_metric is None else OfMatrix(s.column_metric.float())
        rows = ByRows(gram, _signal(w * root, gram), root)
    return Judge(inputs, rows)


def corrected_bias(site: Site, approximation: Tensor, bias: Tensor) -> Tensor:
    """b' = b + (W - W') mu, in the dtype of b; b itself where there is no mean or no bias to correct."""
    mean = site.statistics.mean
    if mean is None or not site.correctable:
        return bias
    return (bias.double() + (site.weight.float() - approximation.float()).double() @ mean).to(bias.dtype)


def _signal(w: Tensor, gram: Gram) -> float:
    """tr(W G W^T), to be divided by. A weight that is all zero counts as one of float32's eps: any other yardstick
    would call the rounding of nothing an enormous error."""
    energy = float(gram.energies(w).sum())
    if energy > 0:
        return energy
    return max(torch.finfo(torch.float32).eps ** 2 * float(gram.diagonal().sum()), 1e-200)
