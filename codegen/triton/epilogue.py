"""The epilogue: every pointwise step of a spec as a line of a kernel, on the accumulator in float32.

    linear(...) | gelu(_) | add(_, extra[0])          v1 = parts.gelu(acc)
                                                      v2 = v1 + e0

The accumulator is the result transposed, (BLOCK_N, BLOCK_M). An operand is read as what it broadcasts from:

    row      (N,)       one for an output feature        column   (..., 1)   one for a token
    full     (..., N)   one for each                     scalar   ()

The op's body rounds to the type of x after every step, a kernel where there is a cast and once at the end.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fxcompress.codegen.spec import UNROWS, Argument, Call, Constant, Extra, Input, Value, given, op_of
from fxcompress.core.errors import SpecError

Kind = Literal["row", "column", "full", "scalar"]
_READS: Mapping[Kind, str] = {
    "row": "tl.load({0} + rn, mask=n_in, other=0.0).to(tl.float32)[:, None]",
    "column": "tl.load({0} + rm, mask=m_in, other=0.0).to(tl.float32)[None, :]",
    "full": "tl.load({0} + rm.to(tl.int64)[None, :] * N + rn[:, None], mask=inside, other=0.0).to(tl.float32)",
    "scalar": "tl.load({0}).to(tl.float32)",
}
# {0} and {1} are the tensors a step is given, in order; a name is an argument, its default where none is written.
LINES = {
    "abs": "tl.abs({0})", "div": "{0} / {1}", "erf": "tl.erf({0})", "exp": "tl.exp({0})", "mul": "{0} * {1}",
    "neg": "-{0}", "reciprocal": "1.0 / {0}", "rsqrt": "tl.rsqrt({0})", "sigmoid": "tl.sigmoid({0})",
    "sqrt": "tl.sqrt({0})", "square": "{0} * {0}", "tanh": "parts.tanh({0})",
    "maximum": "parts.maximum({0}, {1})", "minimum": "parts.minimum({0}, {1})",
    "relu": "parts.maximum({0}, 0.0)", "relu6": "parts.clamp({0}, 0.0, 6.0)",
    "clamp": "parts.clamp({0}, {min}, {max})", "hardtanh": "parts.clamp({0}, {min_val}, {max_val})",
    "hardsigmoid": "parts.clamp({0} / 6.0 + 0.5, 0.0, 1.0)",
    "hardswish": "{0} * parts.clamp({0} / 6.0 + 0.5, 0.0, 1.0)",
    "leaky_relu": "tl.where({0} > 0.0, {0}, {negative_slope} * {0})",
    "silu": "parts.silu({0})", "mish": "parts.mish({0})",
    "softplus": "parts.softplus({0}, {beta}, {threshold})",
    "elu": "parts.elu({0}, {alpha}, {scale}, {input_scale})",
}  # fmt: skip
_GELUS = {"none": "parts.gelu({0})", "tanh": "parts.gelu_tanh({0})"}
_SUMS = {"add": "{0} + {1}", "sub": "{0} - {1}"}
_CASTS = {
    torch.float32: "{0}", torch.float16: "{0}.to(tl.float16).to(tl.float32)",
    torch.bfloat16: "{0}.to(tl.bfloat16).to(tl.float32)", torch.int32: "{0}.to(tl.int32).to(tl.float32)",
    torch.int16: "{0}.to(tl.int16).to(tl.float32)", torch.int8: "{0}.to(tl.int8).to(tl.float32)",
    torch.uint8: "{0}.to(tl.uint8).to(tl.float32)",
}  # fmt: skip
_UNBOUNDED = {"min": -math.inf, "max": math.inf}  # of clamp, where None is given


@dataclass(frozen=True)
class Operand:
    """A tensor the epilogue reads: the constant or extra of that number."""

    source: Constant | Extra
    number: int
    kind: Kind

    @property
    def name(self) -> str:
        return f"{'e' if isinstance(self.source, Extra) else 'c'}{self.number}"


@dataclass(frozen=True)
class Epilogue:
    """Lines, the name and the type of what each step made, and the operands in the order in which they are read."""

    lines: tuple[str, ...]
    values: tuple[str, ...]
    types: tuple[torch.dtype, ...]
    operands: tuple[Operand, ...]


def print_epilogue(
    steps: Sequence[Call], constants: int, kinds: Sequence[Kind], bias: Constant | None, dtype: torch.dtype
) -> Epilogue:
    """Steps after the product, step 0 (its value is `acc`), whose own `bias` comes first.

    `constants` are taken by the product's weight; `kinds` are those of the extras, which are of `dtype`, as the product
    is. Raises `SpecError` for a step there is no line for.
    """
    printer = Printer(constants, kinds, dtype)
    if bias is not None:
        printer.add_bias(bias)
    return printer.print(steps)


class Printer:
    """Walks the steps once, numbering constants as they come."""

    def __init__(self, constants: int, kinds: Sequence[Kind], dtype: torch.dtype) -> None:
        self.next_constant = constants
        self.kinds = kinds
        self.dtype = dtype
        self.lines: list[str] = []
        self.values = ["acc"]
        self.types = [dtype]
        self.operands: dict[str, Operand] = {}

    def add_bias(self, bias: Constant) -> None:
        self.lines.append(f"acc = acc + {self._value(bias)}")

    def print(self, steps: Sequence[Call]) -> Epilogue:
        for call in steps:
            self.types.append(self._type(call))
            if call.name == UNROWS:  # a matter of shape
                self.values.append(self._value(call.args[0]))
                continue
            name = f"v{len(self.values)}"
            self.lines.append(f"{name} = {self._expression(call)}")
            self.values.append(name)
        return Epilogue(tuple(self.lines), tuple(self.values), tuple(self.types), tuple(self.operands.values()))

    def _expression(self, call: Call) -> str:
        named = dict(call.named)
        tensors = [self._value(a) for a in call.args]
        if "other" in named:  # a number in a tensor's place
            tensors.append(self._value(named.pop("other")))
        match call.name:
            case "gelu":
                return _GELUS[str(named.get("approximate", "none"))].format(*tensors)
            case "add" | "sub":
                alpha = named.get("alpha", 1)
                scaled = tensors[1] if alpha == 1 else f"{_number(alpha)} * {tensors[1]}"
                return _SUMS[call.name].format(tensors[0], scaled)
            case "pow":
                return _power(tensors[0], named["exponent"])
            case "to" if named["dtype"] in _CASTS:
                return _CASTS[named["dtype"]].format(*tensors)
            case name if name in LINES:
                return LINES[name].format(*tensors, **_parameters(call))
        raise SpecError(f"there is no epilogue for {call.name}{tuple(named.values()) or ''}.")

    def _type(self, call: Call) -> torch.dtype:
        """The dtype of what `call` makes in the op's body: tensors of no dimension and numbers do not promote."""
        if call.name == "to":
            return given(call)["dtype"]  # type: ignore[return-value]
        types = []
        for argument in call.arguments:
            match argument:
                case Value(index):
                    types.append(self.types[index])
                case Constant(dtype, (_, *_)):
                    types.append(dtype)
                case Extra():
                    types.append(self.dtype)
        made = functools.reduce(torch.promote_types, types)
        if not made.is_floating_point and call.name != UNROWS:
            raise SpecError(f"there is no epilogue for {call.name} of {made}: after a cast to integers comes another.")
        return made

    def _value(self, argument: Argument) -> str:
        match argument:
            case Value(index):
                return self.values[index]
            case Constant(_, shape):
                number, self.next_constant = self.next_constant, self.next_constant + 1
                wide = len(shape) > 0 and shape[-1] > 1
                if any(size != 1 for size in shape[:-1]):
                    raise SpecError(f"there is no epilogue for a constant of shape {list(shape)}.")
                return self._read(Operand(argument, number, "row" if wide else "scalar"))
            case Extra(index):
                return self._read(Operand(argument, index, self.kinds[index]))
            case bool() | int() | float():
                return _number(argument)
            case Input():
                raise SpecError("there is no epilogue that reads the input of its product.")
        raise SpecError(f"there is no epilogue for {argument!r}.")

    def _read(self, operand: Operand) -> str:
        if operand.name not in self.operands:
            self.operands[operand.name] = operand
            self.lines.append(f"{operand.name} = " + _READS[operand.kind].format(f"p_{operand.name}"))
        return operand.name


