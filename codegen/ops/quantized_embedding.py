"""y = dequantize(codes)[ids], reading only the rows that are asked for.

    ids                           int (...)
    codes, scales, zeros, grid    as in fxcompress.codegen.ops.dequantize, one row a vocabulary entry
    ->                            dtype (..., columns)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.codegen.ops.dequantize import dequantize


@torch.library.custom_op("fxcompress::quantized_embedding", mutates_args=())
def quantized_embedding(
    ids: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    grid: Tensor,
    bits: int,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Gather, then dequantize. An id outside the vocabulary raises IndexError, as aten.embedding does."""
    # F.embedding, unlike t[ids], refuses negative ids
    c, s, z = (None if t is None else F.embedding(ids, t) for t in (codes, scales, zeros))
    rows: Tensor = dequantize(c, s, z, grid, bits, group_size, columns, dtype)
    return rows


@quantized_embedding.register_fake
def _(
    ids: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    grid: Tensor,
    bits: int,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(*ids.shape, columns, dtype=dtype)
