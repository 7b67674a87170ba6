"""What calls of fxcompress's own ops cost: each as its file says, a fused node as the kernels that are made of it.

    fused    one kernel a piece of the program (fxcompress.codegen.triton.pieces): every piece reads its input, its
             constants and what else it needs once, and writes what leaves it once. Unpacking and the pointwise calls
             happen on the chip: their flops count, they move nothing and launch nothing.

A product that takes two launches (blocks, Monarch, a train) writes what lies between them and reads it again; one of
low rank keeps it on the chip. A train is contracted or rebuilt as its op would do it. Flops are those of the steps,
each at its own price.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from fxcompress.codegen import ops
from fxcompress.codegen.ops import (
    block_low_rank_linear,
    fused,
    linformer_attention,
    low_rank_linear,
    quaternion_linear,
    rounded_inputs,
    tensor_train_embedding,
    tensor_train_linear,
)
from fxcompress.codegen.spec import Extra, Input, name_of, parse
from fxcompress.codegen.triton.pieces import Piece, Source, pieces
from fxcompress.core.cost import Cost
from fxcompress.cost_model.aten_costs import Price, price_of
from fxcompress.cost_model.calls import Array, Call, named, product
from fxcompress.cost_model.graph_cost import GraphCost, graph_cost
from fxcompress.cost_model.storages import Trial
from fxcompress.cost_model.workspace import Workspace


def cost_of(gm: fx.GraphModule) -> GraphCost:
    """Flops, bytes and launches of every call of `gm` (fxcompress.cost_model.graph_cost)."""
    return graph_cost(gm, PRICES, WORKSPACES)


def price(call: Call) -> Cost | None:
    """The cost of a call of aten or of fxcompress; None where it is not known."""
    return PRICES[call.op](call) if call.op in PRICES else price_of(call)


def _low_rank(c: Call) -> Cost:
    x, v, u = c["x"], c["v"], c["u"]
    return low_rank_linear.cost(x.rows, u.sizes[0], v.sizes[1], v.sizes[0], _beside(c, x), x.dtype.itemsize)


def _blocks(c: Call) -> Cost:
    x, v, u = c["x"], c["v"], c["u"]
    shape = u.sizes[0], v.sizes[1], c["blocks"], v.sizes[0] / c["blocks"]
    return block_low_rank_linear.cost(x.rows, *shape, _beside(c, x), x.dtype.itemsize)


def _quaternion(c: Call) -> Cost:
    x, (rows, columns) = c["x"], c["components"].sizes
    return quaternion_linear.cost(x.rows, 4 * rows, columns, _beside(c, x), x.dtype.itemsize)


def _train(c: Call) -> Cost:
    x = c["x"]
    return tensor_train_linear.cost(x.rows, c["n"], c["m"], _ranks(c), _beside(c, x), x.dtype.itemsize)


def _inside_train(c: Call) -> sympy.Expr:
    """Elements of what is made on the way, or of W where it is rebuilt."""
    n, m = c["n"], c["m"]
    return tensor_train_linear.cost(c["x"].rows, n, m, _ranks(c), 0, 1).bytes - c["x"].rows * (product(n) + product(m))


def _train_lookup(c: Call) -> Cost:
    ids = c["ids"]
    itemsize = c.out.dtype.itemsize
    return tensor_train_embedding.cost(ids.elements, c["n"], c["m"], _ranks(c), _beside(c, ids), itemsize)


def _ranks(c: Call) -> list[int]:
    """(R_0, ..., R_d) of a train."""
    return [1, *(int(core.sizes[1]) // int(size) for core, size in zip(c["cores"], c["m"]))]


def _rounded(c: Call) -> Cost:
    x, (rows, columns) = c["x"], c["codes"].sizes
    return rounded_inputs.cost(x.rows, rows, columns, _beside(c, x), x.dtype.itemsize)


def _linformer(c: Call) -> Cost:
    (q, k, v), e = (c[name] for name in "qkv"), c["e"]
    sizes = q.sizes[-2], k.sizes[-2], q.sizes[-1], v.sizes[-1], e.sizes[0]
    return linformer_attention.cost(product(q.sizes[:-2]), 1, *sizes, _beside(c, q, k, v), q.dtype.itemsize)


def _beside(c: Call, *activations: Array) -> sympy.Expr:
    """Bytes of everything else it reads."""
    return sympy.Add(*(array.bytes for array in c.operands if array not in activations))


def _unpacked(c: Call) -> Cost:
    return c.costs(2 * c.out.elements)


def _scaled(c: Call) -> Cost:
    return c.costs(c.out.elements)


def _spread(c: Call) -> Cost:
    """What the result is read for is the cost of who reads it."""
    return c.costs(0)


def _lookup(c: Call) -> Cost:
    """Packed rows of the mean size, one for every id."""
    ids, *tables = c.operands
    row = sympy.ceiling(sympy.Add(*(table.bytes for table in tables)) / tables[0].sizes[0])
    return c.costs(2 * c.out.elements, ids.bytes + ids.elements * row + c.out.bytes)


def _fused(c: Call) -> Cost:
    spec, steps = parse(str(c["spec"])), Steps(c)
    made = [steps.array(value) for value in fused.run(spec, steps.x, steps.tensors, steps.extras, steps)]
    every = pieces(spec)
    moved = [array.bytes for piece in every for array in _moved(piece, c, made)]
    products = steps.named(BETWEEN)
    between = [BETWEEN[name](call) * call.out.dtype.itemsize for name, call in products]
    flops = sympy.Add(*(cost.flops for call in steps.calls if (cost := price(call)) is not None))
    return c.costs(flops, sympy.Add(*moved, *between), len(every) + len(products))


def _handed_on(c: Call) -> tuple[sympy.Expr, ...]:
    """Memory for what the kernels of a fused node write for one another."""
    spec, steps = parse(str(c["spec"])), Steps(c)
    made = [steps.array(value) for value in fused.run(spec, steps.x, steps.tensors, steps.extras, steps)]
    between = [BETWEEN[name](call) / 2 * call.out.dtype.itemsize for name, call in steps.named(BETWEEN)]
    inner = {at for piece in pieces(spec) for at in piece.makes} - set(spec.outputs)
    return (sympy.Add(*between, *(made[at].bytes for at in inner)),)


def _moved(piece: Piece, c: Call, made: list[Array]) -> Iterator[Array]:
    """What one kernel reads and writes."""

    def array(source: Source) -> Array:
        match source:
            case Input():
                return c["x"]  # type: ignore[no-any-return]
            case Extra(index):
                return c["extras"][index]  # type: ignore[no-any-return]
        return made[source.index]

    yield from dict.fromkeys((array(piece.x), *map(array, piece.extras)))
    yield from (c["tensors"][number] for number in piece.tensors)
    yield from (made[at] for at in piece.makes)


class Steps:
    """Runs the steps of a program on meta tensors, where symbols are numbers, and keeps each as a call in symbols.

    What an activation has been through has the leading dimensions of x, or is a matrix of all its rows.
    """

    def __init__(self, c: Call) -> None:
        trial = Trial()
        self.calls: list[Call] = []
        self._known: dict[int, tuple[Tensor, Array]] = {}
        self._lead = c["x"].sizes[:-1]

        def tensor(array: Array) -> Tensor:
            made = torch.empty([trial.number(s) for s in array.sizes], dtype=array.dtype, device="meta")
            self._known[id(made)] = made, array
            return made

        self.x = tensor(c["x"])
        self.tensors = [tensor(array) for array in c["tensors"]]
        self.extras = [tensor(array) for array in c["extras"] or ()]
        self._constants = set(map(id, self.tensors))

    def __call__(self, op: OpOverload, *args: Any, **kwargs: Any) -> Tensor:
        value: Tensor = op(*args, **kwargs)
        read = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if all(id(tensor) in self._constants for tensor in read):
            self._constants.add(id(value))
        told = pytree.tree_map(lambda v: self.array(v) if isinstance(v, Tensor) else v, (args, kwargs))
        self.calls.append(Call(op, named(op, *told), (self.array(value),)))
        return value

    def named(self, names: Collection[str]) -> list[tuple[str, Call]]:
        """The calls of some ops."""
        return [(name, call) for call in self.calls if (name := name_of(call.op)) in names]

    def array(self, value: Tensor) -> Array:
        """In symbols."""
        if id(value) not in self._known:
            sizes = list(value.shape)
            if id(value) not in self._constants and value.shape[:-1] == self.x.shape[:-1]:
                sizes = [*self._lead, sizes[-1]]
            elif id(value) not in self._constants and value.shape[:-1] == (self.x.shape[:-1].numel(),):
                sizes = [product(self._lead), sizes[-1]]
            whole = tuple(map(sympy.sympify, sizes))
            self._known[id(value)] = value, Array(f"step {len(self._known)}", whole, value.dtype, product(whole))
        return self._known[id(value)][1]


BETWEEN = {  # products of two launches -> elements that cross the memory bus between them
    "block_low_rank_linear": lambda c: 2 * c["x"].rows * c["blocks"] * c["v"].sizes[0],
    "monarch_linear": lambda c: 2 * c["x"].rows * c["blocks"] * c["v"].sizes[0],
    "tensor_train_linear": _inside_train,
}
_TABLE: Mapping[str, Price] = {
    "low_rank_linear": _low_rank,
    "block_low_rank_linear": _blocks,
    "monarch_linear": _blocks,
    "quaternion_linear": _quaternion,
    "tensor_train_linear": _train,
    "tensor_train_embedding": _train_lookup,
    "int8_dynamic_linear": _rounded,
    "float8_dynamic_linear": _rounded,
    "linformer_attention": _linformer,
    "dequantize": _unpacked,
    "dequantize_float8": _scaled,
    "unmask": _spread,
    "unmask_2_4": _spread,
    "quantized_embedding": _lookup,
    "quantized_rows_embedding": _lookup,
    "float8_embedding": _lookup,
    "fused": _fused,
    "fused_parallel": _fused,
}
PRICES: Mapping[OpOverload, Price] = {op._opoverload: _TABLE[name_of(op._opoverload)] for op in ops.OPS}
WORKSPACES: Mapping[OpOverload, Workspace] = {
    op._opoverload: _handed_on for op in (fused.fused, fused.fused_parallel)
}
