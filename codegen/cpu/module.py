"""A lowered graph, to be called as the module it was made from; no gradient is kept.

    eager       node after node
    inductor    torch.compile: pointwise work between the products becomes C++ loops, attention a fused kernel; compiled
                at the first call, once for any batch of two or more, and once each where a size is 1
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcompress.core.signature import Signature, SignedModule
from fxcompress.cost_model.device import Target as Target


def _of_inputs(guards: Sequence[Any]) -> list[bool]:
    """Which guards a call has to check: the graph and its tensors are this module's own, and nobody changes them.

    MiniLM at 1 x 16, one thread, Zen 4 EPYC, 2026-11-21: medians of 40 calls 4.3 ms with all guards and 4.1 with these,
    on a busy machine, where that difference is within the noise.
    """
    return [not guard.name.startswith(("L['self']", "G[")) for guard in guards]


OPTIONS: Mapping[str, Any] = {  # Inductor's, for this module's compilation alone
    "freezing": True,
    "guard_filter_fn": _of_inputs,
    # what follows a product reads its sums, two numbers a token and three a column: no reason to write it out
    "realize_reads_threshold": 8,
    "cpp.enable_floating_point_contract_flag": "fast",  # a b + c rounded once
}


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
