"""Fusion: a compressed product, the way its weights are kept and the pointwise calls that follow become one node.

    vertical    dequantize -> linear -> gelu -> + residual          fused(x, [codes, ..., bias], [residual], spec)
    horizontal  q(x), k(x), v(x)                                    fused_parallel(x, [...], [], spec) -> three outputs

The spec (fxcompress.codegen.spec) is printed from the calls that are folded, and the node's body calls them again in
their order, so the answer keeps its bits; a code generator makes one kernel of it.

A group begins with a product of x and constants, at least one of its ops fxcompress's own. It grows by pointwise calls
of the product's shape while everything it computes on the way is read inside it alone: its last call is the only one
anybody else sees. So nothing observable is folded away, and no cycle can arise. A second product of the same x that
only this group reads (up in silu(gate(x)) up(x); the low-rank correction beside a quantized weight) is taken in. What
another node reads, a call that writes in place between two members, a size or a device among the arguments, a result
that broadcasting made larger or left non-contiguous: each ends the growth there.

Fused nodes that share x then become one where nothing between them computes a product of anything else: each part
keeps its tensors as they are stored, and its output has memory of its own, so the strides its readers see are as
before. (One matrix of all rows would need one grid for all; one output, split, would hand on strided views.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxcompress.codegen.ops import OPS, fused
from fxcompress.codegen.spec import (
    OF_CONSTANTS,
    POINTWISE,
    PRODUCTS,
    ROWWISE,
    UNROWS,
    Argument,
    Call,
    Extra,
    Input,
    Spec,
    Value,
    is_literal,
    type_of,
)
from fxcompress.core.fusing import collapse, crosses_mutation
from fxcompress.core.signature import SignedModule
from fxcompress.core.surgery import attribute_of
from fxcompress.passes.fuse_horizontal import merge_parallel
from fxcompress.passes.fuse_norms import fold_norms

aten = torch.ops.aten
FUSED, PARALLEL = fused.fused._opoverload, fused.fused_parallel._opoverload
OWN = frozenset(op._opoverload for op in OPS) - {FUSED, PARALLEL}
HEADS = frozenset(op for op in OWN if op._schema.arguments[0].name == "x").union(PRODUCTS)
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def fuse(gm: SignedModule) -> SignedModule:
    """A copy of `gm` over the same tensors, with everything fused that can be; calls of no fxcompress op stay."""
    work = gm.copy()
    fuse_here(work)
    return work


def fuse_here(work: fx.GraphModule) -> None:
    """The same in place."""
    taken: set[fx.Node] = set()
    for node in list(work.graph.nodes):
        if node not in taken and _is_head(node):
            taken |= _collapse(node)
    merge_parallel(work.graph)
    fold_norms(work.graph)
    work.graph.eliminate_dead_code()
    work.graph.lint()
    work.recompile()


def _collapse(head: fx.Node) -> set[fx.Node]:
    """Fuse everything that goes with `head` -> the nodes that are gone."""
    x, members, last = _source(head), {head}, head
    while grown := _next_exit(members, last, x):
        members, last = grown
    writer = _Writer(x, members)
    spec = writer.spec()
    args = (x, writer.tensors, writer.extras, str(spec), _owners(writer.tensors))
    collapse(last, FUSED, args, members | writer.folded, [last])
    return members


def _owners(tensors: list[fx.Node]) -> str:
    """The modules the tensors belong to: how people call the node."""
    paths = (str(node.target) for node in tensors)
    return ", ".join(dict.fromkeys(path.rpartition(".")[0] or path for path in paths))


def _next_exit(members: set[fx.Node], last: fx.Node, x: fx.Node) -> tuple[set[fx.Node], fx.Node] | None:
    """The least addition to the group after which again one node alone is read outside, and that node.

    Its calls are taken in graph order, so all readers of a call come after it: when none but the newest call's own
    readers wait, the newest is the exit.
    """
    trial, waiting = set(members), set(last.users)
    while waiting:
        node = min(waiting)
        waiting.remove(node)
        if not _follows(node, trial, x):
            return None
        trial |= {node} | _own_products(node, trial, x)
        if not waiting and _is_contiguous(node) and not crosses_mutation(min(trial), node):
            return trial, node
        waiting |= node.users.keys()
    return None


def _follows(node: fx.Node, trial: set[fx.Node], x: fx.Node) -> bool:
    """True for a pointwise call, or a return to x's dimensions, that keeps the shape of what it reads of `trial`."""
    inside = [a for a in node.all_input_nodes if a in trial]
    if _returns_to(node, x):
        return True
    if node.target not in POINTWISE and not _is_identity(node) and not _is_norm(node, inside):
        return False
    given = _given(node).values()
    if not all(isinstance(a.meta.get("val"), Tensor) if isinstance(a, fx.Node) else is_literal(a) for a in given):
        return False
    return all(_same_shape(node, a) for a in inside)


