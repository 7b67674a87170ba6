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

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from fxcompress.codegen.ops import unmask
from fxcompress.core.budget import Budget
from fxcompress.core.errors import SpecError
from fxcompress.core.rewrite import Operand
from fxcompress.core.site import Site
from fxcompress.passes import masks
from fxcompress.passes.masks import Pattern
from fxcompress.passes.pruning import Pruning

LARGEST = 16  # offered, where it divides: what matrix units multiply at once; larger tiles lose more


@dataclass(frozen=True)
class PruneBlocks(Pruning):
    """The share `sparsity` of the `block` x `block` tiles dropped, chosen `by` one of masks.CRITERIA."""

    name: ClassVar[str] = "prune_blocks"
    keeps: ClassVar[tuple[str, ...]] = ("mask",)
    op: ClassVar[OpOverload] = torch.ops.fxcompress.unmask.default

    sparsity: float
    block: int = 16
    by: str = "sparsegpt"

    def __post_init__(self) -> None:
        masks.check_share(self.name, self.sparsity)
        super().__post_init__()
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
        return site.rows // self.block * unmask.mask_bytes(site.columns // self.block)

    def pattern(self, site: Site) -> Pattern:
        return Pattern(self.kept(site), tile=self.block)

    def packed(self, keep: Tensor) -> Tensor:
        return unmask.bits_of(keep[:: self.block, :: self.block])

    def constants(self, columns: int) -> tuple[int, ...]:
        return columns, self.block

    def dense(self, factors: Mapping[str, Tensor], site: Site) -> Tensor:
        return super().dense({**factors, "mask": factors["mask"].repeat_interleave(self.block, 0)}, site)

    def row_by_row(self, graph: fx.Graph, which: Operand) -> Operand:
        """A row of the mask stands for a row of tiles."""
        aten = torch.ops.aten

        def read() -> fx.Node:
            return graph.call_function(aten.repeat_interleave.self_int, (which.read(), self.block, 0))

        def lookup(ids: fx.Node) -> fx.Node:
            tile_row = graph.call_function(aten.floor_divide.default, (ids, self.block))
            tile_row.meta["val"] = ids.meta["val"]  # of the same shape and dtype
            return which.lookup(tile_row)

        return Operand(read, lookup)


def _offered(site: Site) -> int | None:
    """The largest block, up to LARGEST, that divides the weight into several tiles a row."""
    both = math.gcd(site.rows, site.columns)
    return next((b for b in range(LARGEST, 1, -1) if both % b == 0 and b < site.columns), None)


def _tiles(site: Site, block: int) -> Tensor:
    """Which tiles are not all zeros: bool (rows / block, columns / block)."""
    tiles = (site.weight != 0).reshape(site.rows // block, block, site.columns // block, block)
    return tiles.any(3).any(1)
