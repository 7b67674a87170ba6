"""Tiles that stay (fxcompress::unmask with one mask for `tile` rows): a small dense weight that skips what x it can.

    W[r, tile p + j]  =  V[r, tile i + j]      p = places[r // tile, i], the i-th kept tile of the row of tiles

V (rows, kept) is a weight like any other, in any storage; all that is particular is which columns of x it meets. So the
loop walks the kept columns alone, with the loader of V, and looks up where in x each run of `tile` of them lies. A
program takes one row of tiles, because all its rows must meet the same x: BLOCK_N = tile, and many programs.

On sm_90 at 16 tokens, tiles of 16 and one warp a program, 0.75 integer instructions a kept weight of 16 bits and 2.4 of
4 bits: 100 % and 62 % of the bandwidth at most. Two warps or four share a tile too small for them (4 bits: 31 %, 16 %).

Read: b kept / columns + 32 / tile^2 bits a weight, b the bits of V's storage; multiplied: kept / columns of the dense
product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from fxcompress.codegen.packing import unpack
from fxcompress.codegen.triton.loaders.base import Loader
from fxcompress.core.errors import SpecError


@dataclass(frozen=True)
class Tiles(Loader):
    """`values` is the loader of V; only gemm reads it, whose `pn` is the row of tiles."""

    values: Loader
    tile_rows: int

    def __post_init__(self) -> None:
        if self.values.columns % self.tile_rows:
            raise SpecError(f"{self.values.columns} kept columns are no whole number of tiles of {self.tile_rows}.")

    @property
    def label(self) -> str:
        return f"tiles of {self.tile_rows}, {self.values.label}"

    @property
    def plane(self) -> int:
        return self.values.plane

    @property
    def planes(self) -> int:
        return self.values.planes

    @property
    def walked(self) -> int:
        return self.values.columns

    @property
    def together(self) -> int:
        return self.tile_rows

    @property
    def pointers(self) -> dict[str, str]:
        return {"places": "i32", **self.values.pointers}

    @property
    def constants(self) -> int:
        return 1 + self.values.constants

    @property
    def slots(self) -> int:
        """Places of a row of tiles, those of a last step that is not full too."""
        return -(-(-(-self.walked // self.step) * self.step) // self.tile_rows)

    def prepare(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        mask, *values = tensors
        tiles, kept = self.columns // self.tile_rows, self.walked // self.tile_rows
        keep = unpack(mask, 1, tiles).bool()  # (rows / tile, columns / tile)
        places = keep.nonzero()[:, 1].view(-1, kept)
        # Past the last: a tile beyond the columns, where x is masked to zero.
        return pad(places, (0, self.slots - kept), value=tiles).int().contiguous(), *self.values.prepare(values)

    def load(self, prefix: str) -> list[str]:
        return self.values.load(prefix)

    def tile(self, prefix: str, plane: int) -> str:
        return self.values.tile(prefix, plane)

    def column(self, plane: int) -> str:
        at = f"({self.values.column(plane)})"
        # A plane may start inside a tile, or take every fourth column.
        near = math.gcd(self.plane, self.tile_rows) if self.values.in_order else 1
        return f"parts.column_of(w_places + pn * {self.slots}, {at}, {self.tile_rows}, {near})"

    @property
    def in_order(self) -> bool:
        return False

    def runs(self) -> list[range]:
        return self.values.runs()

    def once(self, prefix: str) -> list[str]:
        return self.values.once(prefix)

    def begin(self, prefix: str, plane: int) -> list[str]:
        return self.values.begin(prefix, plane)

    def scaled(self, prefix: str, product: str, total: str) -> str:
        return self.values.scaled(prefix, product, total)

    @property
    def needs_total(self) -> bool:
        return self.values.needs_total