def _parameters(call: Call) -> dict[str, str]:
    """The arguments of a call that are numbers, those left out too, as lines write them."""
    written = given(call)
    schema = [a for a in op_of(call.name)._schema.arguments if "Scalar" in str(a.type) or "number" in str(a.type)]
    values = {a.name: written.get(a.name, a.default_value) for a in schema}
    return {name: _number(_UNBOUNDED[name] if value is None else value) for name, value in values.items()}


def _number(value: Any) -> str:
    """A number as a kernel writes it."""
    return repr(float(value)) if math.isfinite(value) else f'float("{value}")'


def _power(base: str, exponent: Any) -> str:
    """torch's meaning: a negative number has whole powers alone, the others are NaN."""
    if not math.isfinite(exponent):
        raise SpecError(f"there is no epilogue for pow with the exponent {exponent}.")
    if exponent == 0:
        return f"tl.zeros_like({base}) + 1.0"
    if exponent == int(exponent):
        whole = f"parts.power({base}, {abs(int(exponent))})"
        return whole if exponent > 0 else f"1.0 / {whole}"
    roots = {0.5: f"tl.sqrt({base})", -0.5: f"tl.rsqrt({base})"}
    return roots.get(exponent, f"tl.exp2({_number(exponent)} * tl.log2({base}))")
