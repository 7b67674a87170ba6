"""Looking up rows of a coded table:  y[t] = decoded row ids[t],  reading that row alone, as files pack it.

    grid (tokens, columns / BLOCK)    a program makes BLOCK columns of one token's row

The functions have the signatures of the ops of the same names (fxcompress.codegen.ops), and launch on the device of
their tensors. What is decoded differs by a line of the text, which is made once a shape of the table.

Lanes of one byte read it together, so every byte leaves memory once; what is written is 2 to 8 times as much. With a
BLOCK of 1024 on sm_90 24 to 32 registers: as many blocks as there can be, which hides the wait for the id.

NB: an id outside the vocabulary raises IndexError in an op's body. A kernel cannot, short of stopping the whole device;
it reads nothing out of bounds and writes a row of NaN, so that the mistake is not quiet.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxcompress.codegen.packing import packed_bytes
from fxcompress.codegen.triton.build import load_source
from fxcompress.codegen.triton.gemm import indent
from fxcompress.codegen.triton.kernel import IMPORTS

NAME, BLOCK, WARPS = "gather_rows", 1024, 4
Tier = tuple[int, int, int, bool]  # rows, bits, group size (0: the whole row), whether zeros are kept


def quantized_embedding(
    ids: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, grid: Tensor, bits: int, group_size: int,
    columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """One tier, in the order of the vocabulary."""
    source = quantized_rows(len(codes), columns, ((len(codes), bits, group_size, zeros is not None),))
    tensors = [codes, scales, *([] if zeros is None else [zeros]), grid]
    return _launch(source, ids, tensors, columns, dtype)


def quantized_rows_embedding(
    ids: Tensor, index: Tensor, codes: list[Tensor], scales: list[Tensor], zeros: list[Tensor], grids: list[Tensor],
    bits: list[int], group_sizes: list[int], columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The rows of the tiers laid end to end; `index` says where a row is."""
    tiers = tuple((len(c), b, g, True) for c, b, g in zip(codes, bits, group_sizes))
    source = quantized_rows(len(index), columns, tiers, index.element_size())
    tensors = [index, *(t for tier in zip(codes, scales, zeros, grids) for t in tier)]
    return _launch(source, ids, tensors, columns, dtype)


def float8_embedding(ids: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """e4m3 numbers, one scale a row."""
    return _launch(float8_rows(*codes.shape), ids, [codes, scales], codes.shape[1], dtype)


@functools.cache
def float8_rows(rows: int, columns: int) -> str:
    """The text for a float8 table (rows, columns). Arguments: y, ids, codes, scales."""
    code = f"parts.byte_e4m3(tl.load(codes + row * {columns} + column, mask=inside, other=0))"
    return _text(rows, columns, ["codes", "scales"], [f"made = {code} * tl.load(scales + row).to(tl.float32)"])


@functools.cache
def quantized_rows(rows: int, columns: int, tiers: tuple[Tier, ...], index_bytes: int = 0) -> str:
    """The text for a quantized table of `rows` rows. Arguments: y, ids, an index if there is one, then codes, scales,
    zeros where they are kept, and grid of each tier."""
    arguments, lines = ["index"] if index_bytes else [], list[str]()
    if index_bytes:
        unsigned = " & 0xFFFF" if index_bytes == 2 else ""
        lines.append(f"place = tl.load(index + row).to(tl.int64){unsigned}")
    start = 0
    for i, tier in enumerate(tiers):
        names = ["codes", "scales", *(["zeros"] if tier[3] else []), "grid"]
        arguments += [f"{name}{i}" for name in names]
        decoded = _decoded(i, columns, tier)
        if index_bytes:
            lines += [f"if (place >= {start}) & (place < {start + tier[0]}):", f"    at = place - {start}"]
            lines += [f"    {line}" for line in decoded]
        else:
            lines += ["at = row", *decoded]
        start += tier[0]
    return _text(rows, columns, arguments, lines)


def _decoded(i: int, columns: int, tier: Tier) -> list[str]:
    """made (BLOCK,) of row `at` of tier i."""
    _, bits, group_size, zeros = tier
    groups = -(-columns // (group_size or columns))
    zero = str(2.0 ** (bits - 1) - 0.5)
    if zeros:
        zero = f"parts.zero_at(zeros{i} + at * {-(-groups // 2)}, group, inside, {bits})"
    return [
        f"group = column // {group_size or columns}",
        f"code = parts.code_at(codes{i} + at * {packed_bytes(columns, bits)}, column, inside, {bits})",
        f"made = (code - {zero}) * parts.scale_at(scales{i} + at * {groups}, grid{i}, group, inside)",
    ]


def _text(rows: int, columns: int, arguments: Sequence[str], lines: Sequence[str]) -> str:
    return f"""{IMPORTS}

@triton.jit
def {NAME}(y, ids, {", ".join(arguments)}, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < {columns}
    row = tl.load(ids + token).to(tl.int64)
    made = tl.full((BLOCK,), float("nan"), tl.float32)
    if (row >= 0) & (row < {rows}):
{indent(lines, 8)}
    tl.store(y + token * {columns} + column, made.to(y.dtype.element_ty), mask=inside)
"""


def block(columns: int) -> int:
    """BLOCK for rows of so many columns."""
    return min(BLOCK, 1 << (columns - 1).bit_length())


def _launch(source: str, ids: Tensor, tensors: Sequence[Tensor], columns: int, dtype: torch.dtype) -> Tensor:
    y = ids.new_empty(*ids.shape, columns, dtype=dtype)
    if ids.numel() == 0:
        return y
    kernel: Any = getattr(load_source(source), NAME)
    grid = (ids.numel(), -(-columns // block(columns)))
    given = [t.contiguous() for t in tensors]
    kernel[grid](y, ids.contiguous(), *given, BLOCK=block(columns), num_warps=WARPS)
    return y
