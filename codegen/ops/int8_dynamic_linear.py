"""y = x W^T + b in integers: W kept in int8, x rounded to int8 as it comes, a scale for every token.

    t = max_j |x_j / m_j| / 127         q = round(x / (m t))          y = t s (q C^T) + b        W = s C / m

    x       (..., in) float         codes C   int8 (out, in)          scales s   float32 (out,)
    bias    (out,) or None          smooth m  float32 (in,)           ->  y (..., out) in the dtype of x

q C^T is exact: its products are below 2^14, so 1024 of them add up exactly in float32, and stretches of 1024 columns
in int32 (in < 2^17). A library's int8 product is not used here: on processors without VNNI it saturates in 16 bits.

Costs and gradient: fxcompress.codegen.ops.rounded_inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxcompress.codegen.ops.rounded_inputs import cost as cost
from fxcompress.codegen.ops.rounded_inputs import scaled_tokens, setup_context, straight_through

LEVELS = 127
_STRETCH = 1024  # 1024 * 127^2 < 2^24


@torch.library.custom_op("fxcompress::int8_dynamic_linear", mutates_args=())
def int8_dynamic_linear(x: Tensor, codes: Tensor, scales: Tensor, smooth: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula above in float32, or float64 where x is; one rounding to the dtype of x at the end."""
    q, step = rounded_tokens(x, smooth)
    total = torch.zeros(*x.shape[:-1], len(codes), dtype=torch.int32, device=x.device)
    for part, mine in zip(torch.split(q.float(), _STRETCH, -1), torch.split(codes.float(), _STRETCH, -1)):
        total += torch.matmul(part, mine.T).to(torch.int32)
    y = total.to(step.dtype) * step * scales.to(step.dtype)
    return (y if bias is None else y + bias.to(step.dtype)).to(x.dtype)


def rounded_tokens(x: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
    """-> (q (..., in) whole numbers of -127 .. 127, t (..., 1)), both float32 or float64."""
    scaled, step = scaled_tokens(x, smooth, LEVELS)
    return scaled.round().clamp(-LEVELS, LEVELS), step


@int8_dynamic_linear.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, smooth: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return straight_through(ctx, dy, ctx.saved_tensors[0])


int8_dynamic_linear.register_autograd(_backward, setup_context=setup_context)