def _own_products(node: fx.Node, trial: set[fx.Node], x: fx.Node) -> set[fx.Node]:
    """Other products of x, with the pointwise calls between, that are made for `node` alone."""
    found: set[fx.Node] = set()
    seen = {*trial, node}
    waiting = {a for a in node.all_input_nodes if a not in trial}
    while waiting:  # downwards, so that all readers of a call are known when its turn comes
        at = max(waiting)
        waiting.remove(at)
        if not all(user in seen for user in at.users):
            continue
        if _is_head(at) and _source(at) is x and _same_shape(at, node):
            found.add(at)
        elif _follows(at, seen, x) and not _returns_to(at, x) and _same_shape(at, node):
            waiting |= {a for a in at.all_input_nodes if a not in seen}
        else:
            continue
        seen.add(at)
    kept = set(found)
    for at in sorted(seen - trial - found - {node}):  # a chain that starts at no product of x stays outside
        if kept.intersection(at.all_input_nodes):
            kept.add(at)
    return kept


class _Writer:
    """Writes the members down as steps, and gathers what the node is to be given."""

    def __init__(self, x: fx.Node, members: set[fx.Node]) -> None:
        self.x, self.members = x, members
        self.tensors: list[fx.Node] = []
        self.extras: list[fx.Node] = []
        self.folded: set[fx.Node] = set()  # calls of constants, written inside the step that reads them
        self.step: dict[fx.Node, int] = {}

    def spec(self) -> Spec:
        steps: list[Call] = []
        for node in sorted(self.members):
            if _is_identity(node):
                self.step[node] = self.step[_first_input(node)]
                continue
            steps.append(self._unrows(node) if node.target in _RESHAPES else self._call(node))
            self.step[node] = len(steps) - 1
        return Spec(tuple(steps), (len(steps) - 1,))

    def _call(self, node: fx.Node) -> Call:
        assert isinstance(node.target, OpOverload)
        return Call.of(node.target, {name: self._argument(value, node) for name, value in _given(node).items()})

    def _unrows(self, node: fx.Node) -> Call:
        return Call(UNROWS, (Value(self.step[_first_input(node)]),))

    def _argument(self, value: object, reader: fx.Node) -> Argument:
        if isinstance(value, list | tuple):
            return tuple(self._argument(v, reader) for v in value)
        if not isinstance(value, fx.Node):
            return value  # type: ignore[return-value]  # is_literal
        if value in self.step:
            return Value(self.step[value])
        if value is self.x:
            return Input()
        if reader in self.members and _flattened(value) is self.x:
            self.folded.add(value)
            return Input(rows=True)
        if value.op == "get_attr":
            self.tensors.append(value)
            return type_of(attribute_of(value))
        if _is_constant(value):
            self.folded.add(value)
            return self._call(value)
        if value not in self.extras:
            self.extras.append(value)
        return Extra(self.extras.index(value))


def _is_head(node: fx.Node) -> bool:
    """True for a product of an activation and constants in which an fxcompress op takes part."""
    if node.op != "call_function" or node.target not in HEADS or not isinstance(node.meta.get("val"), Tensor):
        return False
    given = list(_given(node).values())
    nodes = {n for value in given for n in _nodes(value)}
    if not isinstance(given[0], fx.Node) or given[0].op == "get_attr" or given[0] in _nodes(given[1:]):
        return False
    known = (n.op == "get_attr" or _is_constant(n) or isinstance(n.meta.get("val"), Tensor) for n in nodes - {given[0]})
    if not all(known) or not all(is_literal(value) for value in given if not list(_nodes(value))):
        return False
    compressed = node.target in OWN or any(_is_constant(n) and _has_own(n) for n in nodes)
    return compressed and _is_contiguous(node) and not crosses_mutation(min({node, *filter(_is_constant, nodes)}), node)


