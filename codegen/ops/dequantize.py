"""Packed codes -> weight.

    w = scale (code - zero)      scale = 2^(grid_0 + grid_1 scale_code)      zero = 2^bits zero_code / 16 - 1/2
                                                                             or 2^(bits-1) - 1/2 where none are kept

    codes   uint8 (..., packed_bytes(columns, bits))    fxcompress.codegen.packing
    scales  uint8 (..., groups)                         groups = ceil(columns / group_size); group_size 0: the whole row
    zeros   uint8 (..., ceil(groups / 2)) or None       two 4-bit zero_codes a byte, low half first
    grid    float32 (2,)                                log2 of the smallest scale, and of the ratio between neighbours
    ->      dtype (..., columns)

A scale kept as a logarithm costs 8 bits instead of 16 and needs no super-scale per row; rounding happens against the
scale that is stored, so nothing is lost by it. With an integer grid_0 and grid_1 = 1 every scale is a power of two and
every multiply a shift. Half-integer zeros make the symmetric grids of 2 bits, (-3, -1, 1, 3)/2, exactly representable.
Stored: bits + 12 / group_size bits a weight, bits + 8 / group_size without zeros. Reading it costs one multiply and one
subtract a weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxcompress.codegen.packing import packed_bytes, unpack


@torch.library.custom_op("fxcompress::dequantize", mutates_args=())
def dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
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
    # code 8 of 16 is the middle, 2^(bits-1) - 1/2
    zero_codes = torch.full_like(scales, 8) if zeros is None else unpack(zeros, 4, groups)
    zero = zero_codes.float() * (2.0**bits / 16) - 0.5
    values = unpack(codes, bits, columns).float()
    if columns % size:  # a short last group
        values = torch.nn.functional.pad(values, (0, groups * size - columns))
    values = (torch.unflatten(values, -1, (groups, size)) - zero.unsqueeze(-1)) * scale.unsqueeze(-1)
    return values.flatten(-2)[..., :columns].to(dtype).contiguous()


@dequantize.register_fake
def _(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    grid: Tensor,
    bits: int,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], columns, dtype=dtype)


def zero_bytes(groups: int) -> int:
    """Bytes of one row of zeros."""
    return -(-groups // 2)


def stored_bytes(rows: int, columns: int, bits: int, group_size: int, symmetric: bool = False) -> int:
    """Bytes of codes, scales, zeros (none where `symmetric`) and grid of a (rows, columns) weight."""
    groups = -(-columns // (group_size or columns))
    return rows * (packed_bytes(columns, bits) + groups + (0 if symmetric else zero_bytes(groups))) + 8
