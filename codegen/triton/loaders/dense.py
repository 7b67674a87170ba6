"""Floats as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.codegen.triton.loaders.base import TYPES, Loader


@dataclass(frozen=True)
class Dense(Loader):
    """A weight of any floating dtype, made that of x tile by tile."""

    dtype: torch.dtype
    width: int = 64
    whole: bool = True  # False: a step may start where less than a step is left, though all columns are whole steps

    @property
    def label(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def plane(self) -> int:
        return self.width

    @property
    def planes(self) -> int:
        return 1

    @property
    def pointers(self) -> dict[str, str]:
        return {"weight": TYPES[self.dtype]}

    @property
    def constants(self) -> int:
        return 1

    def prepare(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        (weight,) = tensors
        return (weight.contiguous(),)

    def in_chunks(self, columns: int) -> Dense:
        return dataclasses.replace(self, whole=columns % self.step == 0)

    def load(self, prefix: str) -> list[str]:
        inside = "" if self.whole and self.columns % self.step == 0 else f" & ({prefix}c < {self.columns})[None, :]"
        return [
            f"{prefix}c = k + tl.arange(0, {self.plane})",
            f"{prefix}tile = tl.load({prefix}weight + rn.to(tl.int64)[:, None] * {self.columns} + {prefix}c[None, :], "
            f"mask=n_in[:, None]{inside}, other=0.0)",
        ]

    def tile(self, prefix: str, plane: int) -> str:
        return f"{prefix}tile.to(FLOAT)"
