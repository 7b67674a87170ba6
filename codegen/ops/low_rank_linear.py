"""y = (x V^T) U^T + b

    x (..., in)   v (rank, in)   u (out, rank)   bias (out,) or None   ->   y (..., out)        one floating dtype

            flops                       memory traffic, elements
    here    2 tokens rank (in + out)    tokens (in + out + 2 rank) + rank (in + out)
    dense   2 tokens in out             tokens (in + out) + in out
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.core.cost import Cost


@torch.library.custom_op("fxcompress::low_rank_linear", mutates_args=())
def low_rank_linear(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None) -> Tensor:
    """The meaning of the op, and its implementation wherever no kernel is registered."""
    return F.linear(F.linear(x, v), u, bias)


@low_rank_linear.register_fake
def _(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], u.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, v, u, _ = inputs
    ctx.save_for_backward(x, v, u)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """dx = (dy U) V,  dV = (dy U)^T x,  dU = dy^T (x V^T),  db = sum dy; x V^T is made again, not kept."""
    x, v, u = ctx.saved_tensors
    need = (*ctx.needs_input_grad, False)  # it ends before a bias that was left out
    flat_x, flat_y = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    inner = flat_y @ u
    return (
        (inner @ v).reshape(x.shape) if need[0] else None,
        inner.T @ flat_x if need[1] else None,
        flat_y.T @ (flat_x @ v.T) if need[2] else None,
        flat_y.sum(0) if need[3] else None,
    )


low_rank_linear.register_autograd(_backward, setup_context=_setup_context)


def cost(tokens: sympy.Expr, rows: int, columns: int, rank: int, weight_bytes: int, itemsize: int) -> Cost:
    """The table above, in bytes."""
    traffic = tokens * (columns + rows + 2 * rank) * itemsize + weight_bytes
    return Cost(2 * tokens * rank * (columns + rows), traffic, weight_bytes, launches=2)
