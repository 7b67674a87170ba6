"""Several calls of one graph, run up to one place of it: only the values that are still needed there are held.

From there a graph can be run on with other weights, as often as asked for, without what comes before; or the frontier
itself moves on, and what it has passed with another weight stays so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxcompress.core.calibrate import Call
from fxcompress.core.signature import SignedModule
from fxcompress.core.site import Site


class Frontier:
    """values: of every call, {node: its value} for what the nodes from `done` on will read."""

    def __init__(self, gm: SignedModule, calls: Sequence[Call]) -> None:
        self.gm = gm
        self.nodes = list(gm.graph.nodes)
        self.done = 0  # nodes that have run
        self.values: list[dict[fx.Node, Any]] = [_inputs(gm, call) for call in calls]
        self._runner = fx.Interpreter(gm)
        self._position = {node: i for i, node in enumerate(self.nodes)}
        last = {user: i for i, node in enumerate(self.nodes) for user in node.all_input_nodes}
        self._dies_at: dict[int, list[fx.Node]] = {}
        for node, i in last.items():
            self._dies_at.setdefault(i, []).append(node)

    def first_use(self, site: Site) -> int:
        """Where the site's weight is first read by a computation."""
        return min(self._position[user] for read in reads_of(self.gm, site) for user in read.users)

    def is_known_at(self, node: fx.Node, place: int) -> bool:
        """True if the value of `node` is made before `place`."""
        return self._position[node] < place

    def advance(self, stop: int) -> None:
        """Run every call on, up to and without node number `stop`; never back."""
        for env in self.values:
            self.run(env, self.done, max(stop, self.done))
        self.done = max(stop, self.done)

    def run(self, env: dict[fx.Node, Any], start: int, stop: int) -> Any:
        """The value of the last node of start .. stop - 1; nodes that `env` has a value for keep it."""
        value = None
        self._runner.env = env
        with torch.no_grad():
            for i in range(start, stop):
                node = self.nodes[i]
                if node not in env:  # placeholders are there from the start
                    value = env[node] = self._runner.run_node(node)
                for dead in self._dies_at.get(i, ()):
                    env.pop(dead, None)
        return value


def put(env: dict[fx.Node, Any], gm: SignedModule, site: Site, weight: Tensor, bias: Tensor | None) -> None:
    """`weight` (rows, columns), and `bias` if not None, in place of the site's own in what follows."""
    for read in reads_of(gm, site):
        env[read] = site.stored(weight)
    if bias is not None and site.uses[0].bias is not None:
        env[site.uses[0].bias] = bias


def reads_of(gm: SignedModule, site: Site) -> list[fx.Node]:
    """The nodes that fetch the site's weight."""
    return [node for node in gm.graph.find_nodes(op="get_attr") if node.target in site.paths]


def _inputs(gm: SignedModule, call: Call) -> dict[fx.Node, Any]:
    return dict(zip(gm.graph.find_nodes(op="placeholder"), pytree.tree_leaves(call)))
