"""Two kept values of every four, and which two -> rows with zeros in between.

    patterns  uint8 (..., packed_bytes(columns / 4, 3))   3 bits a group of four: one of the 6 pairs below
    values    (..., columns / 2)                          the kept weights of each row, left to right
    ->        (..., columns)                              dtype of values

            flops    memory traffic, elements
    here    0        rows columns written, and read by what follows        (`cost` of fxcompress.codegen.ops.unmask)

Stored: 3/4 of a bit and half a value a weight. (The two 2-bit indices that sparse tensor cores read are a whole bit.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxcompress.codegen.packing import pack, packed_bytes, unpack

PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
BITS = 3


@torch.library.custom_op("fxcompress::unmask_2_4", mutates_args=())
def unmask_2_4(patterns: Tensor, values: Tensor) -> Tensor:
    """The meaning of the op, and its implementation wherever no kernel is registered."""
    pairs = torch.unflatten(values, -1, (-1, 2))  # (..., groups, 2)
    groups = values.new_zeros(*pairs.shape[:-1], 4)
    return groups.scatter_(-1, _positions(patterns, pairs.shape[-2]), pairs).flatten(-2)


@unmask_2_4.register_fake
def _(patterns: Tensor, values: Tensor) -> Tensor:
    return values.new_empty(*values.shape[:-1], 2 * values.shape[-1])


def _positions(patterns: Tensor, groups: int) -> Tensor:
    """Where in its group each kept value belongs: int64 (..., groups, 2)."""
    return torch.tensor(PAIRS, device=patterns.device)[unpack(patterns, BITS, groups).long()]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor | None]:
    """dvalues: dy where the values went."""
    if not ctx.needs_input_grad[1]:
        return None, None
    groups = torch.unflatten(dy, -1, (-1, 4))
    return None, groups.gather(-1, _positions(ctx.saved_tensors[0], groups.shape[-2])).flatten(-2)


unmask_2_4.register_autograd(_backward, setup_context=_setup_context)


def patterns_of(keep: Tensor) -> Tensor:
    """bool (..., columns), two of every four True -> the op's patterns."""
    code_of = torch.zeros(16, dtype=torch.uint8)
    for code, (first, second) in enumerate(PAIRS):
        code_of[2**first + 2**second] = code
    bits = (torch.unflatten(keep, -1, (-1, 4)).long() * torch.tensor([1, 2, 4, 8])).sum(-1)
    return pack(code_of[bits], BITS)


def pattern_bytes(columns: int) -> int:
    """Bytes of the patterns of one row."""
    return packed_bytes(columns // 4, BITS)
