"""A graph as text, one node a line with its type.

    input  x: f32[s0, 64]
    linear: f32[s0, 256] = aten.linear(x, self.up.weight, self.up.bias)   # low_rank{rank=8}, was aten.linear at up
    return linear
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

_SHORT = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16", torch.bool: "bool",
    torch.int64: "i64", torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8",
}  # fmt: skip


def show(gm: fx.GraphModule) -> str:
    """The graph of `gm`; parameters and buffers are written in place, as self.path."""
    lines = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            lines.append(f"input  {node.name}: {_type(node)}")
        elif node.op == "output":
            lines.append(f"return {', '.join(_argument(a) for a in pytree.tree_leaves(node.args[0]))}")
        elif node.op != "get_attr":
            lines.append(_call(node))
    return "\n".join(lines)


def _call(node: fx.Node) -> str:
    op = str(node.target) if not callable(node.target) or hasattr(node.target, "_schema") else node.target.__name__
    arguments = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    note = node.meta.get("fxcompress")
    comment = f"   # {note}" if note else ""
    return f"{node.name}: {_type(node)} = {op.removesuffix('.default')}({', '.join(arguments)}){comment}"


def _type(node: fx.Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return f"{_SHORT.get(value.dtype, str(value.dtype))}[{', '.join(str(s) for s in value.shape)}]"
    return type(value).__name__ if value is not None else "?"


def _argument(a: object) -> str:
    if isinstance(a, fx.Node):
        return f"self.{a.target}" if a.op == "get_attr" else a.name
    if isinstance(a, list | tuple):
        return "[" + ", ".join(_argument(e) for e in a) + "]"
    return str(a).removeprefix("torch.") if isinstance(a, torch.dtype) else repr(a)
