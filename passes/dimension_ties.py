"""What each op of a captured graph says about the dimensions it joins.

    tie       (a, b, …) ~ (c, d, …)    the flattened index of the dimensions on the left is that on the right, so what
                                       is cut out of one side is cut out of the other
    refusal   d: why                   nothing may be cut out of d

    pointwise            equal dimensions, broadcast ones left out
    view (…, 96)         96 ~ (3, 32) where the shapes say so; dynamic sizes pass through one to one
    split in n           whole ~ (n, part); n itself is refused, as is whatever is indexed, reduced or concatenated
    y = x W^T + b        y's last ~ W's rows ~ b;  x's last ~ W's columns
    attention            heads of q, k, v and out; a head of grouped keys ~ its share of q's; the rest is refused
    expand               a size of 1 that grows is new: it belongs to nobody yet

An op that is not listed refuses every dimension it touches. Only static sizes above 1 take part.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fxcompress.core.site import Site

aten = torch.ops.aten

_COPIES = (aten.to, aten._to_copy, aten.contiguous, aten.clone, aten.dropout, aten.detach, aten.alias, aten.where)
_VIEWS = (aten.view, aten.reshape, aten._unsafe_view, aten.unsqueeze, aten.squeeze, aten.flatten, aten.unflatten)
_MOVES = (aten.t, aten.transpose, aten.permute, aten.numpy_T, aten.mT)
_SPLITS = (aten.split, aten.split_with_sizes, aten.chunk)
_REDUCTIONS = (aten.softmax, aten._softmax, aten.log_softmax, aten.mean, aten.sum)
_NORMS = (aten.layer_norm, aten.rms_norm)

Size = Any  # int, or the sympy expression of a dynamic size


class Dim(NamedTuple):
    """One dimension of a value or of a stored tensor."""

    holder: str  # the node's name, or "self.path"
    axis: int


@dataclass
class Ties:
    """Everything the ops of one graph say."""

    sizes: dict[Dim, int] = field(default_factory=dict)
    ties: list[tuple[tuple[Dim, ...], tuple[Dim, ...]]] = field(default_factory=list)
    refusals: dict[Dim, str] = field(default_factory=dict)
    holders: dict[fx.Node, str] = field(default_factory=dict)

    def of(self, node: fx.Node) -> list[Dim | None]:
        """The dimensions of a node's value; None for one that takes no part."""
        holder = self.holders.get(node, node.name)
        dims: list[Dim | None] = []
        for axis, size in enumerate(_sizes(node)):
            takes_part = isinstance(size, int) and size > 1
            dims.append(Dim(holder, axis) if takes_part else None)
            if takes_part:
                self.sizes[Dim(holder, axis)] = size
        return dims

    def tie(self, left: Sequence[Dim | None], right: Sequence[Dim | None]) -> None:
        a, b = (tuple(d for d in side if d is not None) for side in (left, right))
        if not a or not b:
            return
        assert math.prod(self.sizes[d] for d in a) == math.prod(self.sizes[d] for d in b)
        self.ties.append((a, b))

    def pair(self, left: Sequence[Dim | None], right: Sequence[Dim | None]) -> None:
        """Tie one to one."""
        for a, b in zip(left, right):
            self.tie([a], [b])

    def refuse(self, dims: Sequence[Dim | None], why: str) -> None:
        for dim in dims:
            if dim is not None:
                self.refusals.setdefault(dim, why)


def stored(path: str) -> str:
    """The holder of a stored tensor."""
    return f"self.{path}"


