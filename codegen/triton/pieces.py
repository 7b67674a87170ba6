"""A program with several products as kernels of one product each, in the order of the products.

    linear(x, gate) | silu(_) | linear(x, up) | mul(step[1], _)

        piece 0     linear(x, gate) | silu(_)
        piece 1     linear(x, up) | mul(value of step 1, _)

A pointwise step goes with the last product it needs; what an earlier piece made of it is written out once and read
back, as any other activation. So Q, K and V become three pieces, and every piece is what a generator can take.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fxcompress.codegen.spec import UNROWS, Argument, Call, Constant, Extra, Input, Spec, Value, leaves

Source = Extra | Value | Input  # an extra of the whole program, what one of its steps made, or its input


@dataclass(frozen=True)
class Piece:
    """One product and what follows it.

    spec: its own program. tensors: the constants of the whole that it takes, in order. extras: where each of its extras
    comes from. makes: the step of the whole program that each of its outputs is. flat: outputs that are matrices of all
    rows, whatever dimensions x has.
    """

    spec: Spec
    tensors: tuple[int, ...]
    extras: tuple[Source, ...]
    makes: tuple[int, ...]
    flat: tuple[bool, ...]


@functools.lru_cache(maxsize=4096)
def pieces(spec: Spec) -> tuple[Piece, ...]:
    """`spec` in pieces; those of one product are one piece."""
    owner = _owners(spec)
    flat = _flat(spec)
    constants = _constants(spec)
    read_by: dict[int, set[int]] = {}
    for at, call in enumerate(spec.steps):
        for value in _values(call.arguments):
            read_by.setdefault(value.index, set()).add(owner[at])
    made = []
    for piece in range(max(owner) + 1):
        members = [at for at, of in enumerate(owner) if of == piece]
        leaving = [at for at in members if at in spec.outputs or read_by.get(at, {piece}) != {piece}]
        sources: list[Source] = []
        steps = tuple(_moved(spec.steps[at], members, sources) for at in members)
        tensors = tuple(number for at in members for number in constants[at])
        outputs = tuple(members.index(at) for at in leaving)
        kinds = tuple(flat[at] for at in leaving)
        made.append(Piece(Spec(steps, outputs), tensors, tuple(sources), tuple(leaving), kinds))
    return tuple(made)


def is_product(call: Call) -> bool:
    """True for a call on the input whose other operands are constants: where a piece begins."""
    constants = any(isinstance(a, Constant | Call) for a in call.arguments[1:])
    return bool(call.args) and isinstance(call.args[0], Input) and constants and call.name.endswith("linear")


def _owners(spec: Spec) -> list[int]:
    """The piece of every step: that of the last product it needs."""
    owner: list[int] = []
    products = 0
    for call in spec.steps:
        if is_product(call):
            owner.append(products)
            products += 1
        else:
            owner.append(max((owner[v.index] for v in _values(call.arguments)), default=max(products - 1, 0)))
    return owner


def _flat(spec: Spec) -> list[bool]:
    """Steps whose value is a matrix of all rows."""
    flat: list[bool] = []
    for call in spec.steps:
        from_rows = any(isinstance(a, Input) and a.rows for a in call.args)
        flat.append(call.name != UNROWS and (from_rows or any(flat[v.index] for v in _values(call.arguments))))
    return flat


def _constants(spec: Spec) -> list[list[int]]:
    """The numbers of each step's constants."""
    found, number = [], 0
    for call in spec.steps:
        count = sum(isinstance(leaf, Constant) for leaf in leaves(call.arguments))
        found.append(list(range(number, number + count)))
        number += count
    return found


def _moved(call: Call, members: list[int], sources: list[Source]) -> Call:
    """The call with its values numbered within the piece, or read as extras."""

    def extra(source: Source) -> Extra:
        if source not in sources:
            sources.append(source)
        return Extra(sources.index(source))

    def moved(value: Argument) -> Any:
        match value:
            case Value(index):
                return Value(members.index(index)) if index in members else extra(value)
            case Extra():
                return extra(value)
            case Input() if not is_product(call):
                return extra(value)
            case tuple():
                return tuple(map(moved, value))
        return value  # calls inside calls take constants alone

    return Call(call.name, tuple(map(moved, call.args)), tuple((name, moved(value)) for name, value in call.named))


def _values(arguments: Iterable[Argument]) -> list[Value]:
    return [leaf for leaf in leaves(arguments) if isinstance(leaf, Value)]

