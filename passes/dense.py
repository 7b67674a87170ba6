"""W as one matrix: the product stays what it is, and only how the matrix is kept can change.

    y = x W^T + b     stays     y = x W'^T + b          a convolution stays the same convolution, and so do experts
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, fx

from fxcompress.core.convolution import convolve
from fxcompress.core.cost import Cost
from fxcompress.core.experts import EXPERTS
from fxcompress.core.metric import rounding_metric
from fxcompress.core.rewrite import Operand, Store, Structure
from fxcompress.core.site import Site, Use, use_cost

_unflatten = torch.ops.aten.unflatten.int


@dataclass(frozen=True)
class Dense(Structure):
    """A weight nobody factored; its spec is left out of texts ("quantize{…}", or "keep" when stored as it is)."""

    name: ClassVar[str] = "dense"
    paper: ClassVar[str] = ""
    kinds: ClassVar[tuple[str, ...]] = ("linear", "embedding", "tied", "convolution", "experts")

    @classmethod
    def refuses(cls, site: Site) -> str | None:
        return None

    @classmethod
    def space(cls, site: Site) -> Iterator[Self]:
        yield cls()

    def matrices(self, site: Site) -> dict[str, tuple[int, int]]:
        return {"weight": (site.rows, site.columns)}

    def factor(self, site: Site, store: Store) -> None:
        store("weight", site.weight, rounding_metric(site))

    def dense(self, factors: Mapping[str, Tensor], site: Site) -> Tensor:
        return factors["weight"]

    def emit(self, graph: fx.Graph, use: Use, operands: Mapping[str, Operand], bias: fx.Node | None) -> fx.Node:
        if use.kind == "embedding":
            return operands["weight"].lookup(use.x)
        if use.window is not None:
            return convolve(graph, use.node, use.window, operands["weight"].read(), bias)
        if use.kind == "experts":
            x, _, offs = use.node.args
            stacked = graph.call_function(_unflatten, (operands["weight"].read(), 0, [use.experts, -1]))
            return graph.call_function(EXPERTS, (x, stacked, offs))
        args = (use.x, operands["weight"].read())
        return graph.call_function(torch.ops.aten.linear.default, (*args, bias) if bias is not None else args)

    def cost(self, use: Use, rows: int, columns: int, weight_bytes: int, itemsize: int) -> Cost:
        return use_cost(use, rows, columns, weight_bytes, itemsize)
