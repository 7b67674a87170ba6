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

import torch
from torch import Tensor

from fxcompress.codegen.ops.block_low_rank_linear import backward_of, in_order, product, setup_context
from fxcompress.codegen.ops.block_low_rank_linear import cost as cost  # what is copied is copied in another order


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


def unstrided(parts: Tensor) -> Tensor:
    """The inverse of `strided`."""
    return parts.transpose(0, 1).flatten(0, 1)


monarch_linear.register_autograd(backward_of(strided, unstrided), setup_context=setup_context)
