"""Eight-bit integers on both sides, in two kernels:  tokens are rounded, then multiplied exactly.

    t = max_j |x_j / m_j| / 127      q = round(x / (m t))            one program a token          (round_tokens)
    y = t s (q C^T) + b              q C^T in int32, tensor cores     one program a tile, epilogue (int8_gemm)

fxcompress.codegen.ops.int8_dynamic_linear says what it means. Ties of round() go to even there and here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.codegen.spec import Call, Constant
from fxcompress.codegen.triton.build import load_source
from fxcompress.codegen.triton.epilogue import Epilogue
from fxcompress.codegen.triton.gemm import indent, store
from fxcompress.codegen.triton.kernel import Config, Kernel
from fxcompress.codegen.triton.loaders.base import Loader

PREFIX = "w_"
ROUND, MULTIPLY = "round_tokens", "fused_int8"


def round_tokens(name: str, columns: int) -> str:
    """The text of the first kernel: x, smooth -> q int8 (M, K), step float32 (M,)."""
    width = 1 << (columns - 1).bit_length()
    return f"""@triton.jit
def {name}(x, smooth, q, step):
    K: tl.constexpr = {columns}
    m = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, {width})
    inside = column < K
    even = tl.load(x + m * K + column, mask=inside, other=0.0).to(tl.float32)
    even = even / tl.load(smooth + column, mask=inside, other=1.0)
    t = tl.maximum(tl.max(tl.abs(even), 0) / 127.0, 1.1754943508222875e-38)
    tl.store(q + m * K + column, parts.nearest(even / t).to(tl.int8), mask=inside)
    tl.store(step + m, t)
"""


@dataclass(frozen=True)
class Integers(Loader):
    """int8 codes (rows, columns), a scale a row, and what x is divided by."""

    @property
    def label(self) -> str:
        return "int8 x int8"

    @property
    def plane(self) -> int:
        return 64

    @property
    def planes(self) -> int:
        return 1

    @property
    def pointers(self) -> dict[str, str]:
        return {"codes": "i8", "scales": "fp32", "smooth": "fp32"}

    @property
    def constants(self) -> int:
        return 3

    def prepare(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        codes, scales, smooth = tensors
        return codes.contiguous(), scales.float().contiguous(), smooth.float().contiguous()

    def load(self, prefix: str) -> list[str]:
        row, inside = "rn.to(tl.int64)[:, None]", "n_in[:, None]" + _within(self, "None, :")
        read = f"tl.load({prefix}codes + {row} * K + column[None, :], mask={inside}, other=0)"
        return [f"column = {self.column(0)}", f"{prefix}tile = {read}"]

    def tile(self, prefix: str, plane: int) -> str:
        return f"{prefix}tile"

    def once(self, prefix: str) -> list[str]:
        return [f"{prefix}scale = tl.load({prefix}scales + rn, mask=n_in, other=0.0)"]

    def scaled(self, prefix: str, product: str, total: str) -> str:
        return f"{product} * {prefix}scale[:, None]"


def _within(weight: Loader, axis: str) -> str:
    return "" if weight.columns % weight.step == 0 else f" & (column < K)[{axis}]"


def int8_gemm(name: str, weight: Integers, epilogue: Epilogue, outputs: Sequence[int]) -> str:
    """The text of the second. Arguments: x (not read), one y an output, the weight's, the epilogue's, q, step, M."""
    arguments = ["x", *(f"y{i}" for i in range(len(outputs))), *(PREFIX + p for p in weight.pointers)]
    arguments += [*(f"p_{o.name}" for o in epilogue.operands), "q", "step"]
    inside = "m_in[None, :]" + _within(weight, ":, None")
    loop = [
        *weight.load(PREFIX),
        f"q_tile = tl.load(q + rm.to(tl.int64)[None, :] * K + column[:, None], mask={inside}, other=0)",
        f"total = tl.dot({weight.tile(PREFIX, 0)}, q_tile, total, out_dtype=tl.int32)",
    ]
    token = "tl.load(step + rm, mask=m_in, other=0.0)[None, :]"
    scaled = weight.scaled(PREFIX, "total.to(tl.float32)", "")
    finish = [*weight.once(PREFIX), f"acc = {scaled} * {token}", *epilogue.lines, *store(epilogue, outputs)]
    return f"""@triton.jit
def {name}({", ".join(arguments)}, M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    N: tl.constexpr = {weight.rows}
    K: tl.constexpr = {weight.columns}
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rm = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_in, m_in = rn < N, rm < M
    inside = n_in[:, None] & m_in[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for k in range(0, K, {weight.step}):
{indent(loop, 8)}
{indent(finish, 4)}
"""


class Int8Product(Kernel):
    """Two launches; the tokens' integers and scales lie in memory between them."""

    @classmethod
    def read(cls, product: Call) -> tuple[tuple[str, Loader], ...]:
        codes = product.args[1]
        assert isinstance(codes, Constant)
        return ((PREFIX, Integers(*codes.shape)),)

    @property
    def forms(self) -> dict[str, str]:
        ((_, weight),) = self.loaders
        assert isinstance(weight, Integers)
        multiply = int8_gemm(MULTIPLY, weight, self.epilogue, self.spec.outputs)
        return {ROUND: round_tokens(ROUND, self.columns), MULTIPLY: multiply}

    def form(self, config: Config) -> str:
        return MULTIPLY

    def constants(self, config: Config) -> dict[str, int]:
        return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}

    def grid(self, tokens: int, config: Config) -> tuple[int, ...]:
        return math.ceil(self.rows / config.block_n), math.ceil(tokens / config.block_m)

    def rule(self, tokens: int, multiprocessors: int) -> Config | None:
        return Config(16, 128, 1, 4, 4) if tokens <= 64 else Config(128, 128, 1, 8, 3)

    def workspace(self, x: Tensor, config: Config) -> dict[str, Tensor]:
        return {"q": x.new_empty(x.shape, dtype=torch.int8), "step": x.new_empty(len(x), dtype=torch.float32)}

    def before(self, x: Tensor, prepared: Sequence[Tensor], workspace: Mapping[str, Tensor], config: Config) -> None:
        rounding = getattr(load_source(self.source), ROUND)
        rounding[(len(x),)](x, prepared[2], workspace["q"], workspace["step"], num_warps=4)
