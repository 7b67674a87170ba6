"""Quaternion weights:  W (out, in)  ->  L(Q), a matrix of quaternions (out/4, in/4) acting by the Hamilton product

    a quarter of the weight elements, the same flops; features in four contiguous chunks, the bias real and whole
    (layout: fxcompress.codegen.ops.quaternion_linear)

L is linear in the components q = [r | x | y | z] (out/4, in), and chunk a of the dense rows is q T_a with T_a a signed
permutation. So the rows of q are independent, and the nearest quaternion matrix in the metric G of the inputs solves

    q A = sum_a W_a G T_a^T        A = sum_a T_a G T_a^T  (in, in)        W_a the rows of chunk a

Without calibration A = 4 I and q = fold(W) / 4, the mean of the four entries with their signs:

    r = (B00 + B11 + B22 + B33) / 4        x = (-B01 + B10 - B23 + B32) / 4         W = (B_ab), 4 x 4 blocks
    y = (-B02 + B13 + B20 - B31) / 4       z = (-B03 - B12 + B21 + B30) / 4

A is also the metric of what is stored: an error d in a row of q costs d A d^T.

The four sign patterns are orthogonal, so of a matrix without that structure a quarter of the energy is kept: a relative
error of sqrt(3)/2 = 0.87 in the Frobenius norm (0.864 to 0.867 for the linear weights of MiniLM's first layer). Over
calibration inputs it is less, 0.4 to 0.7 for most of them, and still too much: a layer to train with, or to heal.

Papers: Iqbal & Mishra, 2023 (arXiv 2308.06780), quaternion networks and their pruning; Tay et al., Quaternion
Transformer, ACL 2019 (arXiv 1906.04393): "partial" names the Q, K and V weights, "full" every linear weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor, fx

import fxcompress.codegen.ops.quaternion_linear as op
from fxcompress.core.budget import Budget
from fxcompress.core.cost import Cost
from fxcompress.core.errors import SpecError
from fxcompress.core.metric import STAND_INS, Metric, image, rounding_metric, row_errors, row_signals
from fxcompress.core.rewrite import Operand, Store, Structure
from fxcompress.core.sample import draw, enough
from fxcompress.core.site import Site, Use, tokens_of
from fxcompress.passes.low_rank import damped_image, damped_metric, damping

GATE_DAMPING = 1e-2  # of mean(diag G)
MOST_LOST = 0.1  # of the output, where it is weighed unasked: a weight that was trained as quaternions loses nothing


class Nearest(NamedTuple):
    """The nearest quaternion matrix."""

    components: Tensor  # (out/4, in) float64
    metric: Metric  # what an error in them costs: A


@dataclass(frozen=True)
class Quaternion(Structure):
    """Four components a quarter of the weight's size in all; the site keeps its bias."""

    name: ClassVar[str] = "quaternion"
    paper: ClassVar[str] = "arXiv 2308.06780"

    def check(self, site: Site) -> None:
        if site.rows % 4 or site.columns % 4:
            raise SpecError(
                f"quaternion at {site.name}: the weight is {site.rows} x {site.columns}, but both sides must be "
                "multiples of 4."
            )

    @classmethod
    def refuses(cls, site: Site) -> str | None:
        if why := cls.unserved(site):
            return why
        if site.rows % 4 or site.columns % 4:
            return f"the sides of a {site.rows} x {site.columns} weight are not both multiples of 4"
        return None

    @classmethod
    def unasked(cls, site: Site, budget: Budget) -> str | None:
        lost = untrained_error(site) ** 0.5
        return f"it loses {lost:.0%} of the output untrained; it is offered by name" if lost > MOST_LOST else None

    @classmethod
    def space(cls, site: Site) -> Iterator[Self]:
        yield cls()

    def matrices(self, site: Site) -> dict[str, tuple[int, int]]:
        return {"components": (site.rows // 4, site.columns)}

    def unstored(self, site: Site) -> Tensor:
        return op.expand(nearest(site).components)  # not kept: few weights are quaternions, and A is large

    def factor(self, site: Site, store: Store) -> None:
        self.check(site)
        best = site.analysis(nearest)
        store("components", best.components.to(site.weight.dtype), best.metric)

    def dense(self, factors: Mapping[str, Tensor], site: Site) -> Tensor:
        return op.expand(factors["components"])

    def emit(self, graph: fx.Graph, use: Use, operands: Mapping[str, Operand], bias: fx.Node | None) -> fx.Node:
        args = (use.x, operands["components"].read())
        return graph.call_function(
            torch.ops.fxcompress.quaternion_linear.default, (*args, bias) if bias is not None else args
        )

    def cost(self, use: Use, rows: int, columns: int, weight_bytes: int, itemsize: int) -> Cost:
        return op.cost(tokens_of(use), rows, columns, weight_bytes, itemsize)


def nearest(site: Site) -> Nearest:
    """The minimiser above, in float64. G is damped, so that inputs never seen keep the plain projection."""
    if rounding_metric(site).columns is None:
        return Nearest(op.fold(site.weight.double()) / 4, Metric())
    curvature = op.turned(site.analysis(damped_metric))
    components = torch.cholesky_solve(op.fold(damped_image(site)).T, torch.linalg.cholesky(curvature)).T
    return Nearest(components, Metric(curvature))


def untrained_error(site: Site) -> float:
    """The squared relative error of quaternions near the nearest. With a metric it is told from rows of q that stand
    for all, in single precision, for which G is damped more: within 7 % of the nearest's on MiniLM's weights but the
    pooler, and up to 13 % less on a BERT's. A weight of quaternions loses nothing in any G."""
    count, metric = site.rows // 4, rounding_metric(site).columns
    signal = row_signals(site).reshape(4, count).sum(0)
    sample = draw(signal + signal.mean(), count if metric is None else enough(STAND_INS // 4, site.columns))
    rows = (torch.arange(4).unsqueeze(1) * count + sample.rows).flatten()
    w = site.weight[rows].float()
    q = op.fold(w) / 4
    if metric is not None:
        unit = damping(metric, 1.0)  # inputs may be zero, or too faint for float32
        curvature = op.turned(torch.div(metric, unit, out=torch.empty(metric.shape)))  # in float64, then rounded
        curvature.diagonal().add_(4 * GATE_DAMPING)
        right = op.fold((site.analysis(image)[rows] / unit).float() + GATE_DAMPING * w)
        root = torch.linalg.cholesky(curvature)
        half = torch.linalg.solve_triangular(root, right.T, upper=False)  # cholesky_solve would copy the root
        q = torch.linalg.solve_triangular(root.T, half, upper=True).T
    return sample.total(row_errors(site, rows, op.expand(q)).reshape(4, -1).sum(0))
