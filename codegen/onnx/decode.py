"""Codes -> numbers, in arithmetic that ONNX has for every width: up to opset 24 it has no type of 2 or 3 bits.

    code_i = floor(word / 2^(bits i)) mod 2^bits
    w      = scale (code - zero)        scale = 2^(grid_0 + grid_1 scale_code)

Of constants alone a runtime works it out when it loads the file; a lookup decodes the rows that are asked for. Words
are below 2^24 and divided by powers of two, so float32 is exact (shifts of integers are translated to far more). The
rest is the arithmetic of fxcompress.codegen.ops.dequantize, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[float, float]


def unpacked(packed: Tensor, bits: int, columns: int) -> Tensor:
    """uint8 (..., packed_bytes(columns, bits)) -> codes (..., columns), whole numbers in float32."""
    if bits == 8:
        return packed.to(torch.float32)
    words, count = packed.to(torch.float32).unsqueeze(-1), 8 // bits  # a byte holds whole codes
    if bits == 3:
        parts = torch.unflatten(packed.to(torch.float32), -1, (-(-columns // 8), 3))
        words, count = (parts * torch.tensor([1.0, 2**8, 2**16])).sum(-1, keepdim=True), 8
    shifted = torch.floor(words * torch.tensor([2.0 ** (-bits * i) for i in range(count)]))
    codes = (shifted - torch.floor(shifted * 2.0**-bits) * 2.0**bits).flatten(-2)
    return codes if codes.shape[-1] == columns else codes[..., :columns]


def scales_of(scales: Tensor, grid: Grid) -> Tensor:
    """Scale codes -> float32 scales of the same shape."""
    base, step = grid
    return torch.exp2(scales.to(torch.float32) * step + base)


def zero_codes_of(zeros: Tensor | None, scales: Tensor) -> Tensor:
    """Packed zero codes -> 0 .. 15 in float32, one for every scale; 8, the middle, where none are kept."""
    if zeros is None:
        return torch.full_like(scales, 8, dtype=torch.float32)
    return unpacked(zeros, 4, scales.shape[-1])


def decoded(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid, bits: int, group_size: int, columns: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """What fxcompress.dequantize answers, (..., columns)."""
    groups = scales.shape[-1]
    size = group_size or columns
    zero = zero_codes_of(zeros, scales) * (2.0**bits / 16) - 0.5
    values = unpacked(codes, bits, columns)
    if columns % size:
        values = F.pad(values, (0, groups * size - columns))
    values = (torch.unflatten(values, -1, (groups, size)) - zero.unsqueeze(-1)) * scales_of(scales, grid).unsqueeze(-1)
    values = values.flatten(-2)
    return (values[..., :columns] if columns % size else values).to(dtype)


def lookup(
    ids: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid, bits: int, group_size: int,
    columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """What fxcompress.quantized_embedding answers: the rows of the ids are gathered, then decoded."""
    c, s, z = (None if t is None else F.embedding(ids, t) for t in (codes, scales, zeros))
    assert c is not None
    assert s is not None
    return decoded(c, s, z, grid, bits, group_size, columns, dtype)


def tiered_lookup(
    ids: Tensor, index: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], zeros: Sequence[Tensor],
    grids: Sequence[Grid], bits: Sequence[int], group_sizes: Sequence[int], columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """What fxcompress.quantized_rows_embedding answers: every tier is asked for all ids, and each id takes its own."""
    place = F.embedding(ids, index.unsqueeze(-1)).squeeze(-1).to(torch.int64)
    if index.dtype == torch.int16:
        place = torch.where(place < 0, place + (1 << 16), place)
    rows, start = None, 0
    for c, s, z, grid, b, g in zip(codes, scales, zeros, grids, bits, group_sizes):
        if len(c):
            at = (place - start).clamp(0, len(c) - 1)
            made = lookup(at, c, s, z, grid, b, g, columns, dtype)
            rows = made if rows is None else torch.where((place >= start).unsqueeze(-1), made, rows)
        start += len(c)
    assert rows is not None
    return rows

