"""Kept values and a bit a column (fxcompress::unmask with masks of their own for each row).

    word (rows, columns / 32)    bit j of a word: column j of its 32 is kept
    W[r, 32 w + j]  =  values[start + popcount(word & (2^j - 1))]   where bit j is set, else 0

So every lane finds its value by one population count, and neighbours read neighbours: a plane of 32 columns is one or
two stretches of memory. Starts are kept for steps of four words, and counted on inside. Read: `share` b + 1.125 bits a
weight, `share` the kept ones, b their bits.

NB: this saves memory and no time. A value of 16 bits cannot be copied asynchronously, nor lie beside its neighbour in a
register: 7.1 integer instructions a weight on sm_90 at 16 tokens (0.4 of a dense one), which bounds it at 55 % of the
bandwidth, where half of the weights are 57 % of the bytes. A population count a weight alone allows 99 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxcompress.codegen.packing import unpack
from fxcompress.codegen.triton.loaders.base import TYPES, Loader
from fxcompress.core.errors import SpecError

WORD, WORDS = 32, 4  # columns of a word, words of a step
MOST = 2**16 - 1  # kept values of a row: starts are 16 bits


@dataclass(frozen=True)
class Masked(Loader):
    """`kept` values of each row; a bit of the op's mask stands for `unit` columns, a row of it for `repeats` rows."""

    dtype: torch.dtype
    kept: int
    unit: int = 1
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.kept > MOST:
            raise SpecError(f"rows of {self.kept} kept values cannot be read: at most {MOST}.")

    @property
    def label(self) -> str:
        return "mask"

    @property
    def plane(self) -> int:
        return WORD

    @property
    def planes(self) -> int:
        return WORDS

    @property
    def pointers(self) -> dict[str, str]:
        return {"masks": "i32", "starts": "i16", "kept": TYPES[self.dtype]}

    @property
    def constants(self) -> int:
        return 2

    @property
    def steps(self) -> int:
        return -(-self.columns // self.step)

    def prepare(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        mask, values = tensors
        keep = unpack(mask, 1, self.columns // self.unit).repeat_interleave(self.unit, 1)
        keep = pad(keep.repeat_interleave(self.repeats, 0), (0, self.steps * self.step - self.columns))
        bits = keep.view(self.rows, -1, WORD).long()
        words = (bits << torch.arange(WORD, device=mask.device)).sum(-1)
        counts = keep.view(self.rows, self.steps, self.step).sum(-1, dtype=torch.int64)
        return words.to(torch.int32), (counts.cumsum(1) - counts).to(torch.int16), values.contiguous()

    def load(self, prefix: str) -> list[str]:
        row = "rn.to(tl.int64)"
        start = f"tl.load({prefix}starts + {row} * {self.steps} + k // {self.step}, mask=n_in, other=0)"
        lines = [f"{prefix}at0 = {row} * {self.kept} + ({start}.to(tl.int32) & 0xFFFF)"]
        for i in range(WORDS):
            at = f"{row} * {self.steps * WORDS} + (k // {WORD} + {i})"
            lines.append(f"{prefix}word{i} = tl.load({prefix}masks + {at}, mask=n_in, other=0)")
        for i in range(1, WORDS):
            lines.append(f"{prefix}at{i} = {prefix}at{i - 1} + parts.popcount({prefix}word{i - 1})")
        return lines

    def tile(self, prefix: str, plane: int) -> str:
        return f"parts.kept({prefix}kept, {prefix}at{plane}, {prefix}word{plane}, FLOAT)"
