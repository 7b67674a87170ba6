"""Products that round their inputs:  y = x W^T + b  becomes  y = t s (round(x / (m t)) C^T) + b

    W = s C / m     C (out, in) of 8 bits, s a scale a row, m a divisor a column
    t               a scale for every token, from its largest |x_j / m_j|, found while the model runs

A column of x with outliers would cost all others of the token their precision. Dividing x by m and multiplying W by m
changes nothing but the ranges, and moves that difficulty into W, whose rows are rounded with error feedback in the
metric of x / m (fxcompress.passes.rounding). With X_j and W_j the largest of column j over a sample of inputs and over
the rows (SmoothQuant, Xiao et al., arXiv 2211.10438, eq. 4):

    m_j = X_j^smooth / W_j^(1 - smooth),   divided by the geometric mean over j

    stored      8 + 32 / in + 32 / out bits a weight
    error       tr(D G D^T) / tr(W H W^T) of the weight, which the moments tell, and
                E|W e|^2 / E|W x|^2, e the rounding of x, which only a sample tells (`input_error`)

The two add up, since e does not know what rounding did to W. The product is the same number of multiplications in 8
bits: it pays where hardware multiplies them faster, not in bytes, where 8-bit weights alone lose less.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from fxcompress.codegen.ops import rounded_inputs
from fxcompress.core.budget import Budget
from fxcompress.core.cost import Cost
from fxcompress.core.errors import SpecError
from fxcompress.core.metric import Metric, rounding_metric
from fxcompress.core.rewrite import Operand, Store, Structure
from fxcompress.core.site import Site, Use, tokens_of
from fxcompress.passes import rounding
from fxcompress.passes.quantize import Quantize

LEAST = 1e-5  # of the largest range: a column that was never seen, or never used, does not decide anything


@dataclass(frozen=True)
class DynamicRounding(Structure):
    """8 bits on both sides; `smooth` is the share of their ranges that the weight takes over (0 to 1)."""

    keeps: ClassVar[tuple[str, ...]] = ("codes", "scales", "smooth")
    op: ClassVar[OpOverload]
    largest: ClassVar[float]  # number of the format

    smooth: float = 0.5

    @abstractmethod
    def rounded_tokens(self, x: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
        """q and t of the op, for x (tokens, in)."""

    @abstractmethod
    def coded(self, x: Tensor, scales: Tensor, curve: rounding.Curvature | None) -> Tensor:
        """W m transposed (in, out), scales (out,) -> C (out, in) as it is stored; `curve` is that of x / m."""

    @abstractmethod
    def numbers(self, codes: Tensor) -> Tensor:
        """C in a type to compute with."""

    def __post_init__(self) -> None:
        if isinstance(self.smooth, bool) or not isinstance(self.smooth, float | int) or not 0 <= self.smooth <= 1:
            raise SpecError(f"{self.name} smooth={self.smooth!r} must be a number from 0 to 1.")

    @classmethod
    def refuses(cls, site: Site) -> str | None:
        if why := cls.unserved(site):
            return why
        if site.statistics.sample is None:
            return "only calibration can tell what rounding its inputs costs"
        return Quantize.refuses(site)

    @classmethod
    def unasked(cls, site: Site, budget: Budget) -> str | None:
        return "beside 8-bit storage it saves time and no bytes; it is offered by name"

    @classmethod
    def space(cls, site: Site) -> Iterator[Self]:
        yield cls()

    def matrices(self, site: Site) -> dict[str, tuple[int, int]]:
        return {}  # its codes are the stored form already

    def kept_bytes(self, site: Site) -> int:
        return site.rows * site.columns + 4 * (site.rows + site.columns)

    def error_bound(self, site: Site) -> float:
        return self.input_error(site)

    def input_error(self, site: Site) -> float:
        """Squared relative error of the output that rounding x adds to that of the weight, over the site's sample."""
        sample = site.statistics.sample
        if sample is None:
            return 0.0
        smooth, weight = self._divisors(site), site.weight.float()
        q, step = self.rounded_tokens(sample, smooth)
        lost = (q * step * smooth - sample) @ weight.T
        signal = float((sample @ weight.T).square().sum(dtype=torch.float64))
        return float(lost.square().sum(dtype=torch.float64)) / max(signal, 1e-200)

    def factor(self, site: Site, store: Store) -> None:
        smooth = self._divisors(site)
        x = (site.weight.float() * smooth).T.contiguous()  # (in, out)
        scales = (x.abs().amax(0) / self.largest).clamp_min(torch.finfo(torch.float32).tiny)
        store.keep("codes", self.coded(x, scales, _curvature(rounding_metric(site).columns, smooth)))
        store.keep("scales", scales)
        store.keep("smooth", smooth)

    def dense(self, factors: Mapping[str, Tensor], site: Site) -> Tensor:
        codes, scales, smooth = (factors[name] for name in ("codes", "scales", "smooth"))
        return self.numbers(codes).double() * scales.double().unsqueeze(1) / smooth.double()

    def draw(self, site: Site, generator: torch.Generator, store: Store) -> None:
        """A normal weight with the spread of the site's own."""
        drawn = torch.randn(site.weight.shape, generator=generator) * float(site.weight.float().std())
        self.factor(replace(site, weight=drawn.to(site.weight.dtype), _analyses={}), store)

    def emit(self, graph: fx.Graph, use: Use, operands: Mapping[str, Operand], bias: fx.Node | None) -> fx.Node:
        args = (use.x, *(operands[name].read() for name in ("codes", "scales", "smooth")))
        return graph.call_function(self.op, (*args, bias) if bias is not None else args)

    def cost(self, use: Use, rows: int, columns: int, weight_bytes: int, itemsize: int) -> Cost:
        return rounded_inputs.cost(tokens_of(use), rows, columns, weight_bytes, itemsize)

    def _divisors(self, site: Site) -> Tensor:
        """m (in,) float32."""
        sample, moment = site.statistics.sample, site.statistics.second_moment
        if sample is None:
            return torch.ones(site.columns)
        seen = sample.double().abs().amax(0)
        if moment is not None:  # what a small sample missed was still seen by the moments
            seen = torch.maximum(seen, moment.diagonal().clamp_min(0).sqrt())
        log = self.smooth * _log_range(seen) - (1 - self.smooth) * _log_range(site.weight.double().abs().amax(0))
        return (log - log.mean()).exp().float()


def _log_range(largest: Tensor) -> Tensor:
    return largest.clamp_min(LEAST * max(float(largest.max()), 1e-30)).log()


def _curvature(metric: Tensor | None, smooth: Tensor) -> rounding.Curvature | None:
    """That of the inputs after smoothing; `metric` is that before."""
    divisors = smooth.double()
    return None if metric is None else rounding.curvature(Metric(metric / torch.outer(divisors, divisors)))
