"""y = W[ids] where the rows of W are kept in tiers, each quantized at its own width.

    ids     int (...)
    index   int16 or int32 (rows,)   place of each row in the tiers laid end to end; int16 is read as unsigned
    codes, scales, zeros, grids      one of each a tier, as in fxcompress.codegen.ops.dequantize
    bits, group_sizes                one a tier
    ->      dtype (..., columns)
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxcompress.codegen.ops.dequantize import dequantize


@torch.library.custom_op("fxcompress::quantized_rows_embedding", mutates_args=())
def quantized_rows_embedding(
    ids: Tensor,
    index: Tensor,
    codes: list[Tensor],
    scales: list[Tensor],
    zeros: list[Tensor],
    grids: list[Tensor],
    bits: list[int],
    group_sizes: list[int],
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Each tier answers for its own rows. An id outside the vocabulary raises IndexError."""
    flat = index.index_select(0, ids.reshape(-1)).long()  # unlike index[ids], it refuses negative ids
    place = flat & 0xFFFF if index.dtype == torch.int16 else flat
    rows = torch.empty(len(place), columns, dtype=dtype, device=codes[0].device)
    start = 0
    for c, s, z, grid, b, g in zip(codes, scales, zeros, grids, bits, group_sizes):
        mine = (place >= start) & (place < start + len(c))
        at = place[mine] - start
        rows[mine] = dequantize(c[at], s[at], z[at], grid, b, g, columns, dtype)
        start += len(c)
    return rows.reshape(*ids.shape, columns)


@quantized_rows_embedding.register_fake
def _(
    ids: Tensor,
    index: Tensor,
    codes: list[Tensor],
    scales: list[Tensor],
    zeros: list[Tensor],
    grids: list[Tensor],
    bits: list[int],
    group_sizes: list[int],
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    return codes[0].new_empty(*ids.shape, columns, dtype=dtype)


def index_bytes(rows: int) -> int:
    """Bytes of the index."""
    return rows * (2 if rows <= 1 << 16 else 4)