def read_ties(gm: fx.GraphModule, sites: Sequence[Site]) -> Ties:
    """Every tie and refusal of the graph, in its order."""
    named = [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}  # tied tensors are one holder
    holder_of = {path: stored(first.setdefault(id(tensor), path)) for path, tensor in named}
    ties = Ties(holders={n: holder_of[str(n.target)] for n in gm.graph.find_nodes(op="get_attr")})
    linears = {use.node: site for site in sites if site.kind == "linear" for use in site.uses}
    for node in gm.graph.nodes:
        if node in linears:
            _linear(ties, node, linears[node])
        elif node.op == "call_function":
            _rule_of(node)(ties, node)
        elif node.op == "placeholder":
            ties.refuse(ties.of(node), "it is an input of the model")
        elif node.op == "output":
            for value in node.all_input_nodes:
                ties.refuse(ties.of(value), "it is an output of the model")
    return ties


def _rule_of(node: fx.Node) -> Callable[[Ties, fx.Node], None]:
    if node.target is operator.getitem:
        return _part
    lists = any(isinstance(n.meta.get("val"), list | tuple) for n in node.all_input_nodes)
    if lists or not isinstance(node.target, torch._ops.OpOverload):
        return _unknown
    packet = node.target.overloadpacket
    if torch.Tag.pointwise in node.target.tags or packet in _COPIES:
        return _pointwise
    return _RULES.get(packet, _unknown)


def _unknown(ties: Ties, node: fx.Node) -> None:
    for value in (node, *node.all_input_nodes):
        ties.refuse(ties.of(value), f"{_name(node)} may mix it")


def _pointwise(ties: Ties, node: fx.Node) -> None:
    for value in node.all_input_nodes:
        ties.pair(ties.of(value)[::-1], ties.of(node)[::-1])


def _linear(ties: Ties, node: fx.Node, site: Site) -> None:
    use = next(u for u in site.uses if u.node is node)
    x, y = ties.of(use.x), ties.of(node)
    sizes = {Dim(stored(site.paths[0]), axis): size for axis, size in enumerate(_stored_shape(site)) if size > 1}
    ties.sizes.update(sizes)
    rows, columns = (Dim(stored(site.paths[0]), axis) for axis in ((1, 0) if site.transposed else (0, 1)))
    ties.pair(x[:-1], y[:-1])
    ties.pair([y[-1], x[-1]], [rows, columns])
    if use.bias is not None:
        ties.pair(y[-1:], ties.of(use.bias))


def _reshaped(ties: Ties, node: fx.Node) -> None:
    """Groups of equal product, found from the right; whatever stands left of a dynamic size that changed is one."""
    before, after = (
        [(d, s) for d, s in zip(ties.of(n), _sizes(n)) if s != 1] for n in (node.all_input_nodes[0], node)
    )
    while before and after:
        left, right = [before.pop()], [after.pop()]
        while _product(left) != _product(right):
            smaller, rest = (left, before) if _less(left, right) else (right, after)
            if not _static(left + right) or not rest:  # what is left cannot be told apart
                for dim, _ in left + right + before + after:
                    ties.refuse([dim], f"{_name(node)} merges it with a dynamic size")
                return
            smaller.insert(0, rest.pop())
        ties.tie([d for d, _ in left], [d for d, _ in right])


def _moved(ties: Ties, node: fx.Node) -> None:
    (value,) = node.all_input_nodes
    x = ties.of(value)
    order = list(range(len(x)))
    if node.target is aten.permute.default:
        order = [int(axis) for axis in node.args[1]]  # type: ignore[union-attr, arg-type]
    elif node.target is aten.transpose.int:
        i, j = (int(axis) for axis in node.args[1:3])  # type: ignore[arg-type]
        order[i], order[j] = order[j], order[i]
    elif node.target is aten.mT.default:
        order[-1], order[-2] = order[-2], order[-1]
    else:
        order.reverse()
    ties.pair([x[axis] for axis in order], ties.of(node))


def _expanded(ties: Ties, node: fx.Node) -> None:
    x, y = ties.of(node.all_input_nodes[0]), ties.of(node)
    ties.pair(x[::-1], y[::-1])


