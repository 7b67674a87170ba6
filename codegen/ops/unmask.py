"""Bits and kept values -> rows with zeros in between.

    mask    uint8 (..., ceil(columns / tile / 8))   one bit for `tile` neighbouring columns, low bit first, 1: kept
    values  (..., kept)                             the kept weights of each row, left to right; every row keeps as many
    ->      (..., columns)                          dtype of values

            flops    memory traffic, elements
    here    0        rows columns written, and read by what follows

Stored: a bit and `kept / columns` values a weight. The op reads rows independently, so a lookup gathers rows of both.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor

from fxcompress.codegen.packing import pack, packed_bytes, unpack
from fxcompress.core.cost import Cost


@torch.library.custom_op("fxcompress::unmask", mutates_args=())
def unmask(mask: Tensor, values: Tensor, columns: int, tile: int) -> Tensor:
    """The meaning of the op, and its implementation wherever no kernel is registered."""
    rows = values.new_zeros(*values.shape[:-1], columns)
    return rows.masked_scatter_(_keep(mask, columns, tile), values)


@unmask.register_fake
def _(mask: Tensor, values: Tensor, columns: int, tile: int) -> Tensor:
    return values.new_empty(*values.shape[:-1], columns)


def _keep(mask: Tensor, columns: int, tile: int) -> Tensor:
    """The bits as bool (..., columns)."""
    keep = unpack(mask, 1, columns // tile).bool()
    return keep if tile == 1 else keep.repeat_interleave(tile, -1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    mask, values, ctx.columns, ctx.tile = inputs
    ctx.kept = values.shape[-1]
    ctx.save_for_backward(mask)


def _backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor | None, None, None]:
    """dvalues: what of dy lies under the mask, each at its rank among the kept."""
    if not ctx.needs_input_grad[1]:
        return None, None, None, None
    keep = _keep(ctx.saved_tensors[0], ctx.columns, ctx.tile)
    rank = keep.long().cumsum(-1).sub(1).clamp_min(0)
    grad = dy.new_zeros(*dy.shape[:-1], ctx.kept).scatter_add(-1, rank, torch.where(keep, dy, 0))
    return None, grad, None, None


unmask.register_autograd(_backward, setup_context=_setup_context)


def bits_of(keep: Tensor) -> Tensor:
    """bool (..., units) -> the op's uint8 mask (..., mask_bytes(units))."""
    return pack(keep.to(torch.uint8), 1)


def mask_bytes(units: int) -> int:
    """Bytes of one row of the mask."""
    return packed_bytes(units, 1)


def cost(rows: sympy.Expr, columns: int, itemsize: int, launches: int = 1) -> Cost:
    """What making `rows` dense rows adds to the work that reads them; the stored tensors are counted there."""
    return Cost(sympy.Integer(0), 2 * rows * columns * itemsize, 0, launches)
