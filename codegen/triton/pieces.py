"""A program as kernels of one product each, and kernels of whole rows, in an order in which they can run.

    rms_norm(x, ...) | linear(_, gate) | silu(_) | linear(step[0], up) | mul(step[2], _) | layer_norm(_, ...)

        piece 0     rms_norm(x, ...)                      rows
        piece 1     linear(x, gate) | silu(_)             x is what piece 0 made
        piece 2     linear(x, up) | mul(extra[0], _)      so it is here; extra[0] is what piece 1 made
        piece 3     layer_norm(x, ...)                    rows

A pointwise step goes with the last piece it needs anything of. What one piece made and another reads is written out
once. For few tokens a norm before products is better done in each of them, while they read x anyway
(fxcompress.codegen.triton.norm): `folded` puts it there, and piece 0 is gone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from fxcompress.codegen.spec import (
    UNROWS,
    Argument,
    Call,
    Constant,
    Extra,
    Input,
    Spec,
    Value,
    after,
    is_product,
    is_rowwise,
    leaves,
)
from fxcompress.codegen.triton.norm import norm_of

Source = Extra | Value | Input  # an extra of the whole program, what one of its steps made, or its input


@dataclass(frozen=True)
class Piece:
    """One kernel's share.

    spec: its own program, on x. tensors: the constants of the whole that it takes, in order. x, extras: where they come
    from. makes: the step of the whole program that each of its outputs is. flat: outputs that are matrices of all rows,
    whatever dimensions the input has.
    """

    spec: Spec
    tensors: tuple[int, ...]
    x: Source
    extras: tuple[Source, ...]
    makes: tuple[int, ...]
    flat: tuple[bool, ...]


@functools.lru_cache(maxsize=4096)
def pieces(spec: Spec) -> tuple[Piece, ...]:
    """`spec` in pieces, each after those it reads."""
    owner, flat, constants = _owners(spec), _flat(spec), _constants(spec)
    read_by: dict[int, set[int]] = {}
    for at, call in enumerate(spec.steps):
        for value in _values(call.arguments):
            read_by.setdefault(value.index, set()).add(owner[at])
    made = []
    for piece in sorted(set(owner)):
        members = [at for at, of in enumerate(owner) if of == piece]
        leaving = [at for at in members if at in spec.outputs or read_by.get(at, {piece}) != {piece}]
        x = _x(spec, members)
        sources: list[Source] = []
        product = is_product(spec.steps[members[0]])
        steps = tuple(
            # What follows a product reads x as it reads any other activation.
            _moved(spec.steps[at], members, x if not product or at == members[0] else None, sources)
            for at in members
        )
        made.append(
            Piece(
                Spec(steps, tuple(members.index(at) for at in leaving)),
                tuple(number for at in members for number in constants[at]),
                x,
                tuple(sources),
                tuple(leaving),
                tuple(flat[at] for at in leaving),
            )
        )
    return tuple(made)


@functools.lru_cache(maxsize=4096)
def folded(spec: Spec) -> tuple[Piece, ...]:
    """The same with a norm of the input done by every product that reads it, where products alone do."""
    every = pieces(spec)
    first = every[0]
    if len(every) == 1 or is_product(first.spec.steps[0]) or norm_of(first.spec.steps) is None:
        return every
    made = {Value(at) for at in first.makes}
    readers = [piece for piece in every if piece.x in made]
    others = any(made.intersection(piece.extras) for piece in every) or made & set(map(Value, spec.outputs))
    if others or not all(piece.spec.steps[0].name == "linear" for piece in readers):
        return every
    return tuple(
        replace(p, spec=after(first.spec.steps, p.spec), tensors=first.tensors + p.tensors, x=first.x)
        if p in readers
        else p
        for p in every[1:]
    )


def _owners(spec: Spec) -> list[int]:
    """The piece of every step."""
    owner: list[int] = []
    kinds: list[bool] = []  # of the pieces: True for a product

    def begin(product: bool) -> int:
        kinds.append(product)
        return len(kinds) - 1

    for call in spec.steps:
        last = max((owner[v.index] for v in _values(call.arguments)), default=None)
        if is_product(call):
            owner.append(begin(True))
        elif last is None or (is_rowwise(call) and kinds[last]):
            owner.append(begin(False) if kinds[:1] != [False] or last is not None else 0)
        else:
            owner.append(last)
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


def _x(spec: Spec, members: list[int]) -> Source:
    """What the first step of a piece acts on."""
    first = spec.steps[members[0]]
    read = [a for a in leaves(first.arguments) if isinstance(a, Input | Value | Extra)]
    source = first.args[0] if is_product(first) else read[0]
    return Input() if isinstance(source, Input) else source  # type: ignore[return-value]


def _moved(call: Call, members: list[int], x: Source | None, sources: list[Source]) -> Call:
    """The call with its values numbered within the piece, or read as x or extras."""

    def moved(value: Argument) -> Any:
        match value:
            case Value(index) if index in members:
                return Value(members.index(index))
            case Input() if x == Input():
                return value
            case Value() | Extra() if value == x:
                return Input()
            case Value() | Extra() | Input():
                if value not in sources:
                    sources.append(value)
                return Extra(sources.index(value))
            case tuple():
                return tuple(map(moved, value))
        return value  # calls inside calls take constants alone

    return Call(call.name, tuple(map(moved, call.args)), tuple((name, moved(value)) for name, value in call.named))


def _values(arguments: Iterable[Argument]) -> list[Value]:
    return [leaf for leaf in leaves(arguments) if isinstance(leaf, Value)]
