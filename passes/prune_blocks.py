"""Block pruning:  W (rows, columns)  ->  a bit a tile of block x block weights, and the tiles that stay

    y = x W^T + b     stays     y = x W'^T + b        W' = unmask(mask, values), each bit standing for a tile

Every row of tiles keeps as many as every other, so what stays is one matrix (rows, kept block), each row holding its
own part of its tiles: any storage can keep it, and a lookup gathers a row of it and the mask of its row of tiles. Tiles
are square because that is what a product can skip: block rows of it share which inputs they read, and a tile is a small
dense matrix again. The mask is next to nothing (1 / block^2 of a bit a weight); the price is that neighbours, which
have no reason to be alike in a trained weight, go together. fxcompress.passes.masks says which stay; rows are weighted
by their probability where they are looked up.

            flops               stored bits a weight
    dense   2 tokens out in     b
    here    2 tokens out in     1 / block^2 + (1 - sparsity) b

Papers: Frantar & Alistarh, SparseGPT, ICML 2023 (arXiv 2301.00774), of which this is the form for tiles; Sun et al.,
Wanda, ICLR 2024 (arXiv 2306.11695).
"""

from __future__ import annotations

import math
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

LARGEST = 16  # offered, where it divides: what matrix units multiply at once; larger tiles lose more


@dataclass(frozen=True)
class PruneBlocks(Structure):
    """The share `sparsity` of the `block` x `block` tiles dropped, chosen `by` one of masks.CRITERIA."""

    name: ClassVar[str] = "prune_blocks"
    paper: ClassVar[str] = "arXiv 2301.00774"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "embedding", "tied", "convolution")

    sparsity: float
    block: int = 16
    by: str = "sparsegpt"

    def __post_init__(self) -> None:
        masks.check_share(self.name, self.sparsity)
        masks.check_criterion(self.name, self.by)
        if not isinstance(self.block, int) or self.block < 2:
            raise SpecError(f"{self.name} block={self.block!r} must be a whole number of at least 2.")

    def check(self, site: Site) -> None:
        where = f"{self} at {site.name}: the weight is {site.rows} x {site.columns}"
        both = math.gcd(site.rows, site.columns)
        if both % self.block:
            allowed = ", ".join(str(d) for d in range(2, both + 1) if both % d == 0) or "none"
            raise SpecError(f"{where}, and block must divide both sizes: allowed are {allowed}.")
        tiles = site.columns // self.block
        if not 0 < self.kept(site) < tiles:
            raise SpecError(
                f"{where}, so sparsity must drop 1 to {tiles - 1} of the {tiles} tiles of a row, "
                f"not {tiles - self.kept(site)}."
            )

    @classmethod
    def refuses(cls, site: Site) -> str | None:
        if why := cls.unserved(site):
            return why
        if _offered(site) is None:
            return f"a {site.rows} x {site.columns} weight does not divide into square tiles, several a row"
        return None

    @classmethod
    def unasked(cls, site: Site, budget: Budget) -> str | None:
        """On MiniLM half the tiles are 13 % of a weight's squared output, where half of each row is 2 %."""
        block = _offered(site)
        if block is None or bool(_tiles(site, block).all()):
            return "none of its tiles is zero, and trained weights hardly spare whole tiles; it is offered by name"
        return None

    @classmethod
    def space(cls, site: Site) -> Iterator[Self]:
        block = _offered(site)
        if block is not None:
            yield from (cls(sparsity, block) for sparsity in masks.sparsities(_tiles(site, block)))

    def kept(self, site: Site) -> int:
        """Tiles a row of tiles keeps."""
        return masks.kept_of(site.columns // self.block, self.sparsity)

    def matrices(self, site: Site) -> dict[str, tuple[int, int]]:
        return {"values": (site.rows, self.kept(site) * self.block)}

    def kept_bytes(self, site: Site) -> int:
        return site.rows // self.block * op.mask_bytes(site.columns // self.block)

    def error_bound(self, site: Site) -> float:
        return site.analysis(masks.Bound(self._projection(site)))

    def unstored(self, site: Site) -> Tensor:
        return site.analysis(self._projection(site)).dense()

    def factor(self, site: Site, store: Store) -> None:
        pruned = site.analysis(self._projection(site))
        store("values", *masks.for_storing(pruned, site))
        store.keep("mask", op.bits_of(pruned.keep[:: self.block, :: self.block]))

    def dense(self, factors: Mapping[str, Tensor], site: Site) -> Tensor:
        mask = factors["mask"].repeat_interleave(self.block, 0)
        weight: Tensor = op.unmask(mask, factors["values"], site.columns, self.block)
        return weight

    def emit(self, graph: fx.Graph, use: Use, operands: Mapping[str, Operand], bias: fx.Node | None) -> fx.Node:
        aten, mask, values = torch.ops.aten, operands["mask"], operands["values"]

        def dense(mask: fx.Node, values: fx.Node) -> fx.Node:
            args = (mask, values, masks.columns_of(use), self.block)
            return graph.call_function(torch.ops.fxcompress.unmask.default, args)

        def read() -> fx.Node:
            rows = graph.call_function(aten.repeat_interleave.self_int, (mask.read(), self.block, 0))
            return dense(rows, values.read())

        def lookup(ids: fx.Node) -> fx.Node:
            tile_row = graph.call_function(aten.floor_divide.default, (ids, self.block))
            tile_row.meta["val"] = ids.meta["val"]  # of the same shape and dtype
            return dense(mask.lookup(tile_row), values.lookup(ids))

        return Dense().emit(graph, use, {"weight": Operand(read, lookup)}, bias)

    def cost(self, use: Use, rows: int, columns: int, weight_bytes: int, itemsize: int) -> Cost:
        made = tokens_of(use) if use.kind == "embedding" else sympy.Integer(rows)
        return use_cost(use, rows, columns, weight_bytes, itemsize) + op.cost(made, columns, itemsize)

    def _projection(self, site: Site) -> Projection:
        self.check(site)
        return Projection(Pattern(self.kept(site), tile=self.block), self.by)


def _offered(site: Site) -> int | None:
    """The largest block, up to LARGEST, that divides the weight into several tiles a row."""
    both = math.gcd(site.rows, site.columns)
    return next((b for b in range(LARGEST, 1, -1) if both % b == 0 and b < site.columns), None)


def _tiles(site: Site, block: int) -> Tensor:
    """Which tiles are not all zeros: bool (rows / block, columns / block)."""
    tiles = (site.weight != 0).reshape(site.rows // block, block, site.columns // block, block)
    return tiles.any(3).any(1)
