"""Products and lookups of a lowered graph, as plain functions: Inductor looks through them and fuses what surrounds
each library call.

int8, for x (tokens, in) and W ~ s C, C int8 (out, in), s (out,), the range of every token met by 256 steps:

    t = (max x - min x) / 255      o = min x + 128 t      q = round((x - min x) / t) - 128        x ~ t q + o
    y = s (t (q C^T) + o r) + b    r_i = sum_j C_ij, once

q C^T is exact in int32 (in < 2^17). One-sided inputs, as behind a GELU, keep all 8 bits; an offset that is no integer
costs nothing, since r takes it out of the sum. |x - (t q + o)| <= t / 2.

Weight-only, x rounded to bf16 and the weight's codes as they are, for few tokens (fxcompress.codegen.cpu.rules):

    int8    y = s (x C^T) + b        the C of above
    int4    y = x W^T + b            W = s4 (c - 8) + z4, codes c of 4 bits; s4 and z4 of a group of columns, in bf16

A table is kept in int8 with a scale for GROUP columns of a row; a lookup reads the rows asked for.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 64
_TINY = torch.finfo(torch.float32).tiny


def int8_linear(
    x: Tensor, codes: Tensor, scales: list[Tensor], sums: list[Tensor], biases: list[Tensor | None]
) -> list[Tensor]:
    """The products of x (..., in) with several weights, their codes one below the other: x is rounded once."""
    q, step, offset = rounded_tokens(x.reshape(-1, x.shape[-1]))
    total = torch._int_mm(q, codes.t())  # oneDNN packs as it goes: no slower than packed before, 16 to 1024 tokens
    outputs = []
    for part, s, r, b in zip(torch.split(total, [len(s) for s in scales], 1), scales, sums, biases):
        y = (part.float() * step + offset * r) * s
        y = y if b is None else y + b
        outputs.append(y.to(x.dtype).reshape(*x.shape[:-1], len(s)))
    return outputs


def bucketed_linear(
    x: Tensor, codes: Tensor, scales: list[Tensor], sums: list[Tensor], biases: list[Tensor | None],
    buckets: list[tuple[str, int]], ones: Tensor, four: tuple[Tensor, Tensor, int] | None,
) -> list[Tensor]:  # fmt: skip
    """`int8_linear`, but for numbers of tokens up to those of `buckets`: there the kernel that each names.

    NOTE: the branch is Python's, so it is a guard of Dynamo, and one compilation for every bucket that is met.
    """
    tokens = math.prod(x.shape[:-1])
    kernel = next((name for name, most in buckets if tokens <= most), "int8")
    if kernel == "int8":
        return int8_linear(x, codes, scales, sums, biases)
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    if kernel == "int4_weight":
        assert four is not None
        packed, scales_and_zeros, group = four
        total = torch._weight_int4pack_mm_for_cpu(rows, packed, group, scales_and_zeros)
    else:  # the kernel wants scales in bf16: they stay in float32 and are applied below
        total = torch._weight_int8pack_mm(rows, codes, ones)
    outputs = []
    for part, s, b in zip(torch.split(total, [len(s) for s in scales], 1), scales, biases):
        y = part.float() if kernel == "int4_weight" else part.float() * s
        y = y if b is None else y + b
        outputs.append(y.to(x.dtype).reshape(*x.shape[:-1], len(s)))
    return outputs


def packed_fours(codes: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Codes 0 .. 15 (out, in), w = scale (c - zero), both (out, groups) -> what the int4 kernel reads."""
    packed = torch._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    middle = scales.float() * (8 - zeros.float())
    return packed, torch.stack([scales.float(), middle], -1).transpose(0, 1).contiguous().to(torch.bfloat16)


def rounded_tokens(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (tokens, in) -> q (tokens, in) int8, t (tokens, 1) and o (tokens, 1) float32."""
    x = x.float()
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    step = ((high - low) / 255).clamp_min(_TINY)
    q = ((x - low) * (1 / step)).round() - 128  # (high - low) / step is 255 (1 + 3 eps) at most: it cannot leave int8
    return q.to(torch.int8), step, low + 128 * step


def rounded_rows(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W (out, in) -> C int8 (out, in), s and r (out,) float32."""
    scales = (weight.float().abs().amax(1) / 127).clamp_min(_TINY)
    codes = (weight.float() / scales.unsqueeze(1)).round().to(torch.int8)
    return codes, scales, codes.sum(1, dtype=torch.int32).float()


def int8_dynamic(x: Tensor, codes: Tensor, scales: Tensor, divisors: Tensor, bias: Tensor | None) -> Tensor:
    """fxcompress.int8_dynamic_linear, the same integers: its meaning says how x is rounded."""
    rows = x.reshape(-1, x.shape[-1]).float() / divisors
    step = (rows.abs().amax(1, keepdim=True) / 127).clamp_min(_TINY)
    q = (rows / step).round().clamp(-127, 127).to(torch.int8)
    y = torch._int_mm(q, codes.t()).float() * step * scales
    y = y if bias is None else y + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], len(codes))


def bf16_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN's bf16 product, its sums in float32; inputs and output are rounded to bf16."""
    y = F.linear(x.to(torch.bfloat16), weight).to(x.dtype)
    return y if bias is None else y + bias


def gather(ids: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a table of int8 codes (rows, groups, GROUP) with scales (rows, groups, 1), as dtype (..., columns)."""
    rows = F.embedding(ids, codes.flatten(1)).reshape(*ids.shape, *codes.shape[1:])
    values = rows.float() * F.embedding(ids, scales.flatten(1)).unsqueeze(-1)
    return values.flatten(-2).to(dtype)


def packed_table(table: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) -> what `gather` reads; columns that GROUP does not divide are one group."""
    group = GROUP if table.shape[1] % GROUP == 0 else table.shape[1]
    parts = table.float().reshape(len(table), -1, group)
    scales = (parts.abs().amax(-1, keepdim=True) / 127).clamp_min(_TINY)
    return (parts / scales).round().to(torch.int8), scales
