"""y = dequantize_float8(codes)[ids], reading only the rows that are asked for.

    ids             int (...)
    codes, scales   as in fxcompress.codegen.ops.dequantize_float8, one row a vocabulary entry
    ->              dtype (..., columns)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.codegen.ops.dequantize_float8 import dequantize_float8


@torch.library.custom_op("fxcompress::float8_embedding", mutates_args=())
def float8_embedding(ids: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Gather, then dequantize. An id outside the vocabulary raises IndexError, as aten.embedding does."""
    rows: Tensor = dequantize_float8(F.embedding(ids, codes), F.embedding(ids, scales), dtype)
    return rows


@float8_embedding.register_fake
def _(ids: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(*ids.shape, codes.shape[1], dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, codes, scales, _ = inputs
    ctx.save_for_backward(ids, codes, scales)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """dscale_r = sum of dy code over the places that read row r."""
    ids, codes, scales = ctx.saved_tensors
    if not ctx.needs_input_grad[2]:
        return None, None, None, None
    values = F.embedding(ids, codes).view(torch.float8_e4m3fn).to(scales.dtype)
    read = (dy.to(scales.dtype) * values).sum(-1).reshape(-1, 1)
    return None, None, torch.zeros_like(scales).index_add_(0, ids.reshape(-1).long(), read), None


float8_embedding.register_autograd(_backward, setup_context=_setup_context)
