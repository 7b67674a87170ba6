"""A lowered graph, to be called as the module it was made from; no gradient is kept.

    eager       node after node
    inductor    torch.compile: pointwise work between the products becomes C++ loops, attention a fused kernel; compiled
                at the first call, once for any batch of two or more, and once each where a size is 1 or short
                (fxcompress.codegen.cpu.rules)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcompress.core.signature import Signature, SignedModule
from fxcompress.cost_model.device import Target as Target


def _of_inputs(guards: Sequence[Any]) -> list[bool]:
    """Which guards a call has to check: the graph and its tensors are this module's own, and nobody changes them.

    MiniLM has 364; looking a graph up takes 99 us with those of its tensors and 13 without (Zen 4, 2026-11-21).
    """
    own = re.compile(r"(L\['self'\]|self)($|[.\[])|G\[")
    return [own.match(guard.name) is None for guard in guards]


# Inductor's, for a lowered graph's compilation alone. NOTE: no "freezing": constants in the code would save .07 of 2.4
# ms (MiniLM, 1 x 16), and nothing compiled could be found again by the next process.
INDUCTOR: Mapping[str, Any] = {
    "size_asserts": False,  # sizes follow from those of the inputs, which Dynamo's guards hold
    # what follows a product reads its sums, two numbers a token and three a column: no reason to write it out
    "realize_reads_threshold": 8,
    "cpp.enable_floating_point_contract_flag": "fast",  # a b + c rounded once
}
OPTIONS: Mapping[str, Any] = {**INDUCTOR, "guard_filter_fn": _of_inputs}


class LoweredModule(nn.Module):
    """What `fxcompress.lower` returns: `.plan` and `.report` are those of the compressed module."""

    def __init__(self, graph_module: SignedModule, to: Target) -> None:
        super().__init__()
        self.graph_module = graph_module
        self.target: Target = to
        flat = graph_module.copy().graph
        flat.set_codegen(fx.graph.CodeGen())  # flat inputs, a flat tuple of outputs
        self._flat = fx.GraphModule(graph_module, flat)
        self._run: Callable[..., Any] = self._flat.forward
        if to == "inductor":
            self._run = torch.compile(self._flat, dynamic=True, options=dict(OPTIONS))
        self.eval()

    @property
    def signature(self) -> Signature:
        """How it may be called."""
        return self.graph_module.signature

    @property
    def plan(self) -> Any:
        """What was chosen (fxcompress.Plan)."""
        return self.graph_module.plan

    @property
    def report(self) -> Any:
        """Predicted beside measured, of the module before it was lowered."""
        return self.graph_module.report

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module it was made from."""
        bound = self.signature.bind(args, kwargs)
        self.signature.check(*bound)
        with torch.no_grad():
            outputs = self._run(*pytree.tree_leaves(bound))
        assert self.graph_module._out_spec is not None
        return pytree.tree_unflatten(list(outputs), self.graph_module._out_spec)
