"""The most memory activations take at once while a graph runs in its order, in the graph's own symbols.

    live(i) = bytes of every storage in which a value lies that call i or one after it reads or makes, and what i needs
              for itself (fxcompress.cost_model.workspace)
    peak    = max_i live(i)

A view keeps what it is a view of alive, and takes nothing itself (fxcompress.cost_model.storages). It is freed after
the last call that reads any value in it, as the code of a GraphModule does; what the graph returns stays to the end.
Inputs belong to the caller and weights to the model: neither is counted.

Sizes are polynomials of symbols s >= 1. Written in t = s - 1, one whose coefficients are nowhere above another's is
nowhere above it itself: such a moment is never the peak, which leaves a few out of hundreds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
from torch import Tensor, fx

from fxcompress.core.cost import ZERO, Cost
from fxcompress.cost_model.calls import array_of
from fxcompress.cost_model.storages import Storages
from fxcompress.cost_model.values import Values, parts

Polynomial = Mapping[sympy.Expr, sympy.Expr]
"""{monomial of the symbols less 1: its coefficient}"""


@dataclass(frozen=True)
class Peak:
    """moments: (node, bytes live while it runs), all that can be the peak at some size."""

    moments: tuple[tuple[str, sympy.Expr], ...]

    @property
    def bytes(self) -> sympy.Expr:
        return sympy.Max(*(live for _, live in self.moments), evaluate=False) if self.moments else sympy.Integer(0)

    def at(self, **symbols: int) -> Peak:
        """With sizes in place of symbols, by name. Once all are given, the first moment that needs most is left."""
        moments = tuple((name, Cost(ZERO.flops, live, 0).at(**symbols).bytes) for name, live in self.moments)
        if any(live.free_symbols for _, live in moments):
            return Peak(moments)
        return Peak(tuple(sorted(moments, key=lambda moment: -moment[1])[:1]))


def peak_memory(
    gm: fx.GraphModule, values: Values, where: Storages, workspaces: Mapping[fx.Node, Sequence[sympy.Expr]]
) -> Peak:
    """Of one run of `gm`, whose `values` lie as `where` says; workspaces: of a call at each of its moments."""
    nodes = list(gm.graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    dies: dict[str, int] = {}
    for node in where:
        last = max((place[user] for user in node.users), default=place[node])
        for name in where[node]:
            dies[name] = max(dies.get(name, 0), last)
    leaving: dict[int, list[str]] = {}
    for name, i in dies.items():
        leaving.setdefault(i, []).append(name)

    live: dict[sympy.Expr, sympy.Expr] = {}
    sizes: dict[str, Polynomial] = {}
    fronts: list[tuple[str, Polynomial]] = []
    for i, node in enumerate(nodes):
        made = _made(node, values, where)
        sizes.update(made)
        for size in made.values():
            _add(live, size, 1)
        for own in workspaces.get(node, ()) or (sympy.S.Zero,) * bool(made):
            now = dict(live)
            _add(now, _moved(own, 1).as_coefficients_dict(), 1)
            fronts = _front(fronts, (node.name, now))
        for name in leaving.get(i, ()):
            _add(live, sizes.get(name, {}), -1)
    return Peak(tuple((name, _moved(sympy.Add(*(m * c for m, c in of.items())), -1)) for name, of in fronts))


def _made(node: fx.Node, values: Values, where: Storages) -> dict[str, Polynomial]:
    """The storages a call allocates."""
    if node.op in ("placeholder", "get_attr", "output"):
        return {}
    made = {}
    for name, value in zip(where[node], parts(values[node])):
        if isinstance(value, Tensor) and name.partition("[")[0] == node.name:
            made[name] = _moved(array_of(name, value).bytes, 1).as_coefficients_dict()
    return made


def _moved(expr: sympy.Expr, by: int) -> sympy.Expr:
    """`expr` with every symbol s as s + by."""
    return sympy.expand(expr.xreplace({s: s + by for s in expr.free_symbols}))


def _add(live: dict[sympy.Expr, sympy.Expr], size: Polynomial, sign: int) -> None:
    for monomial, coefficient in size.items():
        live[monomial] = live.get(monomial, sympy.Integer(0)) + sign * coefficient


def _front(fronts: list[tuple[str, Polynomial]], new: tuple[str, Polynomial]) -> list[tuple[str, Polynomial]]:
    """The undominated among `fronts` and one more; of equals the first stays."""
    if any(_at_most(new[1], old) for _, old in fronts):
        return fronts
    return [*(kept for kept in fronts if not _at_most(kept[1], new[1])), new]


def _at_most(a: Polynomial, b: Polynomial) -> bool:
    return all(a.get(monomial, 0) <= b.get(monomial, 0) for monomial in a.keys() | b.keys())
