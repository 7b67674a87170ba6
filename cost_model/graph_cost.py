"""Flops, memory traffic, stored bytes and launches of every call of a graph, in the graph's own symbols.

    cost = graph_cost(gm, prices, workspaces)    cost.total    cost.at(s0=8, s1=128).total    cost.peak.bytes

`prices` and `workspaces` say what calls of other ops than aten's cost, and what memory they need for themselves:
fxcompress.codegen.costs has tables of fxcompress's own, `cost_of(gm)` puts them in. Views
(fxcompress.cost_model.storages), sizes and items of lists cost nothing. Everything else is one kernel each, the way it
would run on a GPU: what a kernel keeps on the chip is no traffic, and a fused node is as many launches as it has
kernels. Eager PyTorch on a CPU launches more and moves more.

BERT-base, 522 nodes, takes 0.25 s on one core.

Totals add up; only `weight_bytes` counts a tensor once, however many calls read it: what is stored is what it weighs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from fxcompress.core.cost import ZERO, Cost
from fxcompress.cost_model import aten_costs, cost_table
from fxcompress.cost_model.aten_costs import Price
from fxcompress.cost_model.calls import Array, Call, Stored, array_of, expression, named
from fxcompress.cost_model.modules import modules_of
from fxcompress.cost_model.peak_memory import Peak, peak_memory
from fxcompress.cost_model.storages import Storages, allocates, canonical, storages
from fxcompress.cost_model.values import Values, parts, values_of
from fxcompress.cost_model.workspace import Workspace, workspace_of

aten = torch.ops.aten
UNTOLD = "nobody knows what it makes, or counts it"
RESHAPED_IN_PLACE = frozenset((  # they write no element
    aten.detach_.default, aten.squeeze_.default, aten.squeeze_.dim, aten.t_.default, aten.transpose_.default,
    aten.unsqueeze_.default,
))  # fmt: skip


@dataclass(frozen=True)
class NodeCost:
    """module: the path of the module the call came from, "" for the model itself. stored: what it reads of it."""

    node: str
    op: str
    module: str
    cost: Cost
    stored: frozenset[Stored] = frozenset()


@dataclass(frozen=True)
class GraphCost:
    """nodes: every call that costs anything, in order. inputs: how the symbols got their names, "input_ids [s0, s1]".

    warnings: a clause for every op whose flops are not known.
    """

    nodes: tuple[NodeCost, ...]
    peak: Peak
    inputs: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def total(self) -> Cost:
        return total_of(self.nodes)

    @property
    def symbols(self) -> list[str]:
        """The names that `at` takes."""
        counts = [self.peak.bytes, *(e for of in self.nodes for e in (of.cost.flops, of.cost.bytes))]
        return sorted({s.name for e in counts for s in e.free_symbols})

    def at(self, **symbols: int) -> GraphCost:
        """The same with sizes in place of symbols: `cost.at(s0=8, s1=128)`."""
        nodes = tuple(replace(of, cost=of.cost.at(**symbols)) for of in self.nodes)
        return replace(self, nodes=nodes, peak=self.peak.at(**symbols))

    def __str__(self) -> str:
        rows = [(module, total_of(nodes)) for module, nodes in by_module(self.nodes).items()]
        return cost_table.text(rows, self.total, self.peak, self.inputs, self.warnings)

    def to_json(self) -> dict[str, Any]:
        """Exact: numbers as numbers, formulas as the text sympy reads."""
        nodes = [{"node": of.node, "op": of.op, "module": of.module, **_json(of.cost)} for of in self.nodes]
        return {
            "symbols": self.symbols,
            "inputs": list(self.inputs),
            "nodes": nodes,
            "total": _json(self.total),
            "peak_activation_bytes": _plain(self.peak.bytes),
            "warnings": list(self.warnings),
        }


def graph_cost(
    gm: fx.GraphModule, prices: Mapping[OpOverload, Price], workspaces: Mapping[OpOverload, Workspace]
) -> GraphCost:
    """Of one forward of `gm`; its nodes need the `val` that capturing gives them."""
    values, stored = values_of(gm.graph), _stored(gm)
    where = storages(gm, values)
    known: dict[fx.Node, tuple[Array, ...]] = {}
    costs, weights, warnings = dict[fx.Node, Cost](), dict[fx.Node, frozenset[Stored]](), dict[str, None]()
    beside: dict[fx.Node, tuple[sympy.Expr, ...]] = {}
    for node in gm.graph.nodes:
        if node.op == "output":
            continue
        known[node] = _arrays_of(node, values, where, stored)
        if node.op in ("placeholder", "get_attr") or _is_view(node, values, where):
            continue
        told = known[node] and all(values[read] is not None for read in node.all_input_nodes)
        call = call_of(node, values, known) if told and isinstance(node.target, OpOverload) else None
        cost = None if call is None else _price(call, prices)
        if call is None or cost is None:
            why = "its traffic is counted, its flops are not known" if known[node] else UNTOLD
            warnings[f"{_op_name(node)}: {why}"] = None
            cost = _traffic(node, known)
        weights[node] = frozenset(a.stored for n in node.all_input_nodes for a in known[n] if a.stored is not None)
        costs[node] = replace(cost, weight_bytes=sum(tensor.bytes for tensor in weights[node]))
        beside[node] = () if call is None else workspaces.get(call.op, workspace_of)(call)
    of = modules_of(gm.graph, weights)
    nodes = tuple(NodeCost(n.name, _op_name(n), of[n], cost, weights[n]) for n, cost in costs.items())
    return GraphCost(nodes, peak_memory(gm, values, where, beside), _inputs(gm), tuple(warnings))


def total_of(nodes: Iterable[NodeCost]) -> Cost:
    """Of several calls; each stored tensor weighs once."""
    nodes = list(nodes)
    weights = {stored for of in nodes for stored in of.stored}
    return Cost(
        sympy.Add(*(of.cost.flops for of in nodes)),
        sympy.Add(*(of.cost.bytes for of in nodes)),
        sum(tensor.bytes for tensor in weights),
        sum(of.cost.launches for of in nodes),
    )


def by_module(nodes: Iterable[NodeCost]) -> dict[str, list[NodeCost]]:
    """In the order in which their modules first run."""
    groups: dict[str, list[NodeCost]] = {}
    for of in nodes:
        groups.setdefault(of.module, []).append(of)
    return groups


def call_of(node: fx.Node, values: Values, known: Mapping[fx.Node, tuple[Array, ...]]) -> Call:
    """A node as its price sees it."""

    def value(read: fx.Node) -> Any:
        made = values[read]
        if isinstance(made, list | tuple):
            return list(known[read])
        return known[read][0] if known[read] else expression(made)

    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), value)
    assert isinstance(node.target, OpOverload)
    return Call(node.target, named(node.target, args, kwargs), known[node])


def _stored(gm: fx.GraphModule) -> dict[str, Stored]:
    """{its memory, as `storages` names it: a parameter or buffer}, each once."""
    paths = canonical(gm)
    tensors = (*gm.named_parameters(), *gm.named_buffers())
    return {f"self.{path}": Stored(path, t.numel() * t.element_size()) for path, t in tensors if paths[path] == path}


def _arrays_of(
    node: fx.Node, values: Values, where: Storages, stored: Mapping[str, Stored]
) -> tuple[Array, ...]:
    tensors = ((name, v) for name, v in zip(where[node], parts(values[node])) if isinstance(v, Tensor))
    own = [node.name if len(where[node]) == 1 else f"{node.name}[{i}]" for i in range(len(where[node]))]
    if node.op == "get_attr":
        own = list(where[node])  # another node that reads it reads the same
    return tuple(array_of(name, value, stored.get(memory)) for name, (memory, value) in zip(own, tensors))


def _is_view(node: fx.Node, values: Values, where: Storages) -> bool:
    """True for what makes no tensor of its own: sizes, items, views. What is not known at all is none."""
    if values[node] is not None and not any(isinstance(v, Tensor) for v in parts(values[node])):
        return True
    if isinstance(node.target, OpOverload) and not node.target._schema.returns:  # an assertion
        return True
    mutates = isinstance(node.target, OpOverload) and node.target._schema.is_mutable
    return not allocates(node, where) and (not mutates or node.target in RESHAPED_IN_PLACE)


def _price(call: Call, prices: Mapping[OpOverload, Price]) -> Cost | None:
    return prices[call.op](call) if call.op in prices else aten_costs.price_of(call)


def _traffic(node: fx.Node, known: Mapping[fx.Node, tuple[Array, ...]]) -> Cost:
    read = dict.fromkeys(array for n in node.all_input_nodes for array in known[n])
    return Cost(ZERO.flops, sympy.Add(*(array.bytes for array in (*read, *known[node]))), 0)


def _op_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, OpOverload):
        return str(target).removesuffix(".default")
    return str(getattr(target, "__name__", target))


def _inputs(gm: fx.GraphModule) -> tuple[str, ...]:
    """Inputs with a symbol among their sizes."""
    shapes = [(node.name, node.meta.get("val")) for node in gm.graph.find_nodes(op="placeholder")]
    texts = [(name, [str(size) for size in v.shape]) for name, v in shapes if isinstance(v, Tensor)]
    return tuple(f"{name} [{', '.join(sizes)}]" for name, sizes in texts if not all(s.isdigit() for s in sizes))


def _json(cost: Cost) -> dict[str, Any]:
    return {
        "flops": _plain(cost.flops),
        "bytes": _plain(cost.bytes),
        "weight_bytes": int(cost.weight_bytes),
        "launches": int(cost.launches),
    }


def _plain(expr: sympy.Expr) -> int | str:
    return int(sympy.ceiling(expr)) if expr.is_number else str(expr)
