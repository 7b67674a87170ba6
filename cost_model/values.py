"""What each node of a graph makes: the fake tensor, the list of them or the size that tracing noted as its `val`.

Calls that a rewrite inserted, but for the last of each, carry no `val`. They are called here on what their operands
are known to make, under the fake mode the others come from; nothing is written into the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fxcompress.core.surgery import attribute_of

Values = Mapping[fx.Node, Any]


def values_of(graph: fx.Graph) -> dict[fx.Node, Any]:
    """Of every node but the output. A call nobody can make without data is left with None."""
    noted = (node.meta.get("val") for node in graph.nodes)
    mode = next((v.fake_mode for v in noted if isinstance(v, FakeTensor)), None) or FakeTensorMode()
    made: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if "val" in node.meta or node.op == "output":
            made[node] = node.meta.get("val")
        elif node.op == "get_attr":
            made[node] = attribute_of(node)
        elif node.op == "call_function":
            made[node] = _call(node, made, mode)
        else:
            made[node] = None
    return made


def parts(value: Any) -> tuple[Any, ...]:
    """The tensors of a list, or the one value itself."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _call(node: fx.Node, made: Values, mode: FakeTensorMode) -> Any:
    devices = [v.device for n in made for v in parts(made[n]) if isinstance(v, FakeTensor)]
    device = devices[0] if devices else torch.device("cpu")

    def fake(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [fake(v) for v in value]
        if isinstance(value, FakeTensor) or not isinstance(value, Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)

    with mode:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda read: fake(made[read]))
        try:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError):
            return None
