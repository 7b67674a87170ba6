"""Programs that own whole rows: norms, and whatever pointwise stands around them.

    x (M, N)  ->  one program a few tokens, BLOCK_N >= N       mean = sum over the row / N, in float32

    layer_norm    c = x - mean x     y = c / sqrt(mean c^2 + eps) g + b
    rms_norm      y = x / sqrt(mean x^2 + eps) g
    mean          one number a token, for norms that are written out

The row stays in registers, so the mean is known before anything is measured from it, and x is read once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fxcompress.codegen.spec import Argument, Call, Constant, Input, given
from fxcompress.codegen.triton.epilogue import Printer
from fxcompress.codegen.triton.gemm import indent, store
from fxcompress.codegen.triton.kernel import Config, Kernel
from fxcompress.codegen.triton.loaders.base import Loader
from fxcompress.core.errors import SpecError

NAME = "whole_rows"
MOST = 16_384  # features of a row: what the registers of one program hold
_PROGRAM = 4_096  # elements it works on at least


class RowPrinter(Printer):
    """Knows x, and sums over rows."""

    def _value(self, argument: Argument) -> str:
        return "acc" if isinstance(argument, Input) else super()._value(argument)

    def _expression(self, call: Call) -> str:
        named = given(call)
        match call.name:
            case "mean":
                return _mean(self._value(call.args[0]))
            case "rms_norm":
                x = self._value(named["input"])
                return self._scaled(f"{x} * tl.rsqrt({_mean(f'{x} * {x}')} + {self._eps(named)!r})", named)
            case "layer_norm":
                x = self._value(named["input"])
                self.lines.append(f"centred = {x} - {_mean(x)}")
                return self._scaled(f"centred * tl.rsqrt({_mean('centred * centred')} + {self._eps(named)!r})", named)
        return super()._expression(call)

    def _eps(self, named: dict[str, Argument]) -> float:
        eps = named.get("eps", 1e-5)
        if not isinstance(eps, float):
            raise SpecError(f"there is no kernel for a norm whose eps is {eps!r}.")
        return eps

    def _scaled(self, text: str, named: dict[str, Argument]) -> str:
        weight, bias = (named.get(name) for name in ("weight", "bias"))
        text = f"{text} * {self._value(weight)}" if isinstance(weight, Constant) else text
        return f"{text} + {self._value(bias)}" if isinstance(bias, Constant) else text


def _mean(text: str) -> str:
    return f"(tl.sum(tl.where(n_in[:, None], {text}, 0.0), 0) / N)[None, :]"


@dataclass(frozen=True)
class WholeRows(Kernel):
    """No product: a norm of x (M, N)."""

    features: int = 0

    @classmethod
    def read(cls, product: Call) -> tuple[tuple[str, Loader], ...]:
        return ()

    @property
    def forms(self) -> dict[str, str]:
        arguments = ["x", *(f"y{i}" for i in range(len(self.spec.outputs)))]
        arguments += [f"p_{o.name}" for o in self.epilogue.operands]
        return {
            NAME: f"""@triton.jit
def {NAME}({", ".join(arguments)}, M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    N: tl.constexpr = {self.rows}
    rn = tl.arange(0, BLOCK_N)
    rm = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_in, m_in = rn < N, rm < M
    inside = n_in[:, None] & m_in[None, :]
    acc = tl.load(x + rm.to(tl.int64)[None, :] * N + rn[:, None], mask=inside, other=0.0).to(tl.float32)
{indent([*self.epilogue.lines, *store(self.epilogue, self.spec.outputs)], 4)}
"""
        }

    def form(self, config: Config) -> str:
        return NAME

    def constants(self, config: Config) -> dict[str, int]:
        return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}

    def grid(self, tokens: int, config: Config) -> tuple[int, ...]:
        return (math.ceil(tokens / config.block_m),)

    def rule(self, tokens: int, multiprocessors: int) -> Config | None:
        width = 1 << (self.rows - 1).bit_length()
        each = max(1, min(_PROGRAM // width, 16))
        return Config(each, width, 1, 4 if width * each <= 4096 else 8, 1)

    @property
    def rows(self) -> int:
        return self.features

    @property
    def columns(self) -> int:
        return self.features

    @property
    def label(self) -> str:
        return f"rows {str(self.dtype).removeprefix('torch.')}"
