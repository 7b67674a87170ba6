"""Eight bits on both sides, in two kernels:  tokens are rounded, then multiplied.

    t = max_j |x_j / m_j| / largest     q = round(x / (m t))            one program a token          (round_tokens)
    y = t s (q C^T) + b                 q C^T on the tensor cores       one program a tile, epilogue (fused_rounded)

fxcompress.codegen.ops.{int8,float8}_dynamic_linear say what it means. Ties of round() go to even there and here.

    Elements    largest    q C^T                         least card
    INT8        127        exact, int32                  sm_80
    E4M3        448        float32, 128 columns at once  sm_89: before, there is no such type

Codes and tokens are filled up to whole steps with zeros, so nothing is masked in the loop but rows. The tensor cores of
sm_90 keep 14 bits of a sum of 8-bit floats, so every step of the loop is taken out of them and added in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxcompress.codegen.spec import Call, Constant
from fxcompress.codegen.triton.epilogue import Epilogue
from fxcompress.codegen.triton.gemm import indent, store
from fxcompress.codegen.triton.kernel import Config, Kernel, Launch
from fxcompress.codegen.triton.loaders.base import TYPES, Loader

PREFIX = "w_"
ROUND, MULTIPLY = "round_tokens", "fused_rounded"


@dataclass(frozen=True)
class Elements:
    """What both sides are rounded to."""

    dtype: torch.dtype
    largest: float
    rounded: str  # of a float32
    total: str  # type of a sum
    dot: str  # options of tl.dot
    step: int  # columns
    least_arch: int


INT8 = Elements(torch.int8, 127.0, "parts.nearest({}).to(tl.int8)", "tl.int32", "out_dtype=tl.int32", 64, 80)
E4M3 = Elements(
    torch.float8_e4m3fn, 448.0, "({}).to(tl.float8e4nv)", "tl.float32", "max_num_imprecise_acc=128", 128, 89
)
ELEMENTS = {"int8_dynamic_linear": INT8, "float8_dynamic_linear": E4M3}


def round_tokens(name: str, weight: Codes) -> str:
    """The text of the first kernel: x, smooth -> q (M, WIDTH), step float32 (M,)."""
    elements = weight.elements
    return f"""@triton.jit
def {name}(x, smooth, q, step):
    K: tl.constexpr = {weight.columns}
    WIDTH: tl.constexpr = {weight.width}
    m = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, {1 << (weight.width - 1).bit_length()})
    inside = column < K
    even = tl.load(x + m * K + column, mask=inside, other=0.0).to(tl.float32)
    even = even / tl.load(smooth + column, mask=inside, other=1.0)
    t = tl.maximum(tl.max(tl.abs(even), 0) / {elements.largest}, 1.1754943508222875e-38)
    t += tl.sum(even * 0.0, 0)  # NaN where one of them is NaN or infinite: maxima and integers would drop it
    tl.store(q + m * WIDTH + column, {elements.rounded.format("even / t")}, mask=column < WIDTH)
    tl.store(step + m, t)
