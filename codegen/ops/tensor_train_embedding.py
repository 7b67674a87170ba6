"""y = W[ids], with W a tensor train, making only the rows that are asked for

    ids int (...)   cores, n, m as in fxcompress.codegen.ops.tensor_train   ->   y (..., columns)

The digits of an id pick one slice (R_{k-1} n_k, R_k) of each core, and the slices are multiplied from the left.
Backward keeps the ids and the cores; dW gets the rows dy at their ids, and every dG_k is contracted from it.

                flops                                           memory traffic, elements
    here        2 tokens sum_k n_1 .. n_k R_{k-1} R_k           2 tokens sum_k n_1 .. n_k R_k + cores
    dense       0                                               2 tokens columns + rows columns
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from fxcompress.codegen.ops.tensor_train import core_gradients, rows_at
from fxcompress.core.cost import Cost


@torch.library.custom_op("fxcompress::tensor_train_embedding", mutates_args=())
def tensor_train_embedding(
    ids: Tensor, cores: Sequence[Tensor], n: Sequence[int], m: Sequence[int], rows: int
) -> Tensor:
    """The meaning of the op. An id outside 0 .. rows - 1, padding too, raises IndexError, as aten.embedding does."""
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        raise IndexError(f"index out of range in self: ids must be 0 to {rows - 1}")
    return rows_at(ids.reshape(-1), cores, n, m).reshape(*ids.shape, math.prod(n))


@tensor_train_embedding.register_fake
def _(ids: Tensor, cores: Sequence[Tensor], n: Sequence[int], m: Sequence[int], rows: int) -> Tensor:
    return cores[0].new_empty(*ids.shape, math.prod(n))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, cores, ctx.n, ctx.m, _ = inputs
    ctx.save_for_backward(ids, *cores)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    ids, *cores = ctx.saved_tensors
    columns = math.prod(ctx.n)
    dw = dy.new_zeros(math.prod(ctx.m), columns).index_add(0, ids.reshape(-1), dy.reshape(-1, columns))
    return None, core_gradients(dw, cores, ctx.n, ctx.m), None, None, None


tensor_train_embedding.register_autograd(_backward, setup_context=_setup_context)


def cost(
    tokens: sympy.Expr, n: Sequence[int], m: Sequence[int], ranks: Sequence[int], weight_bytes: int, itemsize: int
) -> Cost:
    """The table above, in bytes, every id taken for a new one."""
    made = [math.prod(n[: k + 1]) * ranks[k + 1] for k in range(len(n))]
    flops = 2 * tokens * sum(elements * rank for elements, rank in zip(made, ranks))
    return Cost(flops, 2 * tokens * sum(made) * itemsize + weight_bytes, weight_bytes, launches=2 * sum(m))
