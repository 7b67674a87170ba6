"""Eight-bit integers on both sides of a product (fxcompress.passes.dynamic_rounding):  C and q from -127 to 127.

Exact sums, and steps as fine for the largest number as for the smallest: what is far below the largest of its token or
row is lost in half a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch._ops import OpOverload

from fxcompress.codegen.ops import int8_dynamic_linear as form
from fxcompress.passes import rounding
from fxcompress.passes.dynamic_rounding import DynamicRounding


@dataclass(frozen=True)
class Int8Dynamic(DynamicRounding):
    """int8 weight, int8 activations."""

    name: ClassVar[str] = "int8_dynamic"
    paper: ClassVar[str] = "arXiv 2211.10438"
    op: ClassVar[OpOverload] = torch.ops.fxcompress.int8_dynamic_linear.default
    largest: ClassVar[float] = form.LEVELS

    def rounded_tokens(self, x: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
        return form.rounded_tokens(x, smooth)

    def coded(self, x: Tensor, scales: Tensor, curve: rounding.Curvature | None) -> Tensor:
        if curve is None:
            return (x / scales).round().clamp(-form.LEVELS, form.LEVELS).T.to(torch.int8)
        scale, zero = scales.expand_as(x), torch.full((1, 1), float(form.LEVELS)).expand_as(x)
        near = rounding.integers(torch.tensor(2.0 * form.LEVELS))
        codes = rounding.feed_back(x, scale, zero, near, curve)
        codes = rounding.descend(x, codes, scale, zero, near, curve.damped) - form.LEVELS
        return codes.T.to(torch.int8)

    def numbers(self, codes: Tensor) -> Tensor:
        return codes.float()
