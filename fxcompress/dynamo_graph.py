"""A graph of Dynamo with parts in place of the parameters that it is handed.

    torch._C._nn.linear(x, l_self_..._weight_, l_self_..._bias_)      a call of torch, on placeholders
    aten.linear(x, fxcompress.dequantize(self.site3_codes, ...), self.site3_bias)

Dynamo lifts a model's parameters to inputs and spells products in torch's own functions. Here those that read a weight
with a part are spelled as ATen, the weight becomes an attribute on meta, and the surgery of `compile` does the rest
(fxcompress.core.surgery). Inputs stay as they were, and one that nothing reads any more is passed over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompress.core.site import find_sites
from fxcompress.core.surgery import tidy
from fxcompress.leaves import hollow
from fxcompress.parts import Part

log = logging.getLogger("fxcompress.backend")
aten = torch.ops.aten
Spelling = Callable[..., tuple[Any, tuple[Any, ...]]]  # the arguments of a call -> an ATen op and its arguments


def _linear(x: Any, weight: Any, bias: Any = None) -> tuple[Any, tuple[Any, ...]]:
    return aten.linear.default, (x, weight, bias)


def _embedding(ids: Any, weight: Any, *_: Any, **__: Any) -> tuple[Any, tuple[Any, ...]]:
    return aten.embedding.default, (weight, ids)  # the rest is for training; max_norm changes the weight, so no export


def _convolution(op: Any) -> Spelling:
    def spelled(
        x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1
    ) -> tuple[Any, tuple[Any, ...]]:
        target = op.padding if isinstance(padding, str) else op.default
        sizes = (list(s) if isinstance(s, tuple) else s for s in (stride, padding, dilation))
        return target, (x, weight, bias, *sizes, groups)

    return spelled


def _addmm(bias: Any, x: Any, weight: Any) -> tuple[Any, tuple[Any, ...]]:
    return aten.addmm.default, (bias, x, weight)


SPELLINGS: Mapping[Any, Spelling] = {
    torch._C._nn.linear: _linear,
    F.linear: _linear,
    F.embedding: _embedding,
    torch.conv1d: _convolution(aten.conv1d),
    torch.conv2d: _convolution(aten.conv2d),
    torch.conv3d: _convolution(aten.conv3d),
    torch.addmm: _addmm,
}


def rewritten(gm: fx.GraphModule, inputs: Sequence[Any], part_of: Mapping[Tensor, Part]) -> fx.GraphModule:
    """A copy of `gm`, whose inputs are `inputs`, with parts for the parameters that have one, by identity. `gm` stays
    as it is: Dynamo goes on to read it."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    work, parts = fx.GraphModule(gm, graph), dict[str, Part]()
    for node in graph.nodes:
        if "example_value" in node.meta:
            node.meta["val"] = node.meta["example_value"]
    for at, (node, value) in enumerate(zip(graph.find_nodes(op="placeholder"), inputs)):
        if isinstance(value, nn.Parameter):
            part = part_of.get(value)
            if part is not None:
                parts[f"site{at}"] = part
            _read_as_attribute(work, node, f"site{at}", value if part is None else nn.Parameter(hollow(value), False))
    for node in list(graph.nodes):
        if node.target in SPELLINGS and any(str(a.target) in parts for a in node.all_input_nodes):
            target, args = SPELLINGS[node.target](*node.args, **node.kwargs)
            node.target, node.args, node.kwargs = target, args, {}
    sites = {site.name: site for site in find_sites(work) if site.name in parts}
    for name, part in parts.items():
        if name in sites:
            part.recipe.of(sites[name], part.tensors).apply(work, sites[name])
        else:
            _tell_what_reads(work, name, part)
    for node in graph.find_nodes(op="get_attr"):
        if "input" in node.meta:  # what is no part's: the input it was
            node.replace_all_uses_with(node.meta["input"])
    tidy(work)
    return work


def _tell_what_reads(work: fx.GraphModule, name: str, part: Part) -> None:
    reads = [str(user.target) for node in work.graph.nodes if node.target == name for user in node.users]
    if reads:
        calls = ", ".join(sorted({*reads}))
        log.warning("%s stays as it was in this graph: it is read by %s, which no rewrite covers", part.site, calls)


def _read_as_attribute(work: fx.GraphModule, node: fx.Node, name: str, value: nn.Parameter) -> None:
    work.register_parameter(name, value)
    with work.graph.inserting_after(node):
        read = work.graph.get_attr(name)
    node.replace_all_uses_with(read)
    read.meta.update(val=hollow(value), input=node)
