"""The epilogue: every pointwise step of a spec as a line of a kernel, on the accumulator in float32.

    linear(...) | gelu(_) | add(_, extra[0])          v1 = parts.gelu(acc)
                                                      v2 = v1 + e0

The accumulator is the result transposed, (BLOCK_N, BLOCK_M). An operand is read as what it broadcasts from:

    row      (N,)       one for an output feature        column   (..., 1)   one for a token
    full     (..., N)   one for each                     scalar   ()

The op's body rounds to the type of x after every step, a kernel once at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fxcompress.codegen.spec import UNROWS, Argument, Call, Constant, Extra, Input, Value
from fxcompress.core.errors import SpecError

Kind = Literal["row", "column", "full", "scalar"]
_READS: Mapping[Kind, str] = {
    "row": "tl.load({0} + rn, mask=n_in, other=0.0).to(tl.float32)[:, None]",
    "column": "tl.load({0} + rm, mask=m_in, other=0.0).to(tl.float32)[None, :]",
    "full": "tl.load({0} + rm.to(tl.int64)[None, :] * N + rn[:, None], mask=inside, other=0.0).to(tl.float32)",
    "scalar": "tl.load({0}).to(tl.float32)",
}
_UNARY = {
    "abs": "tl.abs({0})", "erf": "tl.erf({0})", "exp": "tl.exp({0})", "neg": "-{0}", "reciprocal": "1.0 / {0}",
    "relu": "tl.maximum({0}, 0.0)", "rsqrt": "tl.rsqrt({0})", "sigmoid": "tl.sigmoid({0})", "silu": "parts.silu({0})",
    "sqrt": "tl.sqrt({0})", "square": "{0} * {0}", "tanh": "parts.tanh({0})",
    "relu6": "tl.minimum(tl.maximum({0}, 0.0), 6.0)",
    "hardsigmoid": "tl.minimum(tl.maximum({0} / 6.0 + 0.5, 0.0), 1.0)",
    "hardswish": "{0} * tl.minimum(tl.maximum({0} / 6.0 + 0.5, 0.0), 1.0)",
}  # fmt: skip
_BINARY = {
    "div": "{0} / {1}", "maximum": "tl.maximum({0}, {1})", "minimum": "tl.minimum({0}, {1})", "mul": "{0} * {1}",
}  # fmt: skip


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
    """Lines, the name of what each step made, and the operands in the order in which they are read."""

    lines: tuple[str, ...]
    values: tuple[str, ...]
    operands: tuple[Operand, ...]


def print_epilogue(steps: Sequence[Call], constants: int, kinds: Sequence[Kind], bias: Constant | None) -> Epilogue:
    """Steps after the product, step 0 (its value is `acc`), whose own `bias` comes first.

    `constants` are taken by the product's weight; `kinds` are those of the extras. Raises `SpecError` for a step there
    is no line for.
    """
    printer = _Printer(constants, kinds)
    if bias is not None:
        printer.add_bias(bias)
    return printer.print(steps)


class _Printer:
    """Walks the steps once, numbering constants as they come."""

    def __init__(self, constants: int, kinds: Sequence[Kind]) -> None:
        self.next_constant = constants
        self.kinds = kinds
        self.lines: list[str] = []
        self.values = ["acc"]
        self.operands: dict[str, Operand] = {}

    def add_bias(self, bias: Constant) -> None:
        self.lines.append(f"acc = acc + {self._value(bias)}")

    def print(self, steps: Sequence[Call]) -> Epilogue:
        for call in steps:
            if call.name == UNROWS:  # a matter of shape
                self.values.append(self._value(call.args[0]))
                continue
            name = f"v{len(self.values)}"
            self.lines.append(f"{name} = {self._expression(call)}")
            self.values.append(name)
        return Epilogue(tuple(self.lines), tuple(self.values), tuple(self.operands.values()))

    def _expression(self, call: Call) -> str:
        args, named = [self._value(a) for a in call.args], dict(call.named)
        match call.name, named:
            case "gelu", {"approximate": "tanh"}:
                return f"parts.gelu_tanh({args[0]})"
            case "gelu", {}:
                return f"parts.gelu({args[0]})"
            case ("add" | "sub"), _:
                other = args[1] if len(args) > 1 else self._value(named["other"])
                scaled = other if named.get("alpha", 1) == 1 else f"{named['alpha']!r} * {other}"
                return f"{args[0]} {'+' if call.name == 'add' else '-'} {scaled}"
            case name, _ if name in _BINARY:
                other = args[1] if len(args) > 1 else self._value(named["other"])
                return _BINARY[name].format(args[0], other)
            case name, {} if name in _UNARY and len(args) == 1:
                return _UNARY[name].format(args[0])
        raise SpecError(f"there is no epilogue for {call.name}{tuple(named) or ''}.")

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
                return repr(float(argument))
            case Input():
                raise SpecError("there is no epilogue that reads the input of its product.")
        raise SpecError(f"there is no epilogue for {argument!r}.")

    def _read(self, operand: Operand) -> str:
        if operand.name not in self.operands:
            self.operands[operand.name] = operand
            self.lines.append(f"{operand.name} = " + _READS[operand.kind].format(f"p_{operand.name}"))
        return operand.name
