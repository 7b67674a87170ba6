"""Loaders: how a tile of a weight (rows, columns) gets onto the chip, as lines of a kernel.

A main loop walks the columns in steps. In each it asks the loader for `planes` tiles (BLOCK_N, plane) one after the
other, multiplies each with the activations of the same columns, and hands what a run of planes added up to back to the
loader, because a scale that a run shares need not be multiplied into its weights.

Lines use these names of the kernel:  rn, n_in (BLOCK_N,) rows and whether they exist;  k, the first column of the step;
FLOAT, the type of x;  K.  Those a loader makes start with its prefix.

`prepare` says once, when a graph is lowered, how the constants of the op lie in GPU memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.codegen.triton.words import Words
from fxcompress.core.errors import SpecError

TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int16: "i16",
    torch.uint8: "u8", torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip


@dataclass(frozen=True)
class Loader(ABC):
    """A weight (rows, columns), in one way of keeping it."""

    rows: int
    columns: int

    @property
    @abstractmethod
    def label(self) -> str:
        """How it is kept, in a word or two: tables of launch configs go by it."""

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

    def column(self, plane: int) -> str:
        """An expression, (plane,): the columns that a tile meets."""
        return f"k + {plane * self.plane} + tl.arange(0, {self.plane})"

    def in_chunks(self, columns: int) -> Loader:
        """The same weight for a loop that walks chunks of so many columns, each from its beginning. Raises `SpecError`
        where that is no whole number of steps and a step cannot end early."""
        if columns % self.step:
            raise SpecError(
                f"chunks of {columns} columns cannot be read in steps of {self.step} by {type(self).__name__}; store "
                "the weight in another way."
            )
        return self

    @property
    def walked(self) -> int:
        """Columns that the loop goes through: those that are kept."""
        return self.columns

    @property
    def together(self) -> int | None:
        """How many rows a program takes, where others would meet other columns."""
        return None

    @property
    def in_order(self) -> bool:
        """True if a tile meets neighbouring columns, plane after plane."""
        return True

    @property
    def most_rows(self) -> int:
        """BLOCK_N beyond which registers spill on some card."""
        return 128

    @property
    def most_tokens(self) -> int:
        """BLOCK_M beyond which they do."""
        return 64

    def runs(self) -> list[range]:
        """Planes that share a scale; each run starts with `begin` and ends with `scaled`. None: one scale for all."""
        return []

    def once(self, prefix: str) -> list[str]:
        """Before the loop."""
        return []

    def begin(self, prefix: str, plane: int) -> list[str]:
        """Before a run that starts at `plane`."""
        return []

    def scaled(self, prefix: str, product: str, total: str) -> str:
        """What to add to the result once `product` (BLOCK_N, BLOCK_M) and `total` (BLOCK_M,), the sum of the
        activations, are those of a run, or of all columns where there are no runs."""
        return product

    @property
    def needs_total(self) -> bool:
        """True if `scaled` reads `total`."""
        return False


@dataclass(frozen=True)
class WordLoader(Loader):
    """A weight kept in 32-bit words; a subclass has `{prefix}words` among its pointers."""

    @property
    @abstractmethod
    def words(self) -> Words:
        """How they lie."""

    @property
    def plane(self) -> int:
        return self.words.plane

    @property
    def planes(self) -> int:
        return self.words.planes

    def load(self, prefix: str) -> list[str]:
        width = self.words.width
        length = self.words.steps(self.columns) * width
        return [
            f"{prefix}word = tl.load({prefix}words + rn.to(tl.int64)[:, None] * {length} + "
            f"(k // {self.step} * {width} + tl.arange(0, {width}))[None, :], mask=n_in[:, None], other=0)"
        ]
