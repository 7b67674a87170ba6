"""y = P L P^T R x + b        R, L block-diagonal, P the permutation that strides

    x (..., in)    v (blocks rank, in)    u (out, blocks rank)    bias (out,) or None   ->   y (..., out)

    z_kj = R_kj x_k              k = 1 .. blocks: contiguous runs of inputs;    R_kj (rank, in/blocks)
    y_{s, j} = sum_k L_jk z_kj   output number s blocks + j: j strides;         L_jk (out/blocks, rank)

    R_kj  is  v[j rank : (j+1) rank,  columns of block k]
    L_jk  is  u[rows j, j + blocks, j + 2 blocks, ...,  k rank : (k+1) rank]

P^T hands every j its share of every k; the last P interleaves the outputs. Apart from that last permutation these are
the products of fxcompress.codegen.ops.block_low_rank_linear, at the same cost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxcompress.codegen.ops.block_low_rank_linear import cost as cost  # what is copied is copied in another order
from fxcompress.codegen.ops.block_low_rank_linear import in_order, product, product_backward


@torch.library.custom_op("fxcompress::monarch_linear", mutates_args=())
def monarch_linear(x: Tensor, v: Tensor, u: Tensor, blocks: int, bias: Tensor | None = None) -> Tensor:
    """The meaning of the op, and its implementation wherever no kernel is registered. One floating dtype."""
    y = product(x.reshape(-1, x.shape[-1]), v, strided(u, blocks))
    y = in_order(y.permute(1, 2, 0)).reshape(*x.shape[:-1], u.shape[0])
    return y if bias is None else y + bias


@monarch_linear.register_fake
def _(x: Tensor, v: Tensor, u: Tensor, blocks: int, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], u.shape[0])


def strided(matrix: Tensor, blocks: int) -> Tensor:
    """(out, n) -> (blocks, out/blocks, n): every `blocks`-th row in one block, a view."""
    return torch.unflatten(matrix, 0, (matrix.shape[0] // blocks, blocks)).transpose(0, 1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, v, u, ctx.blocks, _ = inputs
    ctx.save_for_backward(x, v, u)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, v, u = ctx.saved_tensors
    need = (*ctx.needs_input_grad, False)  # it ends before a bias that was left out
    flat_x, flat_y = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    own = strided(flat_y.T, ctx.blocks).mT  # (blocks j, tokens, out/blocks)
    dx, dv, du = product_backward(own, flat_x, v, strided(u, ctx.blocks), need[:3])
    return (
        None if dx is None else dx.reshape(x.shape),
        dv,
        None if du is None else du.transpose(0, 1).flatten(0, 1),
        None,
        flat_y.sum(0) if need[4] else None,
    )


monarch_linear.register_autograd(_backward, setup_context=_setup_context)
