"""Unstructured pruning:  W (rows, columns)  ->  a bit a weight, and the weights that stay

    y = x W^T + b     stays     y = x W'^T + b        W' = unmask(mask, values)

Every row keeps as many weights as every other (Wanda compares within rows as well), so what stays is one matrix
(rows, kept) that any storage can keep, and a lookup gathers a row of it. fxcompress.passes.masks says which stay.

            flops               stored bits a weight
    dense   2 tokens out in     b
    here    2 tokens out in     1 + (1 - sparsity) b

Papers: Frantar & Alistarh, SparseGPT, ICML 2023 (arXiv 2301.00774); Sun et al., Wanda, ICLR 2024 (arXiv 2306.11695).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import sympy
import torch
from torch import Tensor, fx

from fxcompress.codegen.ops import unmask as op
from fxcompress.core.budget import Budget
from fxcompress.core.cost import Cost
from fxcompress.core.errors import SpecError
from fxcompress.core.rewrite import Operand, Store, Structure
from fxcompress.core.site import Site, Use, tokens_of, use_cost
from fxcompress.passes import masks
from fxcompress.passes.dense import Dense
from fxcompress.passes.masks import Pattern, Projection
from fxcompress.passes.quantize import is_table


@dataclass(frozen=True)
class Prune(Structure):
    """The share `sparsity` of every row dropped, chosen `by` one of masks.CRITERIA."""

    name: ClassVar[str] = "prune"
    paper: ClassVar[str] = "arXiv 2301.00774"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "embedding", "tied", "convolution")

    sparsity: float
    by: str = "sparsegpt"

    def __post_init__(self) -> None:
        masks.check_share(self.name, self.sparsity)
        masks.check_criterion(self.name, self.by)

    def check(self, site: Site) -> None:
        if not 0 < self.kept(site) < site.columns:
            raise SpecError(
                f"{self} at {site.name}: the weight is {site.rows} x {site.columns}, so sparsity must drop 1 to "
                f"{site.columns - 1} of the {site.columns} weights of a row, not {site.columns - self.kept(site)}."
            )

    @classmethod
    def refuses(cls, site: Site) -> str | None:
        if why := cls.unserved(site):
            return why
        return "a row of 1 weight has nothing to drop" if site.columns < 2 else None

    @classmethod
    def unasked(cls, site: Site, budget: Budget) -> str | None:
        # On MiniLM's 30,522 rows no instance came near the tiers, and each took 3 seconds to find that out.
        return "the rows of a table are read one by one, and tiers of bits fit them better" if is_table(site) else None

    @classmethod
    def space(cls, site: Site) -> Iterator[Self]:
        yield from (cls(sparsity) for sparsity in masks.sparsities(site.weight != 0))

    def kept(self, site: Site) -> int:
        """Weights a row keeps."""
        return masks.kept_of(site.columns, self.sparsity)

    def matrices(self, site: Site) -> dict[str, tuple[int, int]]:
        return {"values": (site.rows, self.kept(site))}

    def kept_bytes(self, site: Site) -> int:
        return site.rows * op.mask_bytes(site.columns)

    def error_bound(self, site: Site) -> float:
        return site.analysis(masks.Bound(self._projection(site)))

    def unstored(self, site: Site) -> Tensor:
        return site.analysis(self._projection(site)).dense()

    def factor(self, site: Site, store: Store) -> None:
        pruned = site.analysis(self._projection(site))
        store("values", *masks.for_storing(pruned, site))
        store.keep("mask", op.bits_of(pruned.keep))

    def dense(self, factors: Mapping[str, Tensor], site: Site) -> Tensor:
        weight: Tensor = op.unmask(factors["mask"], factors["values"], site.columns, 1)
        return weight

    def emit(self, graph: fx.Graph, use: Use, operands: Mapping[str, Operand], bias: fx.Node | None) -> fx.Node:
        mask, values = operands["mask"], operands["values"]

        def unmask(mask: fx.Node, values: fx.Node) -> fx.Node:
            return graph.call_function(torch.ops.fxcompress.unmask.default, (mask, values, masks.columns_of(use), 1))

        weight = Operand(
            lambda: unmask(mask.read(), values.read()), lambda ids: unmask(mask.lookup(ids), values.lookup(ids))
        )
        return Dense().emit(graph, use, {"weight": weight}, bias)

    def cost(self, use: Use, rows: int, columns: int, weight_bytes: int, itemsize: int) -> Cost:
        made = tokens_of(use) if use.kind == "embedding" else sympy.Integer(rows)
        return use_cost(use, rows, columns, weight_bytes, itemsize) + op.cost(made, columns, itemsize)

    def _projection(self, site: Site) -> Projection:
        self.check(site)
        return Projection(Pattern(self.kept(site)), self.by)
