"""Which memory each value of a graph lies in: its own, or that of a tensor it is a view of.

Nobody can tell from its name whether a call copies: `reshape`, `contiguous`, `to` and `dropout` hand their input on
where they can. So torch is asked: each call is made once on meta tensors of the strides its operands have, and an
output that shares its storage with an operand is a view of it. Symbols get small primes for that, different ones, so
that no size is 1 or equals another by chance. (A real batch of 1 makes views of a few copies: that is left out.)
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from fxcompress.cost_model.calls import expression
from fxcompress.cost_model.values import Values, parts

Storages = Mapping[fx.Node, tuple[str, ...]]
"""{node: for each tensor it makes, the name of its memory}: "add", "split[0]", "self.up.weight"."""


def storages(gm: fx.GraphModule, values: Values) -> dict[fx.Node, tuple[str, ...]]:
    """Of every node, in the order of the graph."""
    paths = canonical(gm)
    found: dict[fx.Node, tuple[str, ...]] = {}
    trial = Trial()
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            found[node] = (f"self.{paths.get(str(node.target), node.target)}",)
        elif node.target is operator.getitem and isinstance(node.args[1], int):
            found[node] = found[node.args[0]][node.args[1] :][:1]
        elif node.op != "output":
            found[node] = _of_call(node, values, found, trial)
    return found


def allocates(node: fx.Node, where: Storages) -> bool:
    """True where some of what the node makes has memory of its own."""
    return any(name.partition("[")[0] == node.name for name in where[node])


def canonical(gm: fx.GraphModule) -> dict[str, str]:
    """{every name of a parameter or buffer: the first name of the same tensor}."""
    both = (*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in both}


class Trial:
    """Values with a number for every symbol, the same for equal ones, and no guard made of it."""

    def __init__(self) -> None:
        self.numbers: dict[sympy.Symbol, sympy.Integer] = {}

    def number(self, size: Any) -> Any:
        expr = expression(size)
        if not isinstance(expr, sympy.Expr):
            return size
        for symbol in sorted(expr.free_symbols - self.numbers.keys(), key=str):
            self.numbers[symbol] = sympy.Integer(sympy.prime(len(self.numbers) + 2))  # 3, 5, 7, ...
        return int(expr.xreplace(self.numbers)) if expr.is_integer else size

    def tensor(self, value: Tensor) -> Tensor:
        sizes, strides = ([self.number(n) for n in of] for of in (value.shape, value.stride()))
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device="meta")

    def value(self, made: Any) -> Any:
        """Of anything a node makes."""
        return pytree.tree_map(lambda v: self.tensor(v) if isinstance(v, Tensor) else self.number(v), made)


def _of_call(node: fx.Node, values: Values, found: Storages, trial: Trial) -> tuple[str, ...]:
    made = parts(values[node])
    own = tuple(node.name if len(made) == 1 else f"{node.name}[{i}]" for i in range(len(made)))
    if not isinstance(node.target, OpOverload) or node.target.namespace == "fxcompress":
        return own  # a custom op may not hand its inputs on
    given: dict[int, str] = {}  # storage of an operand on trial -> its memory

    def operand(read: fx.Node) -> Any:
        value = trial.value(values[read])
        for tensor, name in zip((t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)), found[read]):
            given[_memory(tensor)] = name
        return value

    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), operand)
    if not given:
        return own
    meta = torch.device("meta")
    args, kwargs = pytree.tree_map(lambda v: meta if isinstance(v, torch.device) else v, (args, kwargs))
    try:
        outputs: Sequence[Any] = pytree.tree_leaves(node.target(*args, **kwargs))
    except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError):  # no meta kernel, or no such size
        outputs = ()
    if len(outputs) != len(own):  # nor as many parts of that size: what the schema says must do
        aliases = any(result.alias_info is not None for result in node.target._schema.returns)
        return (next(iter(given.values())),) * len(own) if aliases else own
    return tuple(given.get(_memory(t), name) if isinstance(t, Tensor) else name for t, name in zip(outputs, own))


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