def _part(ties: Ties, node: fx.Node) -> None:
    """One of n equal parts, or one index of an unbound dimension."""
    source = node.all_input_nodes[0]
    packet = getattr(source.target, "overloadpacket", None)
    if packet not in (*_SPLITS, aten.unbind) or not isinstance(source.meta.get("val"), list | tuple):
        return _unknown(ties, node)
    x, y = ties.of(source.all_input_nodes[0]), ties.of(node)
    at = _axis(source, 1 if packet is aten.unbind else 2, default=0, dims=len(x))
    if packet is aten.unbind:
        ties.refuse([x[at]], f"{_name(source)} takes single entries of it")
        return ties.pair(x[:at] + x[at + 1 :], y)
    ties.pair(x[:at] + x[at + 1 :], y[:at] + y[at + 1 :])
    count = len(source.meta["val"])
    if _sizes(source.all_input_nodes[0])[at] != count * _sizes(node)[at]:
        return ties.refuse([x[at], y[at]], f"{_name(source)} makes unequal parts of it")
    parts = Dim(f"{source.name}.parts", 0)
    if count > 1 and x[at] is not None:
        ties.sizes[parts] = count
        ties.refuse([parts], f"{_name(source)} takes single entries of it")
    ties.tie([x[at]], [parts, y[at]] if count > 1 else [y[at]])


def _split(ties: Ties, node: fx.Node) -> None:
    """What it does is said where the parts are taken."""
    if any(user.target is not operator.getitem for user in node.users):
        ties.refuse(ties.of(node.all_input_nodes[0]), f"{_name(node)} is read as a list")


def _sliced(ties: Ties, node: fx.Node) -> None:
    x, y = ties.of(node.all_input_nodes[0]), ties.of(node)
    at = _axis(node, 1, default=0, dims=len(x))
    sizes = _sizes(node.all_input_nodes[0]), _sizes(node)
    if sizes[0][at] != sizes[1][at]:
        ties.refuse([x[at], y[at]], f"{_name(node)} takes a part of it")
        x[at] = None
    ties.pair(x, y)


def _selected(ties: Ties, node: fx.Node) -> None:
    x = ties.of(node.all_input_nodes[0])
    at = _axis(node, 1, default=0, dims=len(x))
    ties.refuse([x[at]], f"{_name(node)} takes single entries of it")
    ties.pair(x[:at] + x[at + 1 :], ties.of(node))


def _joined(ties: Ties, node: fx.Node) -> None:
    y = ties.of(node)
    at = _axis(node, 1, default=0, dims=len(y))
    for value in node.all_input_nodes:
        x = ties.of(value)
        ties.refuse([x[at], y[at]], f"{_name(node)} joins it to another")
        ties.pair(x[:at] + x[at + 1 :], y[:at] + y[at + 1 :])


def _reduced(ties: Ties, node: fx.Node) -> None:
    x, y = ties.of(node.all_input_nodes[0]), ties.of(node)
    given = node.args[1] if len(node.args) > 1 else None
    listed = list(given) if isinstance(given, list | tuple) else [given]
    over = {axis % len(x) for axis in listed if isinstance(axis, int)} or set(range(len(x)))
    ties.refuse([x[axis] for axis in over], f"{_name(node)} reads all of it at once")
    ties.pair(x if len(x) == len(y) else [d for axis, d in enumerate(x) if axis not in over], y)


def _normed(ties: Ties, node: fx.Node) -> None:
    x, y = ties.of(node.all_input_nodes[0]), ties.of(node)
    ties.pair(x, y)
    ties.refuse(x[-len(node.args[1]) :], f"{_name(node)} reads all of it at once")  # type: ignore[arg-type]
    for value in node.all_input_nodes[1:]:
        ties.refuse(ties.of(value), f"{_name(node)} reads all of it at once")


