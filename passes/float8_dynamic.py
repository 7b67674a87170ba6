"""Eight-bit floats on both sides of a product (fxcompress.passes.dynamic_rounding):  C and q in e4m3, up to 448.

Every number is off by about a 38th of itself, however large its neighbours are; so smoothing matters less than it does
to integers, and rows and tokens of even size lose more than they would there (fxcompress.passes.float8). For hardware
that multiplies 8-bit floats and no 8-bit integers, or the latter more slowly. Paper: Micikevicius et al., FP8 formats
for deep learning, 2022 (arXiv 2209.05433).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch._ops import OpOverload

from fxcompress.codegen.ops import float8_dynamic_linear as form
from fxcompress.passes import rounding
from fxcompress.passes.dynamic_rounding import DynamicRounding
from fxcompress.passes.float8 import rounded


@dataclass(frozen=True)
class Float8Dynamic(DynamicRounding):
    """e4m3 weight, e4m3 activations."""

    name: ClassVar[str] = "float8_dynamic"
    paper: ClassVar[str] = "arXiv 2209.05433"
    op: ClassVar[OpOverload] = torch.ops.fxcompress.float8_dynamic_linear.default
    largest: ClassVar[float] = form.LARGEST

    def rounded_tokens(self, x: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
        return form.rounded_tokens(x, smooth)

    def coded(self, x: Tensor, scales: Tensor, curve: rounding.Curvature | None) -> Tensor:
        return rounded(x.T, scales.unsqueeze(1), curve).view(torch.uint8)

    def numbers(self, codes: Tensor) -> Tensor:
        return form.numbers(codes)
