"""A call as its price sees it: the shapes of what it reads and writes in the graph's symbols, and what of it is stored.

    %y = aten.addmm(self.up.bias, %x, %w)      Call(aten.addmm, {"self": (64,), "mat1": (s0 s1, 32), "mat2": (32, 64),
                                                                 "beta": 1, "alpha": 1}, outputs (s0 s1, 64))

A tensor takes as much memory as it has elements of its own: an expanded dimension is there once. What lies in a
parameter or a buffer, the attribute itself or a view of it, is stored, and tells which tensor it lies in.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._ops import OpOverload

from fxcompress.core.cost import Cost


@dataclass(frozen=True)
class Stored:
    """A parameter or buffer: the first of its names, and its bytes."""

    path: str
    bytes: int


@dataclass(frozen=True)
class Array:
    """One tensor. memory: its elements that exist. name: of the node that makes it, so that equal arrays are one."""

    name: str
    sizes: tuple[sympy.Expr, ...]
    dtype: torch.dtype
    memory: sympy.Expr
    stored: Stored | None = None

    @functools.cached_property
    def elements(self) -> sympy.Expr:
        return product(self.sizes)

    @property
    def rows(self) -> sympy.Expr:
        """Elements without the last dimension: tokens."""
        return product(self.sizes[:-1])

    @property
    def bytes(self) -> sympy.Expr:
        return self.memory * self.dtype.itemsize


@dataclass(frozen=True)
class Call:
    """arguments: by their names in the schema, defaults filled in; tensors are arrays, sizes are expressions."""

    op: OpOverload
    arguments: Mapping[str, Any]
    outputs: tuple[Array, ...]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def out(self) -> Array:
        return self.outputs[0]

    @property
    def first(self) -> Array | None:
        """The first tensor it reads."""
        return next(iter(self.operands), None)

    @functools.cached_property
    def operands(self) -> tuple[Array, ...]:
        """What it reads, each once."""
        return tuple(dict.fromkeys(arrays(self.arguments.values())))

    @property
    def traffic(self) -> sympy.Expr:
        """Bytes of every operand read once and every result written once."""
        return sympy.Add(*(array.bytes for array in (*self.operands, *self.outputs)))

    @property
    def stored(self) -> frozenset[Stored]:
        """The parameters and buffers it reads."""
        return frozenset(array.stored for array in self.operands if array.stored is not None)

    def costs(self, flops: Any, traffic: sympy.Expr | None = None, launches: int = 1) -> Cost:
        """Its cost, when only the flops are its own: operands and results each cross the memory bus once."""
        moved = self.traffic if traffic is None else traffic
        return Cost(sympy.sympify(flops), moved, sum(t.bytes for t in self.stored), launches)


def product(sizes: Iterable[Any]) -> sympy.Expr:
    """Of sizes; 1 of none."""
    return math.prod(sizes, start=sympy.Integer(1))


def arrays(values: Iterable[Any]) -> Iterator[Array]:
    """Those among arguments and inside lists."""
    for value in values:
        if isinstance(value, Array):
            yield value
        elif isinstance(value, list | tuple):
            yield from arrays(value)


def expression(size: Any) -> Any:
    """A symbolic size as sympy knows it, a whole number as an Integer, anything else as it is."""
    if isinstance(size, torch.SymInt | torch.SymFloat):
        return size.node.expr
    return sympy.Integer(size) if type(size) is int else size


def array_of(name: str, value: Tensor, stored: Stored | None = None) -> Array:
    """What is known of a tensor, or of a fake one."""
    sizes = tuple(expression(size) for size in value.shape)
    own = (size for size, stride in zip(sizes, value.stride()) if not (type(stride) is int and stride == 0))
    return Array(name, sizes, value.dtype, product(own), stored)


def named(op: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All the arguments of a call by their names in the op's schema."""
    schema = op._schema.arguments
    given = {**dict(zip((a.name for a in schema), args)), **kwargs}
    return {a.name: given.get(a.name, a.default_value) for a in schema}
