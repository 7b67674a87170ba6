"""The grid a matrix is rounded to: what its scales and zeros may be, and how they are kept.

    w' = s (q - z)        q in 0 .. 2^bits - 1,   s and z one for a group of a row

    scales   logarithmic      s = 2^(base + step code), 256 codes over the octaves there are
             powers of two    the same with an integer base and step 1: reading is a shift (BCT, arXiv 2304.01483)
    zeros    sixteenths       z = 2^bits code / 16 - 1/2
             the middle       z = 2^(bits-1) - 1/2, the same everywhere, so none is kept

Scales and zeros are kept in 8 and 4 bits (fxcompress.codegen.ops.dequantize), so a scale can be off by half a step of
its logarithm; rounding happens against what is kept. Everything works on X = W^T (columns, rows).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SCALE_LEVELS = 255
SCALE_OCTAVES = 16.0  # scales below 2^-16 of the largest are rounded up to it; what they hold does not matter
ROW_CHUNK = 8192  # rows worked on at once: bounds memory at a few times 8192 columns floats


class Scales(NamedTuple):
    """A family of scales."""

    around: Callable[[Tensor], tuple[Tensor, ...]]  # a scale -> those of the family to weigh in its place
    levels: Callable[[float, float], tuple[float, float]]  # log2 of the smallest, largest -> base, step


class Zeros(NamedTuple):
    """A family of zeros."""

    ends: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # of the weights -> of the range a grid may span
    place: Callable[[Tensor, int], tuple[Tensor, Tensor | None]]  # zero, bits -> nearest of the family, its uint8 code


class Lattice(NamedTuple):
    """What a grid is made of."""

    scales: Scales
    zeros: Zeros


class Grid(NamedTuple):
    """scale, zero (groups, rows) as they will be read back; their uint8 codes; base and step of log2 scale."""

    scale: Tensor
    zero: Tensor
    scale_codes: Tensor
    zero_codes: Tensor | None
    base: float
    step: float


class Rounded(NamedTuple):
    """A matrix as codes: a quarter of the bytes of the weight it reads back as."""

    codes: Tensor  # uint8 (columns, rows)
    grid: Grid
    group: int

    def read(self) -> Tensor:
        """w' (rows, columns) float32, chunk by chunk of rows."""
        table = torch.empty(self.codes.shape[1], self.codes.shape[0])
        for start in range(0, len(table), ROW_CHUNK):
            rows = slice(start, start + ROW_CHUNK)
            table[rows] = read_back(self.codes[:, rows].float(), cut(self.grid, rows), self.group).T
        return table


def snap(scale: Tensor, zero: Tensor, bits: int, lattice: Lattice | None = None) -> Grid:
    """The nearest grid that can be kept: one base and step a tensor."""
    scales, zeros = lattice or PLAIN
    log = _log2(scale)
    log = log.clamp_min(float(log.max()) - SCALE_OCTAVES)
    base, step = scales.levels(float(log.min()), float(log.max()))
    placed, zero_codes = zeros.place(zero, bits)
    return rescale(Grid(scale, placed, scale, zero_codes, base, step), scale)


def rescale(grid: Grid, scale: Tensor) -> Grid:
    """The grid with other scales, on the same base and step."""
    codes = ((_log2(scale) - grid.base) / grid.step).round().clamp(0, SCALE_LEVELS).to(torch.uint8)
    kept = torch.tensor([grid.base, grid.step], dtype=torch.float32)
    # the very expression of fxcompress.codegen.ops.dequantize, so that what is rounded against is what is read
    return grid._replace(scale=torch.exp2(kept[0] + kept[1] * codes.float()), scale_codes=codes)


def cut(grid: Grid, rows: slice | Tensor) -> Grid:
    """The grid of some rows, to round against or read by."""
    zero_codes = None if grid.zero_codes is None else grid.zero_codes[:, rows]
    return Grid(grid.scale[:, rows], grid.zero[:, rows], grid.scale_codes[:, rows], zero_codes, grid.base, grid.step)


def spread(grid: Grid, group: int, columns: int) -> tuple[Tensor, Tensor]:
    """scale, zero per weight (columns, rows)."""
    return tuple(t.repeat_interleave(group, 0)[:columns] for t in (grid.scale, grid.zero))  # type: ignore[return-value]


def read_back(codes: Tensor, grid: Grid, group: int) -> Tensor:
    """w' (columns, rows) of float codes."""
    scale, zero = spread(grid, group, len(codes))
    return (codes - zero) * scale


def _log2(scale: Tensor) -> Tensor:
    return scale.clamp_min(torch.finfo(torch.float32).tiny).log2()


def _itself(scale: Tensor) -> tuple[Tensor, ...]:
    return (scale,)


def _evenly(low: float, high: float) -> tuple[float, float]:
    return low, max((high - low) / SCALE_LEVELS, 1e-9)


def _neighbours(scale: Tensor) -> tuple[Tensor, ...]:
    below = torch.exp2(_log2(scale).floor())
    return below, 2 * below


def _octaves(low: float, high: float) -> tuple[float, float]:
    return float(round(low)), 1.0


def _as_they_are(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    return low, high


def _mirrored(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    reach = torch.maximum(-low, high)
    return -reach, reach


def _sixteenths(zero: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    unit = 2.0**bits / 16
    codes = ((zero + 0.5) / unit).round().clamp(0, 15)
    return codes * unit - 0.5, codes.to(torch.uint8)


def _middle(zero: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    return torch.full_like(zero, 2.0 ** (bits - 1) - 0.5), None


LOGARITHMIC = Scales(_itself, _evenly)
POWERS_OF_TWO = Scales(_neighbours, _octaves)
SIXTEENTHS = Zeros(_as_they_are, _sixteenths)
MIDDLE = Zeros(_mirrored, _middle)
PLAIN = Lattice(LOGARITHMIC, SIXTEENTHS)
