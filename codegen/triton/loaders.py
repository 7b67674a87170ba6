"""Loaders: how a tile of a weight (rows, columns) gets onto the chip, as lines of a kernel.

A main loop walks the columns in steps. In each it asks the loader for `planes` tiles (BLOCK_N, plane) one after the
other, multiplies each with the activations of the same columns, and hands what a run of planes added up to back to the
loader, because a scale that a run shares need not be multiplied into its weights:

    W = s (Q - z)     W x = s (Q - c) x + s (c - z) sum(x)     c: the middle of the codes, which unpacking takes off

Lines use these names of the kernel:  rn, n_in (BLOCK_N,) rows and whether they exist;  k, the first column of the step;
FLOAT, the type of x;  K.  Those a loader makes start with its prefix.

`prepare` says once, when a graph is lowered, how the constants of the op lie in GPU memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxcompress.codegen.packing import unpack
from fxcompress.codegen.spec import Argument, Call, Constant
from fxcompress.codegen.triton.words import Words
from fxcompress.core.errors import SpecError

TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int16: "i16",
    torch.uint8: "u8", torch.int8: "i8",
}  # fmt: skip


@dataclass(frozen=True)
class Loader(ABC):
    """A weight (rows, columns), in one way of keeping it."""

    rows: int
    columns: int

    @property
    @abstractmethod
    def plane(self) -> int:
        """Columns of a tile."""

    @property
    @abstractmethod
    def planes(self) -> int:
        """Tiles of a step."""

    @property
    def step(self) -> int:
        """Columns of a step."""
        return self.plane * self.planes

    @property
    @abstractmethod
    def pointers(self) -> dict[str, str]:
        """What `prepare` makes: name -> Triton type."""

    @property
    @abstractmethod
    def constants(self) -> int:
        """How many constants of the op `prepare` takes."""

    @abstractmethod
    def prepare(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The op's constants -> the kernel's, in the order of `pointers`."""

    @abstractmethod
    def load(self, prefix: str) -> list[str]:
        """Once a step, before its tiles."""

    @abstractmethod
    def tile(self, prefix: str, plane: int) -> str:
        """An expression, (BLOCK_N, plane) of FLOAT."""

    def runs(self) -> list[range]:
        """Planes that share a scale; each run ends with `scaled`. No run: nothing is scaled within the loop."""
        return []

    def scaled(self, prefix: str, plane: int, product: str, total: str) -> tuple[list[str], str]:
        """-> (lines, the expression to add to the result) once `product` (BLOCK_N, BLOCK_M) and `total` (BLOCK_M,), the
        sum of the activations, are those of a run that starts at `plane`, or of all columns where there are no runs."""
        return [], product

    @property
    def needs_total(self) -> bool:
        """True if `scaled` reads `total`."""
        return False


@dataclass(frozen=True)
class Dense(Loader):
    """Floats as they are."""

    dtype: torch.dtype

    @property
    def plane(self) -> int:
        return 64

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

    def load(self, prefix: str) -> list[str]:
        inside = "" if self.columns % self.step == 0 else f" & ({prefix}c < {self.columns})[None, :]"
        return [
            f"{prefix}c = k + tl.arange(0, {self.plane})",
            f"{prefix}tile = tl.load({prefix}weight + rn.to(tl.int64)[:, None] * {self.columns} + {prefix}c[None, :], "
            f"mask=n_in[:, None]{inside}, other=0.0)",
        ]

    def tile(self, prefix: str, plane: int) -> str:
        return f"{prefix}tile.to(FLOAT)"


@dataclass(frozen=True)
class Quantized(Loader):
    """Codes of 2, 3, 4 or 8 bits in words; a scale and a zero a group of `group` columns, 0 for the whole row.

    marks int16 (groups, rows): the code of the scale, and 256 times the code of the zero (fxcompress::dequantize).
    """

    bits: int
    group: int
    zeros: bool
    width: int = 16

    def __post_init__(self) -> None:
        if self.group and self.group % self.plane:
            raise SpecError(f"groups of {self.group} columns cannot be read in planes of {self.plane}.")

    @property
    def words(self) -> Words:
        return Words(self.bits, self.width)

    @property
    def plane(self) -> int:
        return self.words.plane

    @property
    def planes(self) -> int:
        return self.words.planes

    @property
    def pointers(self) -> dict[str, str]:
        return {"words": "i32", "marks": "i16", "grid": "fp32"}

    @property
    def groups(self) -> int:
        return -(-self.columns // self.group) if self.group else 1

    @property
    def constants(self) -> int:
        return 4 if self.zeros else 3

    def prepare(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        codes, scales, *rest = tensors
        zeros, grid = unpack(rest[0], 4, self.groups) if self.zeros else torch.full_like(scales, 8), rest[-1]
        marks = scales.to(torch.int16) | zeros.to(torch.int16) << 8
        return self.words.pack(unpack(codes, self.bits, self.columns)), marks.T.contiguous(), grid

    def load(self, prefix: str) -> list[str]:
        length = self.words.steps(self.columns) * self.width
        return [
            f"{prefix}word = tl.load({prefix}words + rn.to(tl.int64)[:, None] * {length} + "
            f"(k // {self.step} * {self.width} + tl.arange(0, {self.width}))[None, :], mask=n_in[:, None], other=0)"
        ]

    def tile(self, prefix: str, plane: int) -> str:
        return f"parts.word_plane({prefix}word, {plane}, {self.bits}, FLOAT)"

    def runs(self) -> list[range]:
        if not self.group:
            return []
        if self.group % self.step == 0:
            return [range(self.planes)]
        shared = self.group // self.plane if self.step % self.group == 0 else 1
        return [range(i, i + shared) for i in range(0, self.planes, shared)]

    def scaled(self, prefix: str, plane: int, product: str, total: str) -> tuple[list[str], str]:
        group = f"(k + {plane * self.plane}) // {self.group} * {self.rows} + rn" if self.group else "rn"
        inside = "n_in"
        if self.group and self.columns % self.step:  # the last step may start more groups than there are
            inside += f" & (k + {plane * self.plane} < {self.columns})"
        lines = [
            f"{prefix}mark = tl.load({prefix}marks + {group}, mask={inside}, other=0)",
            f"{prefix}scale = tl.exp2(tl.load({prefix}grid) + tl.load({prefix}grid + 1) * "
            f"({prefix}mark & 255).to(tl.float32))",
            f"{prefix}shift = {2 ** (self.bits - 1) + 0.5} - {2**self.bits / 16} * ({prefix}mark >> 8).to(tl.float32)",
        ]
        return lines, f"({product} + {prefix}shift[:, None] * {total}[None, :]) * {prefix}scale[:, None]"

    @property
    def needs_total(self) -> bool:
        return True


def loader_of(weight: Argument) -> Loader:
    """The loader of a product's weight as a spec writes it. Raises `SpecError`."""
    match weight:
        case Constant(dtype, (rows, columns)) if dtype in (torch.float16, torch.bfloat16, torch.float32):
            return Dense(rows, columns, dtype)
        case Call("dequantize", (Constant(_, (rows, _)), _, zeros, _), named):
            given: dict[str, Any] = dict(named)
            return Quantized(rows, given["columns"], given["bits"], given["group_size"], zeros is not None)
        case Call(name):
            raise SpecError(f"there is no loader for {name}.")
    raise SpecError(f"there is no loader for {weight}.")
