"""8-bit floats:  W  ->  e4m3 codes and one float32 scale a row.

    w' = s q        q in e4m3: 3 bits of mantissa, 2^-9 .. 448        stored: 8 + 32 / columns bits a weight

s = max |W_r| / 448, so nothing is clipped. A float's step grows with the number: every weight is off by about a 38th of
itself however large its neighbours are, where int8's step is a 255th of the row's range. That loses to int8 unless a
row's range is beyond 23 times its root mean square: floats are for heavy tails, and for hardware that multiplies them.

Rounded with the error feedback of fxcompress.passes.rounding where there is a metric. Paper: Micikevicius et al., FP8
formats for deep learning, 2022 (arXiv 2209.05433).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, fx

import fxcompress.codegen.ops.float8_embedding  # noqa: F401 - registers what `lookup` calls
from fxcompress.codegen.ops.dequantize_float8 import dequantize_float8
from fxcompress.core.budget import Budget
from fxcompress.core.metric import Metric, local_error
from fxcompress.core.rewrite import Storage
from fxcompress.core.site import Site
from fxcompress.passes import rounding
from fxcompress.passes.grid import ROW_CHUNK
from fxcompress.passes.quantize import Quantize

LARGEST = torch.finfo(torch.float8_e4m3fn).max
HEAVY_TAILED = 23.4  # 255 sqrt(12) / 38: the range, in root mean squares, at which int8's rounding error is as large


@dataclass(frozen=True)
class Float8(Storage):
    """e4m3, one scale a row."""

    name: ClassVar[str] = "float8"
    paper: ClassVar[str] = "arXiv 2209.05433"
    keys: ClassVar[tuple[str, ...]] = ("codes", "scales")

    @classmethod
    def refuses(cls, site: Site) -> str | None:
        return Quantize.refuses(site)

    @classmethod
    def space(cls, site: Site) -> Iterator[Self]:
        yield cls()

    @classmethod
    def unasked(cls, site: Site, budget: Budget) -> str | None:
        """Weighed where int8, a grid over the row's range, has the larger step."""
        w = site.weight.float()
        heavy = float((w.amax(1) - w.amin(1)).square().mean()) > HEAVY_TAILED**2 * float(w.square().mean())
        return None if heavy else "the ranges of its rows are narrow, where the steps of int8 are smaller"

    @classmethod
    def for_factors(cls, site: Site) -> tuple[Self, ...]:
        return ()

    @classmethod
    def dense_errors(cls, site: Site) -> dict[Storage, float]:
        return {q: local_error(site, q.dense_weight(site)) for q in cls.space(site)}

    def stored_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        return rows * (columns + 4)

    def encode(self, matrix: Tensor, metric: Metric) -> dict[str, Tensor]:
        """codes (rows, columns) uint8, the bits of e4m3 numbers; scales (rows, 1) float32."""
        scales = (matrix.float().abs().amax(1, keepdim=True) / LARGEST).clamp_min(1e-30)
        curve = metric.analysis(rounding.curvature)
        parts = zip(torch.split(matrix, ROW_CHUNK), torch.split(scales, ROW_CHUNK))
        codes = torch.cat([rounded(part.float(), s, curve) for part, s in parts])
        return {"codes": codes.view(torch.uint8), "scales": scales}

    def decode(self, tensors: Mapping[str, Tensor], like: Tensor) -> Tensor:
        matrix: Tensor = dequantize_float8(tensors["codes"], tensors["scales"], like.dtype)
        return matrix

    def read(self, graph: fx.Graph, tensors: Mapping[str, fx.Node], like: Tensor) -> fx.Node:
        args = (tensors["codes"], tensors["scales"], like.dtype)
        return graph.call_function(torch.ops.fxcompress.dequantize_float8.default, args)

    def lookup(self, graph: fx.Graph, tensors: Mapping[str, fx.Node], like: Tensor, ids: fx.Node) -> fx.Node:
        args = (ids, tensors["codes"], tensors["scales"], like.dtype)
        return graph.call_function(torch.ops.fxcompress.float8_embedding.default, args)


def rounded(w: Tensor, scales: Tensor, curve: rounding.Curvature | None) -> Tensor:
    """e4m3 codes (rows, columns) of w; scales (rows, 1)."""
    if curve is None:
        return _near(w / scales).to(torch.float8_e4m3fn)
    x = w.T.contiguous()
    scale, zero = scales.T.expand_as(x), torch.zeros(1, 1).expand_as(x)
    codes = rounding.feed_back(x, scale, zero, _near, curve)
    codes = rounding.descend(x, codes, scale, zero, _near, curve.damped)
    return codes.T.contiguous().to(torch.float8_e4m3fn)


def _near(t: Tensor) -> Tensor:
    """Nearest e4m3 number; a conversion alone would make larger ones NaN."""
    return t.clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float()
