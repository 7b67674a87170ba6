"""Two of every four (fxcompress::unmask_2_4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxcompress.codegen.ops.unmask_2_4 import PAIRS
from fxcompress.codegen.packing import unpack
from fxcompress.codegen.triton.loaders.base import TYPES, Loader


@dataclass(frozen=True)
class TwoOfFour(Loader):
    """Two kept values of every four columns. A plane is one place of the four in every group, so that it meets every
    fourth column of x:  W[:, 4 j + i] = (first_j if its place is i) + (second_j if its place is i).

    kept (rows, steps, 2, plane): the first values of a step's groups, then the second; places uint8 (rows, groups).
    """

    dtype: torch.dtype

    @property
    def label(self) -> str:
        return "2:4"

    @property
    def plane(self) -> int:
        return 32

    @property
    def planes(self) -> int:
        return 4

    @property
    def pointers(self) -> dict[str, str]:
        return {"kept": TYPES[self.dtype], "places": "u8"}

    @property
    def constants(self) -> int:
        return 2

    @property
    def steps(self) -> int:
        return -(-self.columns // self.step)

    def prepare(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        patterns, values = tensors
        groups = self.columns // 4
        short = self.steps * self.plane - groups
        pairs = pad(torch.unflatten(values, 1, (groups, 2)), (0, 0, 0, short))
        kept = torch.unflatten(pairs, 1, (self.steps, self.plane)).transpose(2, 3)
        code = torch.tensor([first | second << 2 for first, second in PAIRS], dtype=torch.uint8, device=values.device)
        places = code[unpack(patterns, 3, groups).long()]
        return kept.contiguous(), pad(places, (0, short)).contiguous()

    def load(self, prefix: str) -> list[str]:
        row, at = "rn.to(tl.int64)[:, None]", f"tl.arange(0, {self.plane})[None, :]"
        some = "mask=n_in[:, None], other=0"
        return [
            f"{prefix}first = tl.load({prefix}kept + {row} * {2 * self.plane * self.steps} + k // 2 + {at}, {some})",
            f"{prefix}second = tl.load({prefix}kept + {row} * {2 * self.plane * self.steps} + k // 2 + {self.plane} + "
            f"{at}, {some})",
            f"{prefix}place = tl.load({prefix}places + {row} * {self.plane * self.steps} + k // 4 + {at}, {some})",
        ]

    def tile(self, prefix: str, plane: int) -> str:
        first = f"tl.where(({prefix}place & 3) == {plane}, {prefix}first, 0.0)"
        return f"({first} + tl.where(({prefix}place >> 2) == {plane}, {prefix}second, 0.0)).to(FLOAT)"

    @property
    def in_order(self) -> bool:
        return False

    @property
    def most_rows(self) -> int:
        return 64

    def column(self, plane: int) -> str:
        return f"k + {plane} + 4 * tl.arange(0, {self.plane})"
