"""The program of a fused node: straight-line steps on one input, as a text that is also a Python expression.

    linear(x, dequantize(uint8[1536, 192], uint8[1536, 6], uint8[1536, 3], float32[2], bits=4, group_size=64,
        columns=384, dtype=float32), float32[1536]) | gelu(_) | add(_, extra[0])

Steps run from left to right, each one call. Its arguments are

    x                   the input (..., in)               rows         the input as a matrix (tokens, in)
    _                   what the step before made         step[0]      what step 0 made, the first one
    uint8[1536, 192]    a constant: its dtype and shape   extra[0]     another activation
    dequantize(...)     a call, of constants alone        4, 'tanh', float32, [8, 8]   whatever is no tensor

Constants carry no number: the first one written is tensors[0] of the node, the next tensors[1], and so on. Tensor
arguments stand in the order of the op's schema, all others are named; an argument equal to its default is left out, so
equal programs have equal texts. `unrows(_)` gives a matrix the leading dimensions of x again. A node with several
outputs ends in `outputs(step[0], _)`.

A kernel generator reads: a linear of x, rows or a norm of them is a product (main loop), the calls nested in it say how
its weights are kept (loaders), every other step is pointwise (epilogue), with operands that broadcast to the product,
or acts on whole rows (layer_norm, rms_norm, mean).
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._ops import OpOverload

from fxcompress.core.errors import SpecError

aten = torch.ops.aten

PRODUCTS = (aten.linear.default,)
OF_CONSTANTS = (aten.addmm.default, aten.matmul.default, aten.repeat_interleave.self_int, aten.t.default)
POINTWISE = (
    aten.abs.default, aten.add.Tensor, aten.clamp.default, aten.div.Tensor, aten.elu.default, aten.erf.default,
    aten.exp.default, aten.gelu.default, aten.hardsigmoid.default, aten.hardswish.default, aten.hardtanh.default,
    aten.leaky_relu.default, aten.maximum.default, aten.minimum.default, aten.mish.default, aten.mul.Tensor,
    aten.neg.default, aten.pow.Tensor_Scalar, aten.reciprocal.default, aten.relu.default, aten.relu6.default,
    aten.rsqrt.default, aten.sigmoid.default, aten.silu.default, aten.softplus.default, aten.sqrt.default,
    aten.square.default, aten.sub.Tensor, aten.tanh.default, aten.to.dtype,
)  # fmt: skip
ROWWISE = (aten.layer_norm.default, aten.rms_norm.default, aten.mean.dim)  # over the last dimension
UNROWS, OUTPUTS = "unrows", "outputs"
_ATEN: Mapping[str, OpOverload] = {
    op._schema.name.removeprefix("aten::"): op for op in PRODUCTS + OF_CONSTANTS + POINTWISE + ROWWISE
}
_ROWWISE = frozenset(op._schema.name.removeprefix("aten::") for op in ROWWISE)


@dataclass(frozen=True)
class Input:
    """x, or x as a matrix."""

    rows: bool = False


@dataclass(frozen=True)
class Constant:
    """The next of `tensors`."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Extra:
    """extras[index]."""

    index: int


@dataclass(frozen=True)
class Value:
    """What step `index` made."""

    index: int


@dataclass(frozen=True)
class Call:
    """An op by name and its arguments; a tuple among them is a list."""

    name: str
    args: tuple[Argument, ...] = ()
    named: tuple[tuple[str, Argument], ...] = ()

    @classmethod
    def of(cls, op: OpOverload, given: Mapping[str, Argument]) -> Call:
        """The one way to write `op` with the arguments `given`, by their names in its schema."""
        args: list[Argument] = []
        named: list[tuple[str, Argument]] = []
        for position, argument in enumerate(op._schema.arguments):
            if argument.name not in given or _is_default(given[argument.name], argument):
                continue
            value = given[argument.name]
            if position == len(args) and "Tensor" in str(argument.type) and not argument.kwarg_only:
                args.append(value)
            else:
                named.append((argument.name, value))
        return cls(name_of(op), tuple(args), tuple(named))

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """All of them, in the order of the text."""
        return (*self.args, *(value for _, value in self.named))


Argument = Input | Constant | Extra | Value | Call | tuple[Any, ...] | bool | int | float | str | torch.dtype | None
_LITERALS = (bool, int, float, str, torch.dtype, type(None))


