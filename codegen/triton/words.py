"""Codes in 32-bit words, in the order in which tensor cores take them.

A weight (rows, columns) is walked in steps; a step of S = 2 P W columns is W words. Each half of a word holds P codes:

    word j = sum_i  code[2 W i + 2 j] 2^(b i)  +  code[2 W i + 2 j + 1] 2^(16 + b i)        i = 0 .. P - 1,  P = 16 // b

So plane i of a step, its columns 2 W i .. 2 W (i + 1), comes out of every word by one shift and one mask, as two 16-bit
floats that already lie beside each other: 1.7 to 1.8 integer instructions a weight in the whole loop at 4 bits on sm_90
(`fxcompress kernels` counts them). Three bits leave one bit of each half unused.

    bits                 2     3     4    8
    planes P             8     5     4    2
    stored bits      2.000 3.200 4.000 8.000

`fxcompress.codegen.packing` is how files keep codes; this is how a GPU reads them. The last step is filled up with
zero codes: whatever they stand for meets activations that are masked to zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.core.errors import SpecError

PLANES = {2: 8, 3: 5, 4: 4, 8: 2}


@dataclass(frozen=True)
class Words:
    """How codes of `bits` bits lie in words; `width` words a step."""

    bits: int
    width: int = 16

    def __post_init__(self) -> None:
        if self.bits not in PLANES:
            raise SpecError(f"words of {self.bits} bits: allowed are {', '.join(map(str, PLANES))}.")

    @property
    def planes(self) -> int:
        return PLANES[self.bits]

    @property
    def plane(self) -> int:
        """Columns of one plane of a step."""
        return 2 * self.width

    @property
    def step(self) -> int:
        """Columns of a step."""
        return self.planes * self.plane

    def steps(self, columns: int) -> int:
        return -(-columns // self.step)

    def pack(self, codes: Tensor) -> Tensor:
        """uint8 (rows, columns), each below 2**bits -> int32 (rows, steps width)."""
        rows, columns = codes.shape
        padded = torch.nn.functional.pad(codes, (0, self.steps(columns) * self.step - columns)).to(torch.int64)
        by_plane = padded.view(rows, -1, self.planes, self.width, 2)
        shifts = self.bits * torch.arange(self.planes, device=codes.device).view(-1, 1, 1)
        halves = (by_plane << shifts).sum(2)  # (rows, steps, width, 2)
        return (halves[..., 0] | halves[..., 1] << 16).to(torch.int32).flatten(1).contiguous()

    def unpack(self, words: Tensor, columns: int) -> Tensor:
        """The inverse: uint8 (rows, columns)."""
        halves = torch.stack([words & 0xFFFF, words >> 16 & 0xFFFF], -1).view(len(words), -1, 1, self.width, 2)
        shifts = self.bits * torch.arange(self.planes, device=words.device, dtype=torch.int32).view(-1, 1, 1)
        return (halves >> shifts & (1 << self.bits) - 1).to(torch.uint8).flatten(1)[:, :columns]
