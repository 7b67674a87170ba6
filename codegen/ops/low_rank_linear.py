"""y = (x V^T) U^T + b

    x (..., in)   v (rank, in)   u (out, rank)   bias (out,) or None   ->   y (..., out)        one floating dtype

            flops                       memory traffic, elements
    here    2 tokens rank (in + out)    tokens (in + out + 2 rank) + rank (in + out)
    dense   2 tokens in out             tokens (in + out) + in out
"""

from __future__ import annotations

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


def cost(tokens: sympy.Expr, rows: int, columns: int, rank: int, weight_bytes: int, itemsize: int) -> Cost:
    """The table above, in bytes."""
    traffic = tokens * (columns + rows + 2 * rank) * itemsize + weight_bytes
    return Cost(2 * tokens * rank * (columns + rows), traffic, weight_bytes, launches=2)