def _source(head: fx.Node) -> fx.Node:
    """What the product reads, or that of which it reads the matrix of all rows."""
    x = _first_input(head)
    return _flattened(x) or x


def _flattened(node: fx.Node) -> fx.Node | None:
    """The node of which `node` is the matrix of all rows."""
    if node.target not in _RESHAPES:
        return None
    whole = _first_input(node)
    before, after = whole.meta.get("val"), node.meta.get("val")
    if whole.op == "get_attr" or not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return None
    return whole if after.dim() == 2 and _known_equal(before.shape[-1:], after.shape[-1:]) else None


def _returns_to(node: fx.Node, x: fx.Node) -> bool:
    """True for a reshape that gives a matrix of all rows the leading dimensions of x."""
    if node.target not in _RESHAPES:
        return False
    rows, made, like = (n.meta.get("val") for n in (_first_input(node), node, x))
    if not (isinstance(rows, Tensor) and isinstance(made, Tensor) and isinstance(like, Tensor)):
        return False
    return rows.dim() == 2 and _known_equal(made.shape, (*like.shape[:-1], rows.shape[-1]))


def _is_constant(node: fx.Node) -> bool:
    """True for a call of constants alone that one node reads: its reader can make it itself."""
    if node.op != "call_function" or node.target not in {*OWN, *OF_CONSTANTS, *POINTWISE} or len(node.users) != 1:
        return False
    values = list(_given(node).values())
    inputs = list(_nodes(values))
    literal = all(is_literal(value) for value in values if not list(_nodes(value)))
    return bool(inputs) and literal and all(n.op == "get_attr" or _is_constant(n) for n in inputs)


def _has_own(node: fx.Node) -> bool:
    return node.target in OWN or any(map(_has_own, node.all_input_nodes))


def _is_norm(node: fx.Node, inside: list[fx.Node]) -> bool:
    """True for a layer_norm or rms_norm of one call inside, over its last dimension, by constants."""
    if node.target not in ROWWISE[:2]:
        return False
    given = _given(node)
    others = [value for value in given.values() if isinstance(value, fx.Node) and value not in inside]
    return [given["input"]] == inside and len(given["normalized_shape"]) == 1 and all(  # type: ignore[arg-type]
        other.op == "get_attr" for other in others
    )


def _is_identity(node: fx.Node) -> bool:
    """Dropout that was captured in eval mode, and a cast to the dtype there is: they hand on what they are given."""
    if node.target is aten.dropout.default:
        return _given(node)["train"] is False
    if node.target is not aten.to.dtype or len(node.args) != 2 or node.kwargs:
        return False
    value = _first_input(node).meta.get("val")
    return isinstance(value, Tensor) and value.dtype == node.args[1]


def _given(node: fx.Node) -> dict[str, object]:
    """The arguments by their names in the schema."""
    assert isinstance(node.target, OpOverload)
    return {**dict(zip((a.name for a in node.target._schema.arguments), node.args)), **node.kwargs}


def _nodes(value: object) -> Iterator[fx.Node]:
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, list | tuple):
        for element in value:
            yield from _nodes(element)


def _first_input(node: fx.Node) -> fx.Node:
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    left, right = a.meta.get("val"), b.meta.get("val")
    return isinstance(left, Tensor) and isinstance(right, Tensor) and _known_equal(left.shape, right.shape)


def _known_equal(left: tuple[int | torch.SymInt, ...], right: tuple[int | torch.SymInt, ...]) -> bool:
    return len(left) == len(right) and all(statically_known_true(a == b) for a, b in zip(left, right))


def _is_contiguous(node: fx.Node) -> bool:
    """True if the strides are those of a contiguous tensor at every size; no guard is made of it."""
    value, stride = node.meta.get("val"), 1
    if not isinstance(value, Tensor):
        return False
    for size, found in zip(reversed(value.shape), reversed(value.stride())):
        if not statically_known_true(size == 1) and not statically_known_true(found == stride):
            return False
        stride = stride * size
    return True