def _contracted(ties: Ties, node: fx.Node) -> None:
    """(…, m, k) (…, k, n): two activations."""
    values, y = node.all_input_nodes, ties.of(node)
    if len(values) != 2 or any(len(_sizes(v)) < 2 for v in values):
        return _unknown(ties, node)
    a, b = (ties.of(v) for v in values)
    ties.refuse([a[-1], b[-2]], f"{_name(node)} sums over it")
    ties.pair(a[-2::-1], y[-2::-1])
    ties.pair(b[-3::-1], y[-3::-1])
    ties.tie([b[-1]], [y[-1]])


def _attention(ties: Ties, node: fx.Node) -> None:
    q, k, v = (ties.of(n) for n in node.args[:3])  # type: ignore[arg-type]
    y, why = ties.of(node), f"{_name(node)} works on it as a whole"
    for dims in (q, k, v, y):
        ties.refuse(dims[-2:], why)
    ties.pair(q[:-2], y[:-2])
    for index, dims in enumerate((k, v)):
        ties.pair(dims[-4::-1], y[-4::-1])
        few, many = dims[-3:-2], y[-3:-2]
        if few and many and few[0] and many[0] and ties.sizes[few[0]] < ties.sizes[many[0]]:  # enable_gqa
            share = Dim(f"{node.name}.share{index}", 0)
            ties.sizes[share] = ties.sizes[many[0]] // ties.sizes[few[0]]
            ties.tie([few[0], share], many)
        else:
            ties.pair(few, many)
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    if isinstance(mask, fx.Node):
        shape = ties.of(mask)
        ties.refuse(shape[-2:], why)
        ties.pair(shape[-3::-1], y[-3::-1])


def _looked_up(ties: Ties, node: fx.Node) -> None:
    ties.refuse(ties.of(node), f"{_name(node)} looks it up in a table")
    for value in node.all_input_nodes:
        ties.refuse(ties.of(value), f"{_name(node)} reads it")


def _size_read(ties: Ties, node: fx.Node) -> None:
    x = ties.of(node.all_input_nodes[0])
    ties.refuse([x[_axis(node, 1, default=0, dims=len(x))]], f"{_name(node)} reads its size")


_RULES: dict[Any, Callable[[Ties, fx.Node], None]] = {
    **dict.fromkeys(_VIEWS, _reshaped),
    **dict.fromkeys(_MOVES, _moved),
    **dict.fromkeys((*_SPLITS, aten.unbind), _split),
    **dict.fromkeys(_REDUCTIONS, _reduced),
    **dict.fromkeys(_NORMS, _normed),
    **dict.fromkeys((aten.matmul, aten.bmm), _contracted),
    aten.embedding: _looked_up,
    aten.expand: _expanded,
    aten.slice: _sliced,
    aten.select: _selected,
    aten.cat: _joined,
    aten.scaled_dot_product_attention: _attention,
    aten.sym_size: _size_read,
}


def _sizes(node: fx.Node) -> list[Size]:
    """int where static, else the expression; [] for what is no tensor."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return []
    expressions = [s.node.expr if isinstance(s, torch.SymInt) else s for s in value.shape]
    return [s if isinstance(s, int) else int(s) if s.is_Integer else s for s in expressions]


def _stored_shape(site: Site) -> tuple[int, int]:
    return (site.columns, site.rows) if site.transposed else (site.rows, site.columns)


def _product(dims: Sequence[tuple[Dim | None, Size]]) -> Size:
    return math.prod(size for _, size in dims)


def _static(dims: Sequence[tuple[Dim | None, Size]]) -> bool:
    return all(isinstance(size, int) for _, size in dims)


def _less(left: Sequence[tuple[Dim | None, Size]], right: Sequence[tuple[Dim | None, Size]]) -> bool:
    return _static([*left, *right]) and bool(_product(left) < _product(right))


def _axis(node: fx.Node, position: int, default: int, dims: int) -> int:
    """The dimension an op works along."""
    given = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
    assert isinstance(given, int)
    return given % dims


def _name(node: fx.Node) -> str:
    return f"{str(node.target).removeprefix('aten.').split('.')[0]} ({node.name})"
