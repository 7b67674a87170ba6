"""How much the model's output reacts to an error at one site:   kappa[site, family] = E[site] / e[site]

e is the site's own squared relative error (fxcompress.core.metric), E the loss of the whole model
(fxcompress.core.divergence) when that site alone is rewritten, measured on held-out examples. Squared errors of sites
add, and kappa depends on the family of the rewrite but hardly on its amount (measured on MiniLM: additive within 1-5 %,
log kappa at 2, 3 and 4 bits correlated 0.99), so one probe a site and family prices every candidate:

    predicted loss = sum over sites of kappa[site, family] * e[candidate]

A probe starts at the site: the graph's prefix is run once, up to each site in turn, and only the rest is run again with
the rewritten weight. That halves the cost of a probe on average, and holds the live values at one place in the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxcompress.core.calibrate import Call
from fxcompress.core.divergence import Divergence, mask_of, named_outputs
from fxcompress.core.frontier import Frontier, put
from fxcompress.core.signature import SignedModule
from fxcompress.core.site import Site


class Prober:
    """Runs the rest of the graph from a site on, with another weight. Sites must be probed in graph order."""

    def __init__(self, gm: SignedModule, calls: Sequence[Call]) -> None:
        self.gm, self.calls = gm, calls
        self.frontier = Frontier(gm, calls)
        self.references = [self._finish(dict(env), 0, call) for env, call in zip(self.frontier.values, calls)]

    def rows_read(self, site: Site) -> Tensor:
        """The rows of the site's weight on which `loss` depends, ascending: all of them where it is multiplied, or read
        by numbers that are made behind its first use."""
        start = self.frontier.first_use(site)
        if site.kind != "embedding" or not all(self.frontier.is_known_at(use.x, start) for use in site.uses):
            return torch.arange(site.rows)
        self.frontier.advance(start)
        read = (env[use.x].reshape(-1) for env in self.frontier.values for use in site.uses)
        return torch.unique(torch.cat([*read]))  # type: ignore[no-any-return]

    def loss(self, site: Site, weight: Tensor, bias: Tensor | None) -> float:
        """The model's loss with `weight` (rows, columns), and `bias` if not None, in place of the site's own."""
        start = self.frontier.first_use(site)
        self.frontier.advance(start)
        divergence = Divergence()
        for env, call, reference in zip(self.frontier.values, self.calls, self.references):
            fork = dict(env)
            put(fork, self.gm, site, weight, bias)
            divergence.add(reference, self._finish(fork, start, call))
        return divergence.loss

    def _finish(self, env: dict[fx.Node, Any], start: int, call: Call) -> dict[str, Tensor]:
        output = self.frontier.run(env, start, len(self.frontier.nodes))
        leaves = output if isinstance(output, list | tuple) else [output]
        spec = self.gm._out_spec
        assert spec is not None
        return named_outputs(pytree.tree_unflatten(list(leaves), spec), mask_of(call[1]))


def kappa(loss: float, local_error: float) -> float:
    """loss / local error; 0 where the probe changed nothing."""
    return loss / local_error if local_error > 0 else 0.0


def price(
    kappas: Mapping[str, float], structure: str, storage: str, structure_error: float, total_error: float
) -> float:
    """Predicted loss of a candidate: structure's error by that family's kappa, what storing adds by the storage's."""
    added = max(0.0, total_error - structure_error)
    storage_kappa = kappas.get(storage, kappas.get(structure, 0.0))
    return kappas.get(structure, storage_kappa) * structure_error + storage_kappa * added
