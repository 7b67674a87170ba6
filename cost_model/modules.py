"""Which module each call of a graph came from.

A call has a module where tracing noted one, where it carries the name of what it was fused from, or where it reads a
weight: then it is the weight's owner. A saved graph keeps no notes of tracing. There, what lies between two calls that
have one belongs to the innermost module that holds both: attention lies between `attn.q` and `attn.out`, in `attn`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

from torch import fx
from torch._ops import OpOverload

from fxcompress.cost_model.calls import Stored


def modules_of(graph: fx.Graph, weights: Mapping[fx.Node, frozenset[Stored]]) -> dict[fx.Node, str]:
    """The path of the module of each of `weights`, which says what the calls read; "" is the model itself."""
    known = {node: _module(node, weights.get(node, frozenset())) for node in graph.nodes}
    before, last = dict[fx.Node, str](), ""
    for node in graph.nodes:
        last = last if (own := known[node]) is None else shared(own.split(", "))
        before[node] = last
    found, following = dict[fx.Node, str](), ""
    for node in reversed(graph.nodes):
        own = known[node]
        following = following if own is None else shared(own.split(", "))
        found[node] = shared([before[node], following]) if own is None else own
    return {node: found[node] for node in weights}


def shared(paths: Iterable[str]) -> str:
    """a.b.q, a.b.k -> a.b"""
    every = [path.split(".") for path in paths]
    alike = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*every))
    return ".".join(names[0] for names in alike)


def _module(node: fx.Node, stored: frozenset[Stored]) -> str | None:
    op = node.target
    if isinstance(op, OpOverload) and op.namespace == "fxcompress":
        given = dict(zip((a.name for a in op._schema.arguments), node.args)).get("name")
        if given:
            return str(given)
    if node.meta.get("nn_module_stack"):
        path, _ = [*node.meta["nn_module_stack"].values()][-1]
        return str(path).partition("@")[0]
    return min((tensor.path.rpartition(".")[0] for tensor in stored), default=None)
