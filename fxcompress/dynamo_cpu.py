"""Parts on the kernels of this CPU, in a graph of Dynamo: what `fxcompress.lower` makes of a compiled graph.

    aten.linear(x, self.site3, self.site4)
    ->
    int8_linear(x, self.site3_packed_0, [self.site3_packed_1], [self.site3_packed_2], [self.site3_packed_3])

Each part is lowered once, as a graph of one product or one lookup (fxcompress.codegen.cpu.lower), whose nodes are
copied to wherever its weight is used: all graphs of a model read one set of packed tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompress.codegen.cpu.lower import approximate_here, lower_here
from fxcompress.codegen.cpu.rules import Rule
from fxcompress.core.errors import BackendError
from fxcompress.core.site import Site, Use
from fxcompress.core.surgery import attribute_of
from fxcompress.dynamo_graph import put_as_told
from fxcompress.leaves import alone
from fxcompress.parts import Part

aten = torch.ops.aten
SPELLINGS = {
    F.gelu: aten.gelu.default,
    torch._C._nn.gelu: aten.gelu.default,
    F.scaled_dot_product_attention: aten.scaled_dot_product_attention.default,
    torch._C._nn.scaled_dot_product_attention: aten.scaled_dot_product_attention.default,
}


@dataclass(frozen=True, eq=False)
class Packed:
    """x -> y, or ids -> rows, of one part and bias, over tensors named as nobody else's are."""

    gm: fx.GraphModule
    bias: Tensor | None  # held: it is known by where it lies in memory
    name: str


@dataclass(frozen=True, eq=False)
class Lowering:
    """Puts parts into graphs, and keeps what it packed. A convolution stays as its recipe says."""

    packed: dict[tuple[Part, str, int | None], Packed] = field(default_factory=dict)

    def put(self, work: fx.GraphModule, site: Site, part: Part) -> None:
        """`part` in place of every use of the site. Raises `BackendError` off the CPU."""
        device = next(iter(part.tensors.values())).device
        if device.type != "cpu":
            raise BackendError(f"option lower='cpu' packs weights for this CPU, and the model is on {device}.")
        if not all(map(_is_packable, site.uses)):
            put_as_told(work, site, part)
            return
        for use in site.uses:
            _inline(work, use, self._packed(site, use, part))

    def _packed(self, site: Site, use: Use, part: Part) -> Packed:
        bias = part.tensors.get("bias", None if use.bias is None else attribute_of(use.bias))
        key = part, use.kind, None if bias is None else bias.data_ptr()
        if key not in self.packed:
            self.packed[key] = Packed(_pack(site, use, part, bias), bias, f"part{len(self.packed)}")
        return self.packed[key]

    def between(self, work: fx.GraphModule) -> None:
        """GELU and attention between the products, as fxcompress.codegen.cpu.pointwise has them."""
        for node in work.graph.nodes:
            node.target = SPELLINGS.get(node.target, node.target)
            if node.target is aten.gelu.default and node.kwargs == {"approximate": "none"}:
                node.kwargs = {}
        approximate_here(work)
        work.recompile()


def _is_packable(use: Use) -> bool:
    """False for a convolution or experts, and where what is added is no parameter."""
    return use.kind in ("linear", "embedding") and (use.bias is None or use.bias.op == "get_attr")


def _pack(site: Site, use: Use, part: Part, bias: Tensor | None) -> fx.GraphModule:
    leaf = nn.Module()
    leaf.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
    weight = torch.empty(site.rows, site.columns, dtype=site.weight.dtype, device="meta")
    kind = nn.Embedding if use.kind == "embedding" else nn.Linear
    gm, _ = alone(kind, leaf, part.recipe, part.tensors, weight)
    lower_here(gm, Rule())
    return gm


def _inline(work: fx.GraphModule, use: Use, packed: Packed) -> None:
    """The nodes of `packed` in place of the one node of `use`."""
    made: dict[fx.Node, Any] = {}
    with work.graph.inserting_before(use.node):
        for node in packed.gm.graph.nodes:
            if node.op == "placeholder":
                made[node] = use.x
            elif node.op == "get_attr":
                name = f"{packed.name}_{node.target}".replace(".", "_")
                work.register_buffer(name, attribute_of(node))
                made[node] = work.graph.get_attr(name)
            elif node.op != "output":
                made[node] = work.graph.node_copy(node, made.__getitem__)
        output = made[next(iter(packed.gm.graph.find_nodes(op="output"))).args[0]]
        wanted = use.node.meta["val"].dtype  # under autocast another than that of x
        if use.kind == "linear" and use.x.meta["val"].dtype != wanted:
            output = work.graph.call_function(aten.to.dtype, (output, wanted))
    output.meta.update(use.node.meta)
    use.node.replace_all_uses_with(output)
    work.graph.erase_node(use.node)
