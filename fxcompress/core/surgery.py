"""The only code that edits a graph: new tensors, new calls, provenance, the swap, the old weight gone.

Before and after, at one use of a site:

    %y = aten.linear(%x, self.up.weight, self.up.bias)
    %d = fxcompress.dequantize(self.up.codes, self.up.scales, self.up.zeros, self.up.grid, 4, 64, 256, float32)
    %y = aten.linear(%x, %d, self.up.bias)          # quantize{bits=4, group_size=64}, was aten.linear at up
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.core.site import Site, Use, attribute

Emit = Callable[[fx.Graph, Use, Mapping[str, fx.Node]], fx.Node]


def replace(
    gm: fx.GraphModule, site: Site, tensors: Mapping[str, Tensor], trainable: Collection[str], emit: Emit, note: str
) -> None:
    """Put `tensors` in place of the site's weight, `emit`'s call in place of each of its uses. `finish` must follow.

    Those named in `trainable` become parameters; codes, scales and masks are buffers.
    """
    owner_path, prefix = place(site)
    owner = gm.get_submodule(owner_path)
    for key, tensor in tensors.items():
        attribute = nn.Parameter(tensor, requires_grad=False) if key in trainable else tensor
        if isinstance(attribute, nn.Parameter):
            owner._parameters.pop(prefix + key, None)  # a corrected bias takes the name of the one it replaces
            owner.register_parameter(prefix + key, attribute)
        else:
            owner.register_buffer(prefix + key, attribute)
    for use in site.uses:
        _swap(gm, site, use, {key: f"{owner_path}.{prefix}{key}".lstrip(".") for key in tensors}, tensors, emit, note)


def place(site: Site) -> tuple[str, str]:
    """-> (module for the new tensors, prefix of their names): "up.weight" -> ("up", ""), "a.W_E" -> ("a", "W_E_")."""
    path = site.name if site.name in site.paths else f"{site.name}.weight"
    owner, _, leaf = path.rpartition(".")
    return (owner, "") if leaf == "weight" else (owner, f"{leaf}_")


def finish(gm: fx.GraphModule) -> None:
    """Drop what nothing reads any more, then check and recompile."""
    gm.graph.eliminate_dead_code()
    tidy(gm)


def tidy(gm: fx.GraphModule) -> None:
    """The same, but every call stays: torch's own functions may change their arguments, and fx does not know which."""
    for node in reversed(gm.graph.find_nodes(op="get_attr")):
        if not node.users:
            gm.graph.erase_node(node)
    read = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    parameters = [name for name, _ in gm.named_parameters(remove_duplicate=False)]
    for path in parameters + [name for name, _ in gm.named_buffers()]:
        if path not in read:
            owner, _, leaf = path.rpartition(".")
            delattr(gm.get_submodule(owner), leaf)
    gm.graph.lint()
    gm.recompile()


def own_tensors(gm: fx.GraphModule) -> None:
    """Give the graph its own copy of every tensor it still shares with the model it was captured from."""
    copies: dict[int, Tensor] = {}
    for module in gm.modules():
        groups: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for group in groups:
            for key, tensor in group.items():
                if tensor is not None:
                    copy = copies.setdefault(id(tensor), tensor.detach().clone())
                    is_parameter = isinstance(tensor, nn.Parameter)
                    group[key] = nn.Parameter(copy, requires_grad=False) if is_parameter else copy


def attribute_of(node: fx.Node) -> Tensor:
    """The tensor a get_attr node reads."""
    owner = node.graph.owning_module
    assert owner is not None
    return attribute(owner, str(node.target)).detach()


def stored_bytes(gm: nn.Module) -> int:
    """Bytes of every distinct parameter and buffer."""
    tensors = {id(t): t for t in [*gm.parameters(), *gm.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _swap(
    gm: fx.GraphModule,
    site: Site,
    use: Use,
    paths: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    emit: Emit,
    note: str,
) -> None:
    graph, old = gm.graph, use.node
    before = set(graph.nodes)
    with graph.inserting_before(old):
        reads = {}
        for key, path in paths.items():
            reads[key] = graph.get_attr(path)
            reads[key].meta["val"] = torch.empty_like(tensors[key], device="meta")
        new = emit(graph, use, reads)
    _describe(node for node in graph.nodes if node not in before)
    for key in ("val", "tensor_meta", "nn_module_stack", "stack_trace", "from_node"):
        if key in old.meta:
            new.meta[key] = old.meta[key]
    new.meta["fxcompress"] = f"{note}, was {str(old.target).removesuffix('.default')} at {site.name}"
    old.replace_all_uses_with(new)
    graph.erase_node(old)


def _describe(nodes: object) -> None:
    """Shapes of the constant part of what was inserted (the rest gets its `val` from the node it replaces)."""
    for node in nodes:  # type: ignore[attr-defined]
        if node.op == "call_function" and "val" not in node.meta:
            values = [a.meta.get("val") for a in node.all_input_nodes]
            if all(isinstance(v, Tensor) and v.device.type == "meta" for v in values):
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda a: a.meta["val"])
                node.meta["val"] = node.target(*args, **kwargs)