@dataclass(frozen=True)
class Spec:
    """steps in order; outputs: the steps whose values leave the node. `str` is its text, `parse` the inverse."""

    steps: tuple[Call, ...]
    outputs: tuple[int, ...]

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:  # once: every launch looks its kernel up by it
        return hash((self.steps, self.outputs))

    def __str__(self) -> str:
        texts = [_text(call, at) for at, call in enumerate(self.steps)]
        if self.outputs != (len(self.steps) - 1,):
            texts.append(_text(Call(OUTPUTS, tuple(Value(i) for i in self.outputs)), len(self.steps)))
        return " | ".join(texts)

    @functools.cached_property
    def constants(self) -> tuple[Constant, ...]:
        """The types of `tensors`."""
        return tuple(a for a in leaves(self.steps) if isinstance(a, Constant))

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Every place that reads x."""
        return tuple(a for a in leaves(self.steps) if isinstance(a, Input))

    @functools.cached_property
    def extras(self) -> int:
        """How many `extras` there are."""
        return max((a.index + 1 for a in leaves(self.steps) if isinstance(a, Extra)), default=0)


def name_of(op: OpOverload) -> str:
    """gelu, low_rank_linear: the name without its namespace."""
    return str(op._schema.name.split("::")[1])


@functools.cache
def op_of(name: str) -> OpOverload:
    """The inverse: one of the aten ops above, or any op of fxcompress. Raises `SpecError`."""
    own = getattr(torch.ops.fxcompress, name, None)
    found: OpOverload | None = _ATEN[name] if name in _ATEN else getattr(own, "default", None)
    if found is None:
        raise SpecError(f"a fused node cannot call {name!r}; it calls ops of fxcompress and {', '.join(_ATEN)}.")
    return found


def is_product(call: Call) -> bool:
    """True for a linear op, of whatever structure, of an activation and constants."""
    constants = any(isinstance(a, Constant | Call | tuple) for a in call.arguments[1:])
    return call.name.endswith("linear") and constants and isinstance(call.args[0], Input | Value)


def is_rowwise(call: Call) -> bool:
    """True for what acts on whole rows."""
    return call.name in _ROWWISE


def given(call: Call) -> dict[str, Argument]:
    """The arguments of a call that the text writes, by their names in the op's schema."""
    return {**dict(zip((a.name for a in op_of(call.name)._schema.arguments), call.args)), **dict(call.named)}


def is_literal(value: object) -> bool:
    """True for what can be written into a spec as it is: no symbolic size, no device, no NaN (unequal to itself)."""
    if isinstance(value, list | tuple):
        return all(map(is_literal, value))
    return type(value) in _LITERALS and value == value


def beside(specs: Iterable[Spec], extras: Iterable[tuple[int, ...]]) -> Spec:
    """Programs on one input as one program with all their outputs; `extras` renumbers those of each."""
    steps: list[Call] = []
    outputs: list[int] = []
    for spec, numbers in zip(specs, extras, strict=True):
        start = len(steps)
        steps += [_renumbered(call, start, numbers) for call in spec.steps]
        outputs += [start + i for i in spec.outputs]
    return Spec(tuple(steps), tuple(outputs))


def after(calls: Sequence[Call], spec: Spec) -> Spec:
    """`spec` reading the last of `calls` as its input."""
    last = Value(len(calls) - 1)
    steps = tuple(_renumbered(call, len(calls), range(spec.extras), last) for call in spec.steps)
    return Spec((*calls, *steps), tuple(len(calls) + i for i in spec.outputs))


def behind(spec: Spec, at: int) -> Spec:
    """The inverse of `after`: the steps from `at` on, reading as their input what the step before them made."""

    def moved(value: Argument) -> Any:
        match value:
            case Value(index):
                return Input() if index == at - 1 else Value(index - at)
            case Call(name, args, named):
                return Call(name, tuple(map(moved, args)), tuple((k, moved(v)) for k, v in named))
            case tuple():
                return tuple(map(moved, value))
        return value

    return Spec(tuple(map(moved, spec.steps[at:])), tuple(i - at for i in spec.outputs))


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> Spec:
    """`str(parse(text))` is `text` as `Spec` writes it. Raises `SpecError`."""
    try:
        tree: ast.expr = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError) as error:
        raise SpecError(f"{text!r} is no program of a fused node: {error}.") from None
    parts: list[ast.expr] = []
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitOr):  # a | b | c is (a | b) | c
        parts.append(tree.right)
        tree = tree.left
    steps = [_parsed_call(part, at, text) for at, part in enumerate([tree, *reversed(parts)])]
    outputs: tuple[int, ...] = (len(steps) - 1,)
    if steps[-1].name == OUTPUTS:
        last = steps.pop()
        outputs = tuple(a.index for a in last.args if isinstance(a, Value))
        if not outputs or len(outputs) != len(last.arguments):
            _refuse(text, "outputs takes steps")
    for call in steps:
        _check(call, text)
    return Spec(tuple(steps), outputs)