"""


@dataclass(frozen=True)
class Codes(Loader):
    """Codes (rows, width), a scale a row, and what x is divided by."""

    elements: Elements

    @property
    def label(self) -> str:
        return f"{TYPES[self.elements.dtype]} both"

    @property
    def plane(self) -> int:
        return self.elements.step

    @property
    def planes(self) -> int:
        return 1

    @property
    def width(self) -> int:
        """Columns, filled up to whole steps."""
        return -(-self.columns // self.step) * self.step

    @property
    def pointers(self) -> dict[str, str]:
        return {"codes": TYPES[self.elements.dtype], "scales": "fp32", "smooth": "fp32"}

    @property
    def constants(self) -> int:
        return 3

    def prepare(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        codes, scales, smooth = tensors
        filled = pad(codes, (0, self.width - self.columns)).contiguous().view(self.elements.dtype)
        return filled, scales.float().contiguous(), smooth.float().contiguous()

    def load(self, prefix: str) -> list[str]:
        # No `other`: Triton has no zero of 8-bit floats. A row that is not there is not stored.
        at = "rn.to(tl.int64)[:, None] * WIDTH + column[None, :]"
        return [f"column = {self.column(0)}", f"{prefix}tile = tl.load({prefix}codes + {at}, mask=n_in[:, None])"]

    def tile(self, prefix: str, plane: int) -> str:
        return f"{prefix}tile"

    def once(self, prefix: str) -> list[str]:
        return [f"{prefix}scale = tl.load({prefix}scales + rn, mask=n_in, other=0.0)"]

    def scaled(self, prefix: str, product: str, total: str) -> str:
        return f"{product} * {prefix}scale[:, None]"


def fused_rounded(name: str, weight: Codes, epilogue: Epilogue, outputs: Sequence[int]) -> str:
    """The text of the second. Arguments: x (not read), one y an output, the weight's, the epilogue's, q, step, M."""
    arguments = ["x", *(f"y{i}" for i in range(len(outputs))), *(PREFIX + p for p in weight.pointers)]
    arguments += [*(f"p_{o.name}" for o in epilogue.operands), "q", "step"]
    loop = [
        *weight.load(PREFIX),
        "q_tile = tl.load(q + rm.to(tl.int64)[None, :] * WIDTH + column[:, None], mask=m_in[None, :])",
        f"total = tl.dot({weight.tile(PREFIX, 0)}, q_tile, total, {weight.elements.dot})",
    ]
    token = "tl.load(step + rm, mask=m_in, other=0.0)[None, :]"
    scaled = weight.scaled(PREFIX, "total.to(tl.float32)", "")
    finish = [*weight.once(PREFIX), f"acc = {scaled} * {token}", *epilogue.lines, *store(epilogue, outputs)]
    return f"""@triton.jit
def {name}({", ".join(arguments)}, M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    N: tl.constexpr = {weight.rows}
    WIDTH: tl.constexpr = {weight.width}
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rm = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_in, m_in = rn < N, rm < M
    inside = n_in[:, None] & m_in[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), {weight.elements.total})
    for k in range(0, WIDTH, {weight.step}):
{indent(loop, 8)}
{indent(finish, 4)}
"""


class RoundedProduct(Kernel):
    """Two launches; the tokens' codes and scales lie in memory between them."""

    @classmethod
    def read(cls, product: Call) -> tuple[tuple[str, Loader], ...]:
        codes = product.args[1]
        assert isinstance(codes, Constant)
        rows, columns = codes.shape
        return ((PREFIX, Codes(rows, columns, ELEMENTS[product.name])),)

    @property
    def weight(self) -> Codes:
        ((_, weight),) = self.loaders
        assert isinstance(weight, Codes)
        return weight

    @property
    def least_arch(self) -> int:
        return self.weight.elements.least_arch

    @functools.cached_property
    def forms(self) -> dict[str, str]:
        multiply = fused_rounded(MULTIPLY, self.weight, self.epilogue, self.spec.outputs)
        return {ROUND: round_tokens(ROUND, self.weight), MULTIPLY: multiply}

    @property
    def aside(self) -> list[Launch]:
        q = "*" + TYPES[self.weight.elements.dtype]
        types = {"x": "*" + TYPES[self.dtype], "smooth": "*fp32", "q": q, "step": "*fp32"}
        return [Launch(ROUND, types, {}, False)]

    def form(self, config: Config) -> str:
        return MULTIPLY

    def constants(self, config: Config) -> dict[str, int]:
        return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}

    def grid(self, tokens: int, config: Config) -> tuple[int, ...]:
        return math.ceil(self.rows / config.block_n), math.ceil(tokens / config.block_m)

    def workspace(self, x: Tensor, config: Config) -> dict[str, Tensor]:
        q = x.new_empty(len(x), self.weight.width, dtype=self.weight.elements.dtype)
        return {"q": q, "step": x.new_empty(len(x), dtype=torch.float32)}

    def rule(self, tokens: int, multiprocessors: int) -> Config | None:
        return Config(16, 128, 1, 4, 4) if tokens <= 64 else Config(128, 128, 1, 8, 3)

    def before(self, x: Tensor, prepared: Sequence[Tensor], workspace: Mapping[str, Tensor], config: Config) -> None:
        rounding = getattr(self.module, ROUND)
        rounding[(len(x),)](x, prepared[2], workspace["q"], workspace["step"], num_warps=4)
