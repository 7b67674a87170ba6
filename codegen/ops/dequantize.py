"""Packed codes -> weight.

    w = scale (code - zero)      scale = 2^(grid_0 + grid_1 scale_code)      zero = 2^bits zero_code / 16 - 1/2

    codes   uint8 (..., packed_bytes(columns, bits))    fxcompress.codegen.packing
    scales  uint8 (..., groups)                         groups = ceil(columns / group_size); group_size 0: the whole row
    zeros   uint8 (..., ceil(groups / 2))               two 4-bit zero_codes a byte, low half first
    grid    float32 (2,)                                log2 of the smallest scale, and of the ratio between neighbours
    ->      dtype (..., columns)

A scale kept as a logarithm costs 8 bits instead of 16 and needs no super-scale per row; rounding happens against the
scale that is stored, so nothing is lost by it. Half-integer zeros make the symmetric grids of 2 bits, (-3, -1, 1, 3)/2,
exactly representable. Stored: bits + 12 / group_size bits a weight. Reading it costs one multiply and one subtract a
weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxcompress.codegen.packing import packed_bytes, unpack


@torch.library.custom_op("fxcompress::dequantize", mutates_args=())
def dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    grid: Tensor,
    bits: int,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """The formula above; float32 arithmetic, one rounding to `dtype` at the end."""
    groups = scales.shape[-1]
    size = group_size or columns
    scale = torch.exp2(grid[0] + grid[1] * scales.float())
    zero = unpack(zeros, 4, groups).float() * (2.0**bits / 16) - 0.5
    values = unpack(codes, bits, columns).float()
    if columns % size:  # a short last group
        values = torch.nn.functional.pad(values, (0, groups * size - columns))
    values = (torch.unflatten(values, -1, (groups, size)) - zero.unsqueeze(-1)) * scale.unsqueeze(-1)
    return values.flatten(-2)[..., :columns].to(dtype).contiguous()


@dequantize.register_fake
def _(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    grid: Tensor,
    bits: int,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], columns, dtype=dtype)


def stored_bytes(rows: int, columns: int, bits: int, group_size: int) -> int:
    """Bytes of codes, scales, zeros and grid of a (rows, columns) weight."""
    groups = -(-columns // (group_size or columns))
    return rows * (packed_bytes(columns, bits) + groups + packed_bytes(groups, 4)) + 8
