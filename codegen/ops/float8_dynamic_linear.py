"""y = x W^T + b in 8-bit floats: W kept in e4m3, x rounded to e4m3 as it comes, a scale for every token.

    t = max_j |x_j / m_j| / 448         q = e4m3(x / (m t))           y = t s (q C^T) + b        W = s C / m

    x       (..., in) float         codes C   uint8 (out, in), the bits of float8_e4m3fn numbers
    bias    (out,) or None          scales s  float32 (out,)          smooth m   float32 (in,)
                                    ->  y (..., out) in the dtype of x

A product of two such numbers has 8 bits of mantissa, so it is exact in float32, where they are added up. Tensor cores
of sm_90 keep about 14 bits of a sum (DeepSeek-V3, arXiv 2412.19437, section 3.3.2): kernels add up stretches of columns
in float32.

Bits, not floats: fxcompress.codegen.ops.dequantize_float8. Costs and gradient: fxcompress.codegen.ops.rounded_inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxcompress.codegen.ops.rounded_inputs import cost as cost
from fxcompress.codegen.ops.rounded_inputs import scaled_tokens, setup_context, straight_through

LARGEST = torch.finfo(torch.float8_e4m3fn).max


@torch.library.custom_op("fxcompress::float8_dynamic_linear", mutates_args=())
def float8_dynamic_linear(
    x: Tensor, codes: Tensor, scales: Tensor, smooth: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The formula above in float32, or float64 where x is; one rounding to the dtype of x at the end."""
    q, step = rounded_tokens(x, smooth)
    y = torch.matmul(q, numbers(codes).to(step.dtype).T) * step * scales.to(step.dtype)
    return (y if bias is None else y + bias.to(step.dtype)).to(x.dtype)


def rounded_tokens(x: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
    """-> (q (..., in) e4m3 numbers, t (..., 1)), both float32 or float64."""
    scaled, step = scaled_tokens(x, smooth, LARGEST)
    # Larger than the largest by a rounding of the quotient would be NaN.
    return scaled.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).to(step.dtype), step


def numbers(codes: Tensor) -> Tensor:
    """The numbers whose bits are `codes`, in float32."""
    return codes.view(torch.float8_e4m3fn).float()


@float8_dynamic_linear.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, smooth: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return straight_through(ctx, dy, numbers(ctx.saved_tensors[0]))


float8_dynamic_linear.register_autograd(_backward, setup_context=setup_context)
