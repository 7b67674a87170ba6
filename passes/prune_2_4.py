"""Two of every four:  W (rows, columns)  ->  two kept weights of each group of four columns, and which two

    y = x W^T + b     stays     y = x W'^T + b        W' = unmask_2_4(patterns, values)

The pattern of sparse tensor cores. The kept weights are one matrix (rows, columns / 2) that any storage can keep; which
of the six pairs they are takes 3 bits a group (fxcompress.codegen.ops.unmask_2_4). fxcompress.passes.masks says which
stay.

            flops               stored bits a weight
    dense   2 tokens out in     b
    here    2 tokens out in     3/4 + b / 2

Papers: Frantar & Alistarh, SparseGPT, ICML 2023 (arXiv 2301.00774); Sun et al., Wanda, ICLR 2024 (arXiv 2306.11695).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import sympy
import torch
from torch import Tensor, fx

from fxcompress.codegen.ops import unmask, unmask_2_4
from fxcompress.core.budget import Budget
from fxcompress.core.cost import Cost
from fxcompress.core.errors import SpecError
from fxcompress.core.rewrite import Operand, Store, Structure
from fxcompress.core.site import Site, Use, tokens_of, use_cost
from fxcompress.passes import masks
from fxcompress.passes.dense import Dense
from fxcompress.passes.masks import Pattern, Projection
from fxcompress.passes.quantize import is_table

PATTERN = Pattern(kept=2, group=4)


@dataclass(frozen=True)
class Prune24(Structure):
    """Two of every four neighbours in a row, chosen `by` one of masks.CRITERIA."""

    name: ClassVar[str] = "prune_2_4"
    paper: ClassVar[str] = "arXiv 2301.00774"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "embedding", "tied", "convolution")

    by: str = "sparsegpt"

    def __post_init__(self) -> None:
        masks.check_criterion(self.name, self.by)

    def check(self, site: Site) -> None:
        if site.columns % PATTERN.group:
            raise SpecError(
                f"{self} at {site.name}: the weight is {site.rows} x {site.columns}, and columns must be a multiple "
                f"of {PATTERN.group}."
            )

    @classmethod
    def refuses(cls, site: Site) -> str | None:
        if why := cls.unserved(site):
            return why
        if site.columns % PATTERN.group:
            return f"a row of {site.columns} weights does not divide into groups of {PATTERN.group}"
        return None

    @classmethod
    def unasked(cls, site: Site, budget: Budget) -> str | None:
        # On MiniLM's 30,522 rows no instance came near the tiers, and each took 3 seconds to find that out.
        return "the rows of a table are read one by one, and tiers of bits fit them better" if is_table(site) else None

    @classmethod
    def space(cls, site: Site) -> Iterator[Self]:
        yield cls()

    def matrices(self, site: Site) -> dict[str, tuple[int, int]]:
        return {"values": (site.rows, site.columns // 2)}

    def kept_bytes(self, site: Site) -> int:
        return site.rows * unmask_2_4.pattern_bytes(site.columns)

    def error_bound(self, site: Site) -> float:
        return site.analysis(masks.Bound(self._projection(site)))

    def unstored(self, site: Site) -> Tensor:
        return site.analysis(self._projection(site)).dense()

    def factor(self, site: Site, store: Store) -> None:
        pruned = site.analysis(self._projection(site))
        store("values", *masks.for_storing(pruned, site))
        store.keep("patterns", unmask_2_4.patterns_of(pruned.keep))

    def dense(self, factors: Mapping[str, Tensor], site: Site) -> Tensor:
        weight: Tensor = unmask_2_4.unmask_2_4(factors["patterns"], factors["values"])
        return weight

    def emit(self, graph: fx.Graph, use: Use, operands: Mapping[str, Operand], bias: fx.Node | None) -> fx.Node:
        patterns, values = operands["patterns"], operands["values"]

        def dense(patterns: fx.Node, values: fx.Node) -> fx.Node:
            return graph.call_function(torch.ops.fxcompress.unmask_2_4.default, (patterns, values))

        weight = Operand(
            lambda: dense(patterns.read(), values.read()), lambda ids: dense(patterns.lookup(ids), values.lookup(ids))
        )
        return Dense().emit(graph, use, {"weight": weight}, bias)

    def cost(self, use: Use, rows: int, columns: int, weight_bytes: int, itemsize: int) -> Cost:
        made = tokens_of(use) if use.kind == "embedding" else sympy.Integer(rows)
        return use_cost(use, rows, columns, weight_bytes, itemsize) + unmask.cost(made, columns, itemsize)

    def _projection(self, site: Site) -> Projection:
        self.check(site)
        return Projection(PATTERN, self.by)
