"""A graph of Dynamo with parts in place of the parameters that it is handed.

    torch._C._nn.linear(x, l_self_..._weight_, l_self_..._bias_)      a call of torch, on placeholders
    aten.linear(x, fxcompress.dequantize(self.site3_codes, ...), self.site3_bias)

Dynamo lifts a model's parameters to inputs and spells products in torch's own functions. Here those that read a weight
with a part are spelled as ATen, the weight becomes an attribute on meta, and the surgery of `compile` does the rest
(fxcompress.core.surgery). A weight that something else reads as well is read back whole, so that none stays as it was.
Inputs stay as they were, and one that nothing reads any more is passed over.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompress.core.errors import BackendError
from fxcompress.core.experts import spell_out
from fxcompress.core.site import Site, find_sites
from fxcompress.core.surgery import tidy
from fxcompress.leaves import hollow
from fxcompress.parts import Part
from fxcompress.read_back import Reader

aten = torch.ops.aten
Spelling = Callable[..., tuple[Any, tuple[Any, ...]]]  # the arguments of a call -> an ATen op and its arguments
Put = Callable[[fx.GraphModule, Site, Part], None]  # in place of a site's weight


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


def _matmul(x: Any, weight: Any) -> tuple[Any, tuple[Any, ...]]:
    return aten.matmul.default, (x, weight)


def _turned(weight: Any, *_: Any) -> tuple[Any, tuple[Any, ...]]:
    return aten.t.default, (weight,)


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
    torch.matmul: _matmul,
    torch.mm: _matmul,
    operator.matmul: _matmul,
    "matmul": _matmul,
    "mm": _matmul,
    torch.t: _turned,
    "t": _turned,
}
TURNS = ("T", "mT")  # attributes of a weight


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter that a part stands for, while it is an attribute."""

    part: Part
    value: Tensor
    biases: tuple[str, ...]  # attributes that are the bias which the part corrects


def put_as_told(work: fx.GraphModule, site: Site, part: Part) -> None:
    """What the part's recipe emits."""
    part.recipe.of(site, part.tensors).apply(work, site)


def rewritten(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    part_of: Mapping[Tensor, Part],
    beside: Mapping[Tensor, Part],
    put: Put = put_as_told,
) -> fx.GraphModule:
    """A copy of `gm`, whose inputs are `inputs`, with parts for the parameters that have one, by identity. `gm` stays
    as it is: Dynamo goes on to read it. beside: parts by the bias that they correct. Raises `BackendError`."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    work = fx.GraphModule(gm, graph)
    for node in graph.nodes:
        if "example_value" in node.meta:
            node.meta["val"] = node.meta["example_value"]
    weights = _as_attributes(work, inputs, part_of, beside)
    _spell(graph, weights)
    for site in find_sites(work):
        if site.name in weights and _has_bias_for(site, weights[site.name].part):
            put(work, site, weights.pop(site.name).part)
    for name, weight in weights.items():  # what is read otherwise than the compiled graph reads it
        _read_back(work, name, weight)
    for node in graph.find_nodes(op="get_attr"):
        if "input" in node.meta:  # what is no part's: the input it was
            node.replace_all_uses_with(node.meta["input"])
    tidy(work)
    return work


def _as_attributes(
    work: fx.GraphModule, inputs: Sequence[Any], part_of: Mapping[Tensor, Part], beside: Mapping[Tensor, Part]
) -> dict[str, Weight]:
    """Every parameter read as an attribute -> the weights with a part, by attribute."""
    given = zip(work.graph.find_nodes(op="placeholder"), inputs)
    parameters = {f"site{at}": (node, v) for at, (node, v) in enumerate(given) if isinstance(v, nn.Parameter)}
    weights = {}
    for name, (node, value) in parameters.items():
        part = part_of.get(value)
        if part is not None:
            biases = tuple(other for other, (_, bias) in parameters.items() if beside.get(bias) is part)
            weights[name] = Weight(part, value, biases)
        _read_as_attribute(work, node, name, value if part is None else nn.Parameter(hollow(value), False))
    return weights


def _has_bias_for(site: Site, part: Part) -> bool:
    """False where the part corrects a bias, and the product is written without one: it is added elsewhere."""
    return "bias" not in part.tensors or site.kind == "embedding" or any(use.bias is not None for use in site.uses)


def _spell(graph: fx.Graph, names: Collection[str]) -> None:
    """As ATen, whatever reads one of the weights `names`."""
    for node in list(graph.nodes):
        spelling = _spelling(node)
        if spelling is not None and any(_reads(a, names) for a in node.all_input_nodes):
            node.target, node.args = spelling(*node.args, **node.kwargs)
            node.op, node.kwargs = "call_function", {}
    spell_out(graph)


def _spelling(node: fx.Node) -> Spelling | None:
    """How ATen says it; None for what is no product, look-up or transpose."""
    if node.target is getattr and len(node.args) == 2 and node.args[1] in TURNS:
        return _turned
    of_two = node.target in (torch.t, "t") and len(_shape(node)) != 2
    return None if of_two else SPELLINGS.get(node.target)


def _shape(node: fx.Node) -> Sequence[Any]:
    value = node.meta.get("val")
    return value.shape if isinstance(value, Tensor) else ()


def _reads(node: fx.Node, names: Collection[str]) -> bool:
    """True for one of the weights `names`, or its transpose."""
    if node.target is aten.t.default:
        return _reads(node.all_input_nodes[0], names)
    return node.op == "get_attr" and str(node.target) in names


def _read_back(work: fx.GraphModule, name: str, weight: Weight) -> None:
    """The weight, whole, for whatever reads it, and the bias that goes with it. Raises `BackendError`."""
    part, reader = weight.part, Reader.of(weight.part, weight.value)
    if not any(node.users for node in _reads_of(work, name)):
        return
    if "bias" in part.tensors and not weight.biases:
        raise BackendError(
            f"{part.recipe} at {part.site} corrects a bias, and torch.compile shows none beside it. Use the compiled "
            "graph, or fxcompress.apply."
        )

    def read_back(*tensors: Tensor) -> Tensor:
        return reader(dict(zip(reader.names, tensors)))

    whole = _insert(work, name, {key: part.tensors[key] for key in reader.names}, read_back)
    for node in _reads_of(work, name):
        node.replace_all_uses_with(whole)
    for bias in weight.biases:
        corrected = _insert(work, bias, {"corrected": part.tensors["bias"]}, torch.clone)
        for node in _reads_of(work, bias):
            node.replace_all_uses_with(corrected)


def _reads_of(work: fx.GraphModule, name: str) -> list[fx.Node]:
    return [node for node in work.graph.find_nodes(op="get_attr") if node.target == name]


def _insert(
    work: fx.GraphModule, name: str, tensors: Mapping[str, Tensor], function: Callable[..., Tensor]
) -> fx.Node:
    """`function` of `tensors`, in front of the first node that reads the attribute `name`."""
    first = _reads_of(work, name)[0]
    with work.graph.inserting_before(first):
        reads = []
        for key, tensor in tensors.items():
            work.register_buffer(f"{name}_{key}", tensor.detach())
            reads.append(work.graph.get_attr(f"{name}_{key}"))
        made = work.graph.call_function(function, tuple(reads))
    made.meta["val"] = first.meta["val"]
    return made


def _read_as_attribute(work: fx.GraphModule, node: fx.Node, name: str, value: nn.Parameter) -> None:
    work.register_parameter(name, value)
    with work.graph.inserting_after(node):
        read = work.graph.get_attr(name)
    node.replace_all_uses_with(read)
    read.meta.update(val=hollow(value), input=node)
