"""Codes of 2, 3, 4 or 8 bits in words, a scale and a zero a group of columns (fxcompress::dequantize)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.codegen.packing import unpack
from fxcompress.codegen.triton.loaders.base import WordLoader
from fxcompress.codegen.triton.words import Words
from fxcompress.core.errors import SpecError


@dataclass(frozen=True)
class Quantized(WordLoader):
    """Codes of 2, 3, 4 or 8 bits in words; a scale and a zero a group of `group` columns, 0 for the whole row.

    W = s (Q - z). Unpacking gives Q - c, c the middle of the codes, and one packed addition for two weights Q - z,
    which is exact up to 4 bits: at most 16, in steps of 1/4. Eight bits have no such room in bfloat16, and take
    W x = s (Q - c) x + s (c - z) sum(x)  instead. (In this way 4 bits in groups of 64 took 2.4 integer instructions a
    weight instead of 1.8 at 16 tokens, and 8.1 instead of 2.2 at 64: the sum of x crosses lanes.)

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
    def label(self) -> str:
        return f"int{self.bits}" + (f" g{self.group}" if self.group else "") + ("" if self.zeros else " symmetric")

    @property
    def words(self) -> Words:
        return Words(self.bits, self.width)

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

    def tile(self, prefix: str, plane: int) -> str:
        codes = f"parts.word_plane({prefix}word, {plane}, {self.bits}, FLOAT)"
        return codes if self.needs_total else f"({codes} + {prefix}shift.to(FLOAT)[:, None])"

    @property
    def most_tokens(self) -> int:
        return 32 if self.bits == 2 else 64

    def runs(self) -> list[range]:
        if not self.group:
            return []
        if self.group % self.step == 0:
            return [range(self.planes)]
        shared = self.group // self.plane if self.step % self.group == 0 else 1
        return [range(i, i + shared) for i in range(0, self.planes, shared)]

    def once(self, prefix: str) -> list[str]:
        return [] if self.group else self._marks(prefix, "rn", "n_in")

    def begin(self, prefix: str, plane: int) -> list[str]:
        first = f"(k + {plane * self.plane})"
        # The last step may start more groups than there are.
        inside = "n_in" if self.columns % self.step == 0 else f"n_in & ({first} < {self.columns})"
        return self._marks(prefix, f"{first} // {self.group} * {self.rows} + rn", inside)

    def scaled(self, prefix: str, product: str, total: str) -> str:
        whole = f"({product} + {prefix}shift[:, None] * {total}[None, :])" if self.needs_total else product
        return f"{whole} * {prefix}scale[:, None]"

    @property
    def needs_total(self) -> bool:
        return self.bits == 8

    def _marks(self, prefix: str, at: str, inside: str) -> list[str]:
        """scale and shift = c - z of one group, (BLOCK_N,)."""
        return [
            f"{prefix}mark = tl.load({prefix}marks + {at}, mask={inside}, other=0)",
            f"{prefix}scale = tl.exp2(tl.load({prefix}grid) + tl.load({prefix}grid + 1) * "
            f"({prefix}mark & 255).to(tl.float32))",
            f"{prefix}shift = {2 ** (self.bits - 1) + 0.5} - {2**self.bits / 16} * ({prefix}mark >> 8).to(tl.float32)",
        ]
