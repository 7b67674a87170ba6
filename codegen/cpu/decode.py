"""A compressed weight as one matrix, and a compressed table as one table: the op asked for it, column by column.

    linear ops       W^T = op(I) without a bias: every one of them is linear in x, or rounds the rows of I exactly
    tables           op(0 .. rows - 1)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from fxcompress.codegen.packing import unpack
from fxcompress.codegen.spec import Argument, Call, Constant, given, leaves, op_of

_CHUNK = 4096  # rows of a table at a time: ids, codes and values of so many are in memory together


def value_of(argument: Argument, constants: Iterator[Tensor]) -> Any:
    """A constant argument of a call, with calls of constants carried out, in the order of the text."""
    match argument:
        case Constant():
            return next(constants)
        case Call():
            args = [value_of(a, constants) for a in argument.args]
            named = {name: value_of(a, constants) for name, a in argument.named}
            return op_of(argument.name)(*args, **named)
        case tuple():
            return [value_of(a, constants) for a in argument]
    return argument


def arguments_of(call: Call, constants: Iterator[Tensor]) -> dict[str, Any]:
    """The constant arguments of a product, by name; its first is what it multiplies."""
    rest = list(given(call).items())[1:]
    return {name: value_of(argument, constants) for name, argument in rest}


@dataclass(frozen=True)
class Fours:
    """A weight as it is stored, w = scale (code - zero): codes 0 .. 15 (out, in), scales, zeros (out, in / group)."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group: int


def fours_of(call: Call, reads: Sequence[Tensor]) -> dict[str, Fours]:
    """Those among the arguments of a product that are codes of 4 bits or fewer, a whole number of groups a row."""
    constants, found = iter(reads), dict[str, Fours]()
    for name, argument in list(given(call).items())[1:]:
        own = iter([next(constants) for leaf in leaves([argument]) if isinstance(leaf, Constant)])
        if not isinstance(argument, Call) or argument.name != "dequantize":
            continue
        a = {key: value_of(value, own) for key, value in given(argument).items()}
        if a["bits"] > 4 or not a["group_size"] or a["columns"] % a["group_size"] or a["codes"].dim() != 2:
            continue
        grid, stored = a["grid"], a["scales"]
        zeros = torch.full_like(stored, 8) if a["zeros"] is None else unpack(a["zeros"], 4, stored.shape[-1])
        found[name] = Fours(
            unpack(a["codes"], a["bits"], a["columns"]), torch.exp2(grid[0] + grid[1] * stored.float()),
            zeros.float() * (2.0 ** a["bits"] / 16) - 0.5, a["group_size"],
        )  # fmt: skip
    return found


def dense(name: str, arguments: Mapping[str, Any], columns: int, dtype: torch.dtype) -> Tensor:
    """The matrix (out, in) that the product `name` multiplies by."""
    if name == "linear":
        weight: Tensor = arguments["weight"]
        return weight
    op = op_of(name)
    first = op._schema.arguments[0].name
    without = {key: value for key, value in arguments.items() if key != "bias"}
    if any(a.name == "bias" and not a.has_default_value() for a in op._schema.arguments):
        without["bias"] = None
    made: Tensor = op(**{first: torch.eye(columns, dtype=dtype), **without})
    return made.T


def table(op: OpOverload, rows: int, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Iterator[Tensor]:
    """The rows a lookup can give, _CHUNK at a time."""
    for start in range(0, rows, _CHUNK):
        yield op(torch.arange(start, min(start + _CHUNK, rows)), *arguments, **named)
