"""What `benchmarks/gpu.py` times: a family is a spec at any size, what it is held against, and the bars it has to meet.

    never slower than dense          every family, any number of tokens, after dispatch
    int4 g128, tokens <= 16, 8192^2  2.2 times dense, and the faster of tinygemm and 60 % of the memory's speed
    low rank n / 4, tokens <= 16     1.6 times dense, 1.25 times two products of a library
    quaternion, tokens <= 16         twice dense
    8 bits on both sides, >= 256     1.5 times dense
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.codegen.packing import packed_bytes
from fxcompress.codegen.triton.catalogue import dequantize

SHAPES = ((4096, 4096), (8192, 8192), (4096, 14336))  # rows x columns: outputs x inputs
TOKENS = (1, 16, 64, 256, 1024)
DENSE = "cuBLAS bf16"
AUTOTUNED = "max-autotune"
# rows, columns, x, the family's constants -> the rival's weights, and its call on one copy of them
Rival = Callable[[int, int, Tensor, list[Tensor]], tuple[list[Tensor], Callable[[list[Tensor]], object]]]


@dataclass(frozen=True)
class Bar:
    """At least `times` as fast as `rival` (the name of one, or a share of the roofline: "60 % of the roofline")."""

    rival: str
    times: float
    fewest: int = 1
    most: int = 1 << 30
    shape: tuple[int, int] | None = None

    def applies(self, shape: tuple[int, int], tokens: int) -> bool:
        return self.fewest <= tokens <= self.most and self.shape in (None, shape)


@dataclass(frozen=True)
class Family:
    """spec: rows, columns -> its text. rate: the numbers that its tensor cores multiply."""

    name: str
    spec: Callable[[int, int], str]
    rivals: tuple[tuple[str, Rival], ...] = ()
    bars: tuple[Bar, ...] = ()
    rate: torch.dtype = torch.bfloat16

    @property
    def all_bars(self) -> tuple[Bar, ...]:
        return (*self.bars, Bar(DENSE, 1.0))


def _tinygemm(rows: int, columns: int, x: Tensor, _: list[Tensor]) -> Any:
    """torch's own 4-bit product, groups of 128."""
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=x.device)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    marks = torch.randn(columns // 128, rows, 2, device=x.device).to(x.dtype)
    return [packed, marks], lambda own: torch.ops.aten._weight_int4pack_mm(x, own[0], 128, own[1])


def _two_products(rows: int, columns: int, x: Tensor, tensors: list[Tensor]) -> Any:
    return tensors, lambda own: F.linear(F.linear(x, own[0]), own[1])


def _dense(rows: int, columns: int) -> str:
    return f"linear(x, bfloat16[{rows}, {columns}])"


def _float8(rows: int, columns: int) -> str:
    return f"linear(x, dequantize_float8(uint8[{rows}, {columns}], float32[{rows}, 1], dtype=bfloat16))"


def _two_of_four(rows: int, columns: int) -> str:
    patterns = packed_bytes(columns // 4, 3)
    return f"linear(x, unmask_2_4(uint8[{rows}, {patterns}], bfloat16[{rows}, {columns // 2}]))"


def _low_rank(rows: int, columns: int) -> str:
    rank = min(rows, columns) // 4
    return f"low_rank_linear(x, bfloat16[{rank}, {columns}], bfloat16[{rows}, {rank}])"


def _float8_dynamic(rows: int, columns: int) -> str:
    return f"float8_dynamic_linear(x, uint8[{rows}, {columns}], float32[{rows}], float32[{columns}])"


def _monarch(rows: int, columns: int) -> str:
    """Four blocks; as many numbers in its factors as low rank n / 4 has."""
    rank = min(rows, columns) // 4
    return f"monarch_linear(x, bfloat16[{rank}, {columns}], bfloat16[{rows}, {rank}], blocks=4)"


def _int8_dynamic(rows: int, columns: int) -> str:
    return f"int8_dynamic_linear(x, int8[{rows}, {columns}], float32[{rows}], float32[{columns}])"


TINYGEMM, TWO = "tinygemm", "two products"
ROOF = "of the roofline"
FAMILIES = (
    Family("dense", _dense),
    Family(
        "int4 g128",
        lambda rows, columns: f"linear(x, {dequantize(4, 128, rows, columns)})",
        ((TINYGEMM, _tinygemm),),
        (
            Bar(DENSE, 2.2, most=16, shape=(8192, 8192)),
            Bar(TINYGEMM, 1.0, most=16, shape=(8192, 8192)),
            Bar(ROOF, 0.6, most=16, shape=(8192, 8192)),
        ),
    ),
    Family("int8", lambda rows, columns: f"linear(x, {dequantize(8, 0, rows, columns)})"),
    Family("float8", _float8),
    Family("2:4", _two_of_four),
    Family(
        "low rank n/4", _low_rank, ((TWO, _two_products),), (Bar(DENSE, 1.6, most=16), Bar(TWO, 1.25, most=16))
    ),
    Family(
        "quaternion",
        lambda rows, columns: f"quaternion_linear(x, bfloat16[{rows // 4}, {columns}])",
        bars=(Bar(DENSE, 2.0, most=16),),
    ),
    Family("Monarch", _monarch),
    Family("float8 x float8", _float8_dynamic, bars=(Bar(DENSE, 1.5, fewest=256),), rate=torch.float8_e4m3fn),
    Family("int8 x int8", _int8_dynamic, bars=(Bar(DENSE, 1.5, fewest=256),), rate=torch.int8),
)  # fmt: skip
