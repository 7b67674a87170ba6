"""What the products share that round their inputs as they come:  y = t s (q C^T) + b,  q = round(x / (m t))

    t = max_j |x_j / m_j| / largest     a scale for every token: its largest number becomes the largest of the format

            flops               memory traffic, bytes; q and C take one each
    here    2 tokens in out     tokens (in + out) itemsize + 2 tokens in + in out
    dense   2 tokens in out     tokens (in + out) itemsize + in out itemsize

The gradient is straight through the rounding of x: that of x W^T + b with W = s C / m. C, s and m are constants.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor

from fxcompress.core.cost import Cost


def scaled_tokens(x: Tensor, smooth: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """-> (x / (m t) (..., in), t (..., 1)), both float32, or float64 where x is."""
    working = torch.promote_types(x.dtype, torch.float32)
    even = x.to(working) / smooth.to(working)
    step = (even.abs().amax(-1, keepdim=True) / largest).clamp_min(torch.finfo(torch.float32).tiny)
    return even / step, step


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Of x, codes, scales, smooth and bias."""
    _, codes, scales, smooth, bias = inputs
    ctx.save_for_backward(codes, scales, smooth)
    ctx.biased = bias is not None


def straight_through(ctx: Any, dy: Tensor, codes: Tensor) -> tuple[Tensor | None, ...]:
    """dx = (dy s) C / m,  db = sum dy.  codes (out, in): C in a type to compute with."""
    _, scales, smooth = ctx.saved_tensors
    need = ctx.needs_input_grad
    dx = None
    if need[0]:
        working = torch.promote_types(dy.dtype, torch.float32)
        scaled = dy.to(working) * scales.to(working)
        dx = (torch.matmul(scaled, codes.to(working)) / smooth.to(working)).to(dy.dtype)
    # needs_input_grad ends before a bias that was left out
    return dx, None, None, None, dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.biased and need[4] else None


def cost(tokens: sympy.Expr, rows: int, columns: int, weight_bytes: int, itemsize: int) -> Cost:
    """The table above; one launch rounds x, one multiplies."""
    traffic = tokens * (columns + rows) * itemsize + 2 * tokens * columns + weight_bytes
    return Cost(2 * tokens * rows * columns, traffic, weight_bytes, launches=2)
