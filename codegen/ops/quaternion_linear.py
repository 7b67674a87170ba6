"""y = L(Q) x + b        Q a matrix of quaternions  r + x i + y j + z k,  L(Q) the real matrix of the Hamilton product

           r  -x  -y  -z
    L(Q) = x   r  -z   y        four chunks of inputs and of outputs, contiguous: the parts 1, i, j, k of (..., 4 n)
           y   z   r  -x
           z  -y   x   r        block (a, b) is  SIGNS[a][b]  times component  a xor b

    x (..., in)    components (out/4, in) = [r | x | y | z]    bias (out,) or None   ->   y (..., out)    one dtype

The four components of one quaternion row lie side by side: they act on the same four outputs, and an error in one can
be made up for in the next. L(Q) is made for the product and not kept, backward included.

            flops              memory traffic, elements
    here    2 tokens in out    tokens (in + out) + in out / 4 + 2 in out
    dense   2 tokens in out    tokens (in + out) + in out
"""

from __future__ import annotations

import itertools
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.core.cost import Cost

SIGNS = ((1, -1, -1, -1), (1, 1, -1, 1), (1, 1, 1, -1), (1, -1, 1, 1))


@torch.library.custom_op("fxcompress::quaternion_linear", mutates_args=())
def quaternion_linear(x: Tensor, components: Tensor, bias: Tensor | None = None) -> Tensor:
    """The meaning of the op, and its implementation wherever no kernel is registered."""
    return F.linear(x, expand(components), bias)


@quaternion_linear.register_fake
def _(x: Tensor, components: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], 4 * components.shape[0])


def expand(components: Tensor) -> Tensor:
    """L(Q): (out/4, in) -> (out, in)."""
    parts = components.chunk(4, 1)
    return torch.cat([torch.cat([_signed(parts[a ^ b], a, b) for b in range(4)], 1) for a in range(4)])


def fold(matrix: Tensor) -> Tensor:
    """The adjoint of `expand`: (out, in) -> (out/4, in). `fold(expand(c))` is 4 c."""
    turned = [turn(rows, a) for a, rows in enumerate(matrix.chunk(4))]
    return turned[0] + turned[1] + turned[2] + turned[3]


def turn(rows: Tensor, a: int) -> Tensor:
    """Chunk `a` of the outputs: how each entry of its rows (n, in) counts for the components, (n, in)."""
    parts = rows.chunk(4, 1)
    return torch.cat([_signed(parts[a ^ k], a, a ^ k) for k in range(4)], 1)


def turned(metric: Tensor) -> Tensor:
    """sum_a T_a G T_a^T of a G (in, in): each row of it as a chunk of outputs turns it, and each column."""
    total, (side, _) = torch.zeros_like(metric), metric.shape
    into, out = (torch.unflatten(torch.unflatten(m, 1, (4, side // 4)), 0, (4, side // 4)) for m in (total, metric))
    for a, j, k in itertools.product(range(4), repeat=3):
        into[j, :, k].add_(out[a ^ j, :, a ^ k], alpha=SIGNS[a][a ^ j] * SIGNS[a][a ^ k])
    return total


def _signed(block: Tensor, a: int, b: int) -> Tensor:
    return block if SIGNS[a][b] > 0 else -block


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, components, _ = inputs
    ctx.save_for_backward(x, components)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """dx = dy L(Q),  dQ = fold(dy^T x),  db = sum dy."""
    x, components = ctx.saved_tensors
    need = (*ctx.needs_input_grad, False)  # it ends before a bias that was left out
    flat_x, flat_y = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return (
        (flat_y @ expand(components)).reshape(x.shape) if need[0] else None,
        fold(flat_y.T @ flat_x) if need[1] else None,
        flat_y.sum(0) if need[2] else None,
    )


quaternion_linear.register_autograd(_backward, setup_context=_setup_context)


def cost(tokens: sympy.Expr, rows: int, columns: int, weight_bytes: int, itemsize: int) -> Cost:
    """The table above, in bytes."""
    traffic = (tokens * (columns + rows) + 2 * rows * columns) * itemsize + weight_bytes
    return Cost(2 * tokens * rows * columns, traffic, weight_bytes, launches=2)
