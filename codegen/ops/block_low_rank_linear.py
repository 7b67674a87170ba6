"""y_i = sum_j U_ij V_ij x_j + b_i        i, j = 1 .. blocks, contiguous runs of outputs and inputs

    x (..., in)    v (blocks rank, in)    u (out, blocks rank)    bias (out,) or None   ->   y (..., out)

    V_ij (rank, in/blocks)     is  v[i rank : (i+1) rank,  columns of block j]
    U_ij (out/blocks, rank)    is  u[rows of block i,  j rank : (j+1) rank]

One product per block j gives V_ij x_j of every i, an exchange of blocks brings together what belongs to i, and one
product per block i sums over j. W is never built.

            flops                              memory traffic, elements
    here    2 tokens blocks rank (in + out)    tokens (in + 3 out + 4 blocks^2 rank) + blocks rank (in + out)
    dense   2 tokens in out                    tokens (in + out) + in out

The exchange copies what lies between the products, and the result is copied into the order of y; both are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor

from fxcompress.core.cost import Cost


@torch.library.custom_op("fxcompress::block_low_rank_linear", mutates_args=())
def block_low_rank_linear(x: Tensor, v: Tensor, u: Tensor, blocks: int, bias: Tensor | None = None) -> Tensor:
    """The meaning of the op, and its implementation wherever no kernel is registered. One floating dtype."""
    y = product(x.reshape(-1, x.shape[-1]), v, stacked(u, blocks))
    y = in_order(y.transpose(0, 1)).reshape(*x.shape[:-1], u.shape[0])
    return y if bias is None else y + bias


@block_low_rank_linear.register_fake
def _(x: Tensor, v: Tensor, u: Tensor, blocks: int, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], u.shape[0])


def stacked(matrix: Tensor, blocks: int) -> Tensor:
    """(out, n) -> (blocks, out/blocks, n): neighbouring rows in one block, a view."""
    return torch.unflatten(matrix, 0, (blocks, matrix.shape[0] // blocks))


def unstacked(parts: Tensor) -> Tensor:
    """The inverse of `stacked`."""
    return parts.flatten(0, 1)


def product(x: Tensor, v: Tensor, u: Tensor) -> Tensor:
    """x (tokens, in), u (blocks, out/blocks, blocks rank) -> y (blocks, tokens, out/blocks), a block row each."""
    return torch.bmm(inner(x, v, len(u)), u.mT)


def inner(x: Tensor, v: Tensor, blocks: int) -> Tensor:
    """x (tokens, in) -> (blocks i, tokens, blocks j x rank): V_ij x_j, all that block row i reads."""
    return exchange(torch.bmm(cut(x, blocks), cut(v, blocks).mT), blocks)


def in_order(y: Tensor) -> Tensor:
    """(tokens, a, b) -> (tokens, a b), contiguous: of blocks with one output `flatten` alone is a transposed view."""
    return y.clone(memory_format=torch.contiguous_format).flatten(1)


def product_backward(
    dy: Tensor, x: Tensor, v: Tensor, u: Tensor, need: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dy as `product` answers -> dx, dv, du in the shapes of x, v, u; V x is made again, not kept."""
    blocks = len(u)
    dz = exchange(torch.bmm(dy, u), blocks)  # (blocks j, tokens, blocks i x rank)
    return (
        join(torch.bmm(dz, cut(v, blocks))) if need[0] else None,
        join(torch.bmm(dz.mT, cut(x, blocks))) if need[1] else None,
        torch.bmm(dy.mT, inner(x, v, blocks)) if need[2] else None,
    )


def cut(matrix: Tensor, blocks: int) -> Tensor:
    """(rows, columns) -> (blocks, rows, columns/blocks), a view."""
    return torch.unflatten(matrix, 1, (blocks, matrix.shape[1] // blocks)).transpose(0, 1)


def join(parts: Tensor) -> Tensor:
    """(blocks, rows, columns/blocks) -> (rows, columns), the inverse of `cut`."""
    return parts.transpose(0, 1).flatten(1)


def exchange(z: Tensor, blocks: int) -> Tensor:
    """(blocks j, tokens, blocks i x rank) -> (blocks i, tokens, blocks j x rank); its own inverse."""
    return torch.unflatten(z, 2, (blocks, z.shape[2] // blocks)).permute(2, 1, 0, 3).flatten(2)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, v, u, ctx.blocks, _ = inputs
    ctx.save_for_backward(x, v, u)


def backward_of(
    split: Callable[[Tensor, int], Tensor], unsplit: Callable[[Tensor], Tensor]
) -> Callable[[Any, Tensor], tuple[Tensor | None, ...]]:
    """The gradients of an op (x, v, u, blocks, bias) whose outputs fall into block rows by `split`."""

    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, v, u = ctx.saved_tensors
        need = (*ctx.needs_input_grad, False)  # it ends before a bias that was left out
        flat_x, flat_y = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        own = split(flat_y.T, ctx.blocks).mT  # (blocks i, tokens, out/blocks)
        dx, dv, du = product_backward(own, flat_x, v, split(u, ctx.blocks), need[:3])
        return (
            None if dx is None else dx.reshape(x.shape),
            dv,
            None if du is None else unsplit(du),
            None,
            flat_y.sum(0) if need[4] else None,
        )

    return backward


block_low_rank_linear.register_autograd(backward_of(stacked, unstacked), setup_context=setup_context)


def cost(tokens: sympy.Expr, rows: int, columns: int, blocks: int, rank: int, weight_bytes: int, itemsize: int) -> Cost:
    """The table above, in bytes."""
    traffic = tokens * (columns + 3 * rows + 4 * blocks**2 * rank) * itemsize + weight_bytes
    return Cost(2 * tokens * blocks * rank * (columns + rows), traffic, weight_bytes, launches=4)
