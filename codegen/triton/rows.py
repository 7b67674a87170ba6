"""Programs that own whole rows: norms, and whatever pointwise stands around them.

    x (M, N)  ->  one program a few tokens, BLOCK_N >= N       mean = sum over the row / N, in float32

    layer_norm    c = x - mean x     y = c / sqrt(mean c^2 + eps) g + b
    rms_norm      y = x / sqrt(mean x^2 + eps) g
    mean          one number a token, for norms that are written out

The row stays in registers, so the mean is known before anything is measured from it, and x is read once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxcompress.codegen.spec import Argument, Call, Constant, Extra, Input, Spec, Value, given
from fxcompress.codegen.triton.epilogue import Kind, Printer
from fxcompress.codegen.triton.gemm import indent, store
from fxcompress.codegen.triton.kernel import Config, Kernel, Launch
from fxcompress.codegen.triton.loaders.base import Loader
from fxcompress.codegen.triton.norm import norm_of
from fxcompress.core.errors import SpecError

NAME = "whole_rows"
MOST = 16_384  # features of a row: what the registers of one program hold
_PROGRAM = 4_096  # elements it works on at least


class RowPrinter(Printer):
    """Knows x, and sums over rows."""

    def _value(self, argument: Argument) -> str:
        return "acc" if isinstance(argument, Input) else super()._value(argument)

    def _type(self, call: Call) -> torch.dtype:
        if call.name in ("layer_norm", "rms_norm", "mean") or any(isinstance(a, Input) for a in call.args):
            return self.dtype
        return super()._type(call)

    def _expression(self, call: Call) -> str:
        named, norm = given(call), norm_of([call])
        match call.name:
            case "mean":
                return _mean(self._value(call.args[0]))
            case "rms_norm":
                assert norm is not None
                x = self._value(named["input"])
                return self._scaled(f"{x} * tl.rsqrt({_mean(f'{x} * {x}')} + {norm.epsilon(self.dtype)!r})", named)
            case "layer_norm":
                assert norm is not None
                x = self._value(named["input"])
                self.lines.append(f"centred = {x} - {_mean(x)}")
                variance = _mean("centred * centred")
                return self._scaled(f"centred * tl.rsqrt({variance} + {norm.epsilon(self.dtype)!r})", named)
        return super()._expression(call)

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

    def header(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.spec}\n\n    x (M, {self.rows}) {dtype}  ->  y (M, {self.rows})\n"

    @functools.cached_property
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

    def launches(self, config: Config) -> list[Launch]:
        return [replace(launch, multiplies=False) for launch in super().launches(config)]

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


def whole_rows(spec: Spec, dtype: torch.dtype, kinds: Sequence[Kind]) -> WholeRows:
    """The kernel of a program without a product. Raises `SpecError`."""
    features = _features(spec)
    if features > MOST:
        raise SpecError(f"rows of {features} features do not stay on the chip: at most {MOST:,}.")
    if any(_reduced(spec)[i] for i in spec.outputs):
        raise SpecError("there is no kernel that writes one number a row.")
    printer = RowPrinter(0, kinds, dtype)
    printer.values, printer.types = [], []
    return WholeRows(spec, dtype, (), printer.print(spec.steps), features)


def _reduced(spec: Spec) -> list[bool]:
    """Steps whose value is one number a row."""
    reduced: list[bool] = []
    for call in spec.steps:
        read = [a for a in call.args if isinstance(a, Input | Extra | Value | Constant)]
        reduced.append(
            call.name == "mean" or (bool(read) and all(isinstance(a, Value) and reduced[a.index] for a in read))
        )
    return reduced


def _features(spec: Spec) -> int:
    """N, by the norms and the constants of a whole row."""
    sizes: list[Any] = []
    for call in spec.steps:
        shape = dict(call.named).get("normalized_shape")
        sizes += shape if isinstance(shape, tuple) else ()
    sizes += [c.shape[-1] for c in spec.constants if c.shape and c.shape[-1] > 1]
    if not sizes:
        raise SpecError("there is no kernel for rows whose length no norm and no constant tells.")
    return int(sizes[0])
