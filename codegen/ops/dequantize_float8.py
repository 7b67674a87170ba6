"""8-bit floats -> weight.

    w = scale code

    codes   uint8 (..., columns)    the bits of float8_e4m3fn numbers
    scales  float32 (..., 1)        one a row
    ->      dtype (..., columns)

Bits, not floats, because few operations take 8-bit floats (torch's own check of a custom op fails on them), and because
a cast of the whole model must leave codes alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("fxcompress::dequantize_float8", mutates_args=())
def dequantize_float8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The product in the dtype of the scales, one rounding to `dtype` at the end."""
    return (codes.view(torch.float8_e4m3fn).to(scales.dtype) * scales).to(dtype)


@dequantize_float8.register_fake
def _(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    codes, scales, _ = inputs
    ctx.save_for_backward(codes, scales)


def _backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, ...]:
    """dscale = sum dw code."""
    codes, scales = ctx.saved_tensors
    if not ctx.needs_input_grad[1]:
        return None, None, None
    values = codes.view(torch.float8_e4m3fn).to(scales.dtype)
    return None, (dw.to(scales.dtype) * values).sum(-1, keepdim=True), None


dequantize_float8.register_autograd(_backward, setup_context=_setup_context)
