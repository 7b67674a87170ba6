"""y = x W^T + b, with W a tensor train

    x (..., columns)   cores, n, m as in fxcompress.codegen.ops.tensor_train   bias (rows,) or None   ->   y (..., rows)

Two ways, the one of fewer flops for the tokens there are: contract x with the cores, or rebuild W and multiply.
Backward keeps x and the cores, nothing in between:

    dx = dy W    either way again        dW = dy^T x    one full matrix, from which every dG_k is contracted

            flops                                        memory traffic, elements
    contract    tokens contract_flops                    tokens (columns + rows + 2 sum_k M_k R_k N_k) + cores
    rebuild     rebuild_flops + 2 tokens rows columns    tokens (columns + rows) + 4 rows columns + cores

W is written, put in order and read again: 4. GPT-2's 768 -> 3072 at rank 16, (4, 4)^4 (3, 12): contracted up to 198
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.codegen.ops.tensor_train import (
    Ints,
    contract,
    contract_flops,
    contracts,
    core_gradients,
    ranks_of,
    rebuild,
    rebuild_flops,
    turned,
)
from fxcompress.core.cost import Cost


@torch.library.custom_op("fxcompress::tensor_train_linear", mutates_args=())
def tensor_train_linear(
    x: Tensor, cores: Sequence[Tensor], n: Sequence[int], m: Sequence[int], rows: int, bias: Tensor | None
) -> Tensor:
    """The meaning of the op, and its implementation wherever no kernel is registered; rows after `rows` are padding."""
    flat = x.reshape(-1, x.shape[-1])
    if contracts(len(flat), n, m, ranks_of(cores, m)):
        y = contract(flat, cores, n, m)[:, :rows]
        y = y.contiguous() if bias is None else y + bias
    else:
        y = F.linear(flat, rebuild(cores, n, m)[:rows], bias)
    return y.reshape(*x.shape[:-1], rows)


@tensor_train_linear.register_fake
def _(
    x: Tensor, cores: Sequence[Tensor], n: Sequence[int], m: Sequence[int], rows: int, bias: Tensor | None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cores, ctx.n, ctx.m, ctx.rows, _ = inputs
    ctx.save_for_backward(x, *cores)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, *cores = ctx.saved_tensors
    n, m, need = ctx.n, ctx.m, ctx.needs_input_grad
    flat_x = x.reshape(-1, x.shape[-1])
    true = dy.reshape(-1, ctx.rows)
    flat_y = F.pad(true, (0, math.prod(m) - ctx.rows)) if math.prod(m) > ctx.rows else true
    dx = _input_gradient(flat_y, cores, n, m).reshape(x.shape) if need[0] else None
    gradients = core_gradients(flat_y.t() @ flat_x, cores, n, m) if any(need[1]) else [None] * len(cores)
    return dx, gradients, None, None, None, true.sum(0) if need[5] else None


def _input_gradient(dy: Tensor, cores: Sequence[Tensor], n: Ints, m: Ints) -> Tensor:
    """dy W, by contraction with the cores of W^T or with W rebuilt."""
    back = turned(cores, n, m)
    if contracts(len(dy), m, n, ranks_of(back, n)):
        return contract(dy, back, m, n)
    return dy @ rebuild(cores, n, m)


tensor_train_linear.register_autograd(_backward, setup_context=_setup_context)


def cost(
    tokens: sympy.Expr, n: Sequence[int], m: Sequence[int], ranks: Sequence[int], weight_bytes: int, itemsize: int
) -> Cost:
    """The table above, in bytes; which line holds is decided where `tokens` gets a value."""
    columns, rows = math.prod(n), math.prod(m)
    between = sum(math.prod(m[:k]) * ranks[k] * math.prod(n[k:]) for k in range(1, len(n)))
    flops = tokens * contract_flops(n, m, ranks), rebuild_flops(n, m, ranks) + 2 * tokens * rows * columns
    traffic = tokens * (columns + rows + 2 * between), tokens * (columns + rows) + 4 * rows * columns
    contracting = sympy.Le(flops[0], flops[1])
    return Cost(
        sympy.Piecewise((flops[0], contracting), (flops[1], True)),
        sympy.Piecewise((traffic[0], contracting), (traffic[1], True)) * itemsize + weight_bytes,
        weight_bytes,
        launches=2 * len(n),
    )