def _text(value: Argument, at: int) -> str:
    match value:
        case Input(rows):
            return "rows" if rows else "x"
        case Constant(dtype, shape):
            return f"{_dtype(dtype)}[{', '.join(map(str, shape)) or '()'}]"
        case Extra(index):
            return f"extra[{index}]"
        case Value(index):
            return "_" if index == at - 1 else f"step[{index}]"
        case Call(name, args, named):
            return f"{name}({', '.join([*(_text(a, at) for a in args), *(f'{k}={_text(v, at)}' for k, v in named)])})"
        case tuple():
            return f"[{', '.join(_text(v, at) for v in value)}]"
        case torch.dtype():
            return _dtype(value)
    return repr(value)  # floats too: repr is the shortest text that reads back as the same bits, or inf


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _parsed_call(tree: ast.expr, at: int, text: str) -> Call:
    call = _parsed(tree, at, text)
    return call if isinstance(call, Call) else _refuse(text, f"step {at} is no call")


def _parsed(tree: ast.expr, at: int, text: str) -> Argument:
    match tree:
        case ast.Constant(literal) if is_literal(literal):
            return literal  # type: ignore[return-value]
        case ast.UnaryOp(ast.USub(), operand):
            number = _parsed(operand, at, text)
            return -number if isinstance(number, int | float) else _refuse(text, "a minus stands before a number")
        case ast.List(elements):
            return tuple(_parsed(e, at, text) for e in elements)
        case ast.Name(name):
            return _named(name, at, text)
        case ast.Subscript(ast.Name(name), index):
            return _indexed(name, index, at, text)
        case ast.Call(ast.Name(name), args, keywords) if all(k.arg for k in keywords):
            named = tuple((str(k.arg), _parsed(k.value, at, text)) for k in keywords)
            return Call(name, tuple(_parsed(a, at, text) for a in args), named)
    return _refuse(text, f"{ast.unparse(tree)!r} is no argument")


def _named(name: str, at: int, text: str) -> Argument:
    known: dict[str, Argument] = {"x": Input(), "rows": Input(rows=True), "inf": math.inf}
    if name == "_":
        return _value(at - 1, at, text)
    dtype = getattr(torch, name, None)
    if name not in known and not isinstance(dtype, torch.dtype):
        _refuse(text, f"{name!r} is no argument")
    return known.get(name, dtype)


def _indexed(name: str, index: ast.expr, at: int, text: str) -> Argument:
    parts = [_parsed(e, at, text) for e in (index.elts if isinstance(index, ast.Tuple) else [index])]
    sizes = tuple(part for part in parts if type(part) is int)
    dtype = getattr(torch, name, None)
    if len(sizes) == len(parts):
        if isinstance(dtype, torch.dtype):
            return Constant(dtype, sizes)
        if name in ("step", "extra") and len(sizes) == 1:
            return _value(sizes[0], at, text) if name == "step" else Extra(sizes[0])
    return _refuse(text, f"{name}[{ast.unparse(index)}] is no argument")


def _value(index: int, at: int, text: str) -> Value:
    return Value(index) if 0 <= index < at else _refuse(text, f"step {at} reads step {index}")


def _check(call: Call, text: str) -> None:
    """Known ops, known names of arguments, and calls inside calls of constants alone."""
    if call.name == UNROWS:
        return None if len(call.arguments) == 1 else _refuse(text, "unrows takes one argument")
    names = [a.name for a in op_of(call.name)._schema.arguments]
    unknown = [name for name, _ in call.named if name not in names[len(call.args) :]]
    if unknown or len(call.args) > len(names):
        _refuse(text, f"{call.name} takes {', '.join(names)}, each once")
    for inner in call.arguments:
        if isinstance(inner, Call):
            if any(isinstance(a, Input | Extra | Value) for a in leaves([inner])):
                _refuse(text, f"{inner.name} is called inside {call.name}, so it can take constants only")
            _check(inner, text)
    return None


def _refuse(text: str, why: str) -> NoReturn:
    raise SpecError(f"{text!r} is no program of a fused node: {why}.")


def leaves(values: Iterable[Argument]) -> Iterator[Argument]:
    """What is no call and no list, in the order of the text."""
    for value in values:
        inner = value.arguments if isinstance(value, Call) else value if isinstance(value, tuple) else None
        if inner is None:
            yield value
        else:
            yield from leaves(inner)


def _renumbered(call: Call, start: int, numbers: Sequence[int], x: Value | None = None) -> Call:
    """Steps counted from `start`, extras by `numbers`; `x` in place of the input."""

    def moved(value: Argument) -> Any:
        match value:
            case Value(index):
                return Value(start + index)
            case Extra(index):
                return Extra(numbers[index])
            case Input():
                return x or value
            case Call():
                return _renumbered(value, start, numbers, x)
            case tuple():
                return tuple(map(moved, value))
        return value

    return Call(call.name, tuple(map(moved, call.args)), tuple((name, moved(value)) for name, value in call.named))


def _is_default(value: Argument, argument: Any) -> bool:
    if not argument.has_default_value():
        return False
    default = argument.default_value
    if isinstance(default, list):
        default = tuple(default)
    return type(value) is type(default) and value == default


def type_of(tensor: Tensor) -> Constant:
    """How a constant is written."""
    return Constant(tensor.dtype, tuple(tensor.shape))
