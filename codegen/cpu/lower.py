"""A fused graph with the calls of libraries in it: every fused node becomes its steps again, and each product the
kernel that fxcompress.codegen.cpu.rules names. The graph given stays as it is.

    %y = fxcompress.fused(%x, [codes, ...], [%z], "linear(x, dequantize(...), float32[1536]) | gelu(_)")
    ->
    %p = int8_linear(%x, self.up.codes8, [self.up.scales8], [self.up.sums8], [self.up.bias])
    %y = aten.gelu(%p[0])

Products of one input whose weights stand in one node (Q, K, V) become one product. A structure whose multiplications
are few enough keeps its op; low rank becomes two products; everything else is decoded to its dense matrix, once.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from fxcompress.codegen.cpu import pointwise, products
from fxcompress.codegen.cpu.decode import Fours, arguments_of, dense, fours_of, table
from fxcompress.codegen.cpu.rules import (
    LEAST,
    Bucket,
    Kernel,
    Rule,
    attends_in_bf16,
    is_two_products,
    kernel_of,
    kernels_of,
    stays_structured,
)
from fxcompress.codegen.ops import GATHERED, fused
from fxcompress.codegen.spec import (
    UNROWS,
    Argument,
    Call,
    Constant,
    Extra,
    Input,
    Value,
    is_product,
    leaves,
    op_of,
    parse,
)
from fxcompress.core.modes import forget
from fxcompress.core.signature import SignedModule
from fxcompress.core.surgery import attribute_of, finish
from fxcompress.cost_model.device import DeviceProfile, Target
from fxcompress.cost_model.values import values_of

aten = torch.ops.aten
FUSED, PARALLEL = fused.fused._opoverload, fused.fused_parallel._opoverload
_LOOKUPS = frozenset(op._opoverload for op in GATHERED)
_BLOCKS = ("block_low_rank_linear", "monarch_linear")  # as many multiplications as elements


def lower_graph(
    gm: SignedModule, profile: DeviceProfile | None = None, target: Target = "inductor"
) -> SignedModule:
    """A copy of `gm` over the tensors it still reads and the packed weights, in eval mode."""
    work = gm.copy()
    lower_here(work, Rule(profile, target, weight_bytes(work)))
    return work


def lower_here(work: fx.GraphModule, rule: Rule) -> None:
    """The same in place."""
    forget(work.graph)
    for node, value in values_of(work.graph).items():
        if value is not None:  # what a rewrite made on the way (rows of a factor) carries none of its own
            node.meta.setdefault("val", value)
    for node in list(work.graph.nodes):
        if node.target in (FUSED, PARALLEL):
            _Inlined(work, node, rule).replace()
        elif node.target in _LOOKUPS and all(n.op == "get_attr" for n in node.all_input_nodes[1:]):
            _lookup(work, node)
        elif node.target is aten.linear.default and node.args[1].op == "get_attr":
            _kept(work, node)
    finish(work)


def weight_bytes(gm: fx.GraphModule) -> float:
    """Of what a call reads whole: all the tensors of a graph but tables, of which it reads a few rows."""
    tables = {read for node in gm.graph.nodes if _looks_up(node) for read in node.all_input_nodes}
    read = {str(n.target): attribute_of(n) for n in gm.graph.find_nodes(op="get_attr") if n not in tables}
    return float(sum(t.numel() * t.element_size() for t in read.values()))


def _looks_up(node: fx.Node) -> bool:
    return node.target in _LOOKUPS or node.target in (aten.embedding.default, products.gather)


def lower_pointwise(gm: SignedModule) -> SignedModule:
    """A copy of `gm` with GELU and attention as fxcompress.codegen.cpu.pointwise has them: many passes over memory, so
    for a graph whose passes will be fused."""
    work = gm.copy()
    approximate_here(work)
    finish(work)
    return work


def approximate_here(work: fx.GraphModule) -> None:
    """The same in place, with what nothing reads any more left in it."""
    for node in list(work.graph.nodes):
        if node.target is aten.scaled_dot_product_attention.default:
            _attend(work, node)
        elif node.target is aten.gelu.default and len(node.args) == 1 and not node.kwargs:
            _approximate(work, node)


class _Inlined:
    """The steps of one fused node, written into the graph before it."""

    def __init__(self, gm: fx.GraphModule, node: fx.Node, rule: Rule) -> None:
        x, tensors, extras, text, *_ = node.args
        assert isinstance(x, fx.Node)
        self.gm, self.node, self.graph, self.x, self.rule = gm, node, gm.graph, x, rule
        self.tensors: list[fx.Node] = list(tensors)  # type: ignore[arg-type]
        self.extras: list[fx.Node] = list(extras or [])  # type: ignore[arg-type]
        self.spec = parse(str(text))
        self.dtype: torch.dtype = x.meta["val"].dtype
        self.made: dict[int, fx.Node] = {}  # by step
        self.width: list[int] = []  # of every step's rows

    def replace(self) -> None:
        reads = iter(self.tensors)
        mine = [[next(reads) for leaf in leaves([call]) if isinstance(leaf, Constant)] for call in self.spec.steps]
        chains: dict[int, list[Matrix]] = {}
        for at, call in enumerate(self.spec.steps):
            found = self._matrices(call, mine[at]) if is_product(call) else []
            if found:
                chains[at] = found
            self.width.append(self._rows_of(call, found, mine[at]))
        with self.graph.inserting_before(self.node):
            for at, call in enumerate(self.spec.steps):
                if at in chains and at not in self.made:
                    self._multiply(at, chains)
                elif at not in self.made:
                    self.made[at] = self._call(call, iter(mine[at]))
            outputs = [self.graph.call_function(aten.contiguous.default, (self.made[i],)) for i in self.spec.outputs]
        self._hand_over(outputs)

    def _matrices(self, call: Call, reads: Sequence[fx.Node]) -> list[Matrix]:
        """What the product multiplies by, one after the other; none where it keeps its op."""
        tensors = [attribute_of(read) for read in reads]
        arguments, fours = arguments_of(call, iter(tensors)), fours_of(call, tensors)
        bias, columns = arguments.get("bias"), self._width_of(call.args[0])
        if call.name == "int8_dynamic_linear" and kernel_of(LEAST, self.dtype, True) == "int8":
            return []
        if call.name == "low_rank_linear":
            v, u = arguments["v"], arguments["u"]
            if is_two_products(len(v), len(u), v.shape[1]):
                return [Matrix(v, None, fours.get("v")), Matrix(u, bias, fours.get("u"))]
        if call.name in _BLOCKS:
            kept, rows = arguments["v"].numel() + arguments["u"].numel(), arguments["u"].shape[-2]
            if stays_structured(kept, rows, columns):
                return []
        stored = fours.get("weight") if call.name == "linear" else None
        return [Matrix(dense(call.name, arguments, columns, self.dtype), bias, stored)]

    def _multiply(self, at: int, chains: Mapping[int, list[Matrix]]) -> None:
        """Carry out the product of step `at`, and every later one of the same input in the same call."""
        source = self.spec.steps[at].args[0]
        x = self._argument(source, iter(()))
        if len(chains[at]) > 1 or self._kernel(chains[at][0]) != "int8":
            for matrix in chains[at]:
                (x,) = self._product(x, [matrix])
            self.made[at] = x
            return
        group = [
            i for i in chains
            if i >= at and self.spec.steps[i].args[0] == source and len(chains[i]) == 1
            and self._kernel(chains[i][0]) == "int8"
        ]  # fmt: skip
        self.made.update(zip(group, self._product(x, [chains[i][0] for i in group]), strict=True))

    def _product(self, x: fx.Node, matrices: Sequence[Matrix]) -> list[fx.Node]:
        kernel = self._kernel(matrices[0])
        return multiply(self.gm, x, matrices, kernel, self._few(matrices) if kernel == "int8" else ())

    def _few(self, matrices: Sequence[Matrix]) -> tuple[Bucket, ...]:
        """Kernels for few tokens, of weights one below the other."""
        rows, columns = sum(len(m.weight) for m in matrices), matrices[0].weight.shape[1]
        groups = {m.fours.group if m.fours else None for m in matrices}
        group = groups.pop() if len(groups) == 1 else None
        return kernels_of(rows, columns, self.dtype, True, self.rule, group)[:-1]

    def _kernel(self, matrix: Matrix) -> Kernel:
        return kernel_of(matrix.weight.numel(), self.dtype, compressed=True)

    def _call(self, call: Call, reads: Iterator[fx.Node]) -> fx.Node:
        """A step as it is written."""
        if call.name == UNROWS:
            rows = self._argument(call.args[0], reads)
            sizes = [self.graph.call_function(aten.sym_size.int, (self.x, i)) for i in range(self._rank() - 1)]
            return self.graph.call_function(aten.reshape.default, (rows, [*sizes, -1]))
        if call.name == "int8_dynamic_linear" and kernel_of(LEAST, self.dtype, True) == "int8":
            given = [self._argument(a, reads) for a in call.args]
            return self.graph.call_function(products.int8_dynamic, (*given, *[None] * (5 - len(given))))
        args = tuple(self._argument(a, reads) for a in call.args)
        named = {name: self._argument(a, reads) for name, a in call.named}
        return self.graph.call_function(op_of(call.name), args, named)

    def _argument(self, argument: Argument, reads: Iterator[fx.Node]) -> Any:
        match argument:
            case Value(index):
                return self.made[index]
            case Constant():
                return self.graph.get_attr(str(next(reads).target))
            case Extra(index):
                return self.extras[index]
            case Input(rows):
                if not rows:
                    return self.x
                return self.graph.call_function(aten.reshape.default, (self.x, [-1, self.x.meta["val"].shape[-1]]))
            case Call():
                return self._call(argument, reads)
            case tuple():
                return [self._argument(a, reads) for a in argument]
        return argument

    def _width_of(self, source: Argument) -> int:
        return self.width[source.index] if isinstance(source, Value) else int(self.x.meta["val"].shape[-1])

    def _rows_of(self, call: Call, matrices: Sequence[Matrix], reads: Sequence[fx.Node]) -> int:
        """The last dimension of what a step makes."""
        if matrices:
            return len(matrices[-1].weight)
        if is_product(call):  # it keeps its op: ask that
            arguments = arguments_of(call, iter([attribute_of(read) for read in reads]))
            return len(dense(call.name, arguments, self._width_of(call.args[0]), self.dtype))
        first = next((a for a in call.arguments if isinstance(a, Value | Input)), None)
        return 0 if first is None else self._width_of(first)

    def _rank(self) -> int:
        return len(self.x.meta["val"].shape)

    def _hand_over(self, outputs: list[fx.Node]) -> None:
        note = self.node.meta.get("fxcompress")
        if self.node.target is FUSED:
            outputs[0].meta.update(self.node.meta)
            self.node.replace_all_uses_with(outputs[0])
        else:
            for item in list(self.node.users):
                output = outputs[int(str(item.args[1]))]
                output.meta.update({**item.meta, **({"fxcompress": note} if note else {})})
                item.replace_all_uses_with(output)
                self.graph.erase_node(item)
        self.graph.erase_node(self.node)


@dataclass(frozen=True)
class Matrix:
    """A weight (out, in) and the bias that its product adds."""

    weight: Tensor
    bias: Tensor | None
    fours: Fours | None = None


def multiply(
    gm: fx.GraphModule, x: fx.Node, matrices: Sequence[Matrix], kernel: Kernel, few: Sequence[Bucket] = ()
) -> list[fx.Node]:
    """Insert the products of x with `matrices`, packed for `kernel`: one call if it is int8; `few` as in rules.py."""

    def keep(tensor: Tensor | None) -> fx.Node | None:
        if tensor is None:
            return None
        name = f"packed_{sum(1 for _ in gm.buffers(recurse=False))}"
        gm.register_buffer(name, tensor.detach().contiguous())
        return gm.graph.get_attr(name)

    graph = gm.graph
    if kernel == "int8":
        packed = [products.rounded_rows(m.weight) for m in matrices]
        codes = keep(torch.cat([codes for codes, _, _ in packed]))
        biases = [keep(None if m.bias is None else m.bias.float()) for m in matrices]
        args: tuple[Any, ...] = (x, codes, [keep(s) for _, s, _ in packed], [keep(r) for _, _, r in packed], biases)
        if few:
            ones = keep(torch.ones(sum(len(s) for _, s, _ in packed), dtype=torch.bfloat16))
            stored = [m.fours for m in matrices if m.fours] if any(b.kernel == "int4_weight" for b in few) else []
            four = tuple(map(keep, products.packed_fours(*_joined(stored)))) if stored else ()
            buckets = [(b.kernel, b.tokens) for b in few]
            args = (*args, buckets, ones, (*four, stored[0].group) if stored else None)
        call = graph.call_function(products.bucketed_linear if few else products.int8_linear, args)
        return [graph.call_function(operator.getitem, (call, i)) for i in range(len(matrices))]
    outputs = []
    for m in matrices:
        if kernel == "bf16":
            weight = keep(m.weight.to(torch.bfloat16))
            outputs.append(graph.call_function(products.bf16_linear, (x, weight, keep(m.bias))))
        else:
            outputs.append(graph.call_function(aten.linear.default, (x, keep(m.weight), keep(m.bias))))
    return outputs


def _joined(stored: Sequence[Fours]) -> tuple[Tensor, ...]:
    """Codes, scales and zeros of weights one below the other."""
    return tuple(torch.cat(parts) for parts in zip(*((f.codes, f.scales, f.zeros) for f in stored)))


def _kept(gm: fx.GraphModule, node: fx.Node) -> None:
    """A product the plan left dense."""
    x, weight, *bias = node.args
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    added = bias[0] if bias and isinstance(bias[0], fx.Node) else None
    kernel = kernel_of(attribute_of(weight).numel(), x.meta["val"].dtype, compressed=False)
    if kernel == "float" or (added is not None and added.op != "get_attr"):
        return
    matrix = Matrix(attribute_of(weight), None if added is None else attribute_of(added))
    with gm.graph.inserting_before(node):
        (output,) = multiply(gm, x, [matrix], kernel)
    output.meta.update(node.meta)
    node.replace_all_uses_with(output)
    gm.graph.erase_node(node)


def _lookup(gm: fx.GraphModule, node: fx.Node) -> None:
    """A compressed table: decoded, and packed so that a lookup is a gather and a multiplication."""
    assert isinstance(node.target, OpOverload)
    ids, *rest = node.args
    constants: Any = fx.map_arg((tuple(rest), node.kwargs), attribute_of)
    rows = len(constants[0][0])  # of the codes, or of the index of tiers
    parts = [products.packed_table(t) for t in table(node.target, rows, *constants)]
    codes, scales = (torch.cat(part) for part in zip(*parts))
    dtype = node.meta["val"].dtype
    names = []
    for tensor in (codes, scales):
        names.append(f"packed_{sum(1 for _ in gm.buffers(recurse=False))}")
        gm.register_buffer(names[-1], tensor)
    with gm.graph.inserting_before(node):
        args = (ids, gm.graph.get_attr(names[0]), gm.graph.get_attr(names[1]), dtype)
        output = gm.graph.call_function(products.gather, args)
    output.meta.update(node.meta)
    node.replace_all_uses_with(output)
    gm.graph.erase_node(node)


def _attend(gm: fx.GraphModule, node: fx.Node) -> None:
    """Attention without dropout, causality or shared heads, of four dimensions."""
    names = [a.name for a in aten.scaled_dot_product_attention.default._schema.arguments]
    given: dict[str, Any] = {**dict(zip(names, node.args)), **node.kwargs}
    q = given["query"].meta["val"]
    plain = not (given.get("dropout_p") or given.get("is_causal") or given.get("enable_gqa"))
    if not plain or q.dim() != 4 or not attends_in_bf16(q.dtype):
        return
    mask = given.get("attn_mask")
    if mask is not None and mask.meta["val"].dtype == torch.bool:
        made = [user for user in mask.users if user.target is pointwise.additive]
        with gm.graph.inserting_after(mask):
            mask = made[0] if made else gm.graph.call_function(pointwise.additive, (mask,))
        mask.meta.setdefault("val", given["attn_mask"].meta["val"].float())
    args = (given["query"], given["key"], given["value"], mask, given.get("scale"))
    with gm.graph.inserting_before(node):
        output = gm.graph.call_function(pointwise.attention, args)
    output.meta.update(node.meta)
    node.replace_all_uses_with(output)
    gm.graph.erase_node(node)


def _approximate(gm: fx.GraphModule, node: fx.Node) -> None:
    """GELU in float32 or less."""
    value = node.meta.get("val", node.args[0].meta.get("val"))  # type: ignore[union-attr]
    if isinstance(value, Tensor) and value.dtype == torch.float64:
        return
    node.target = pointwise.gelu
