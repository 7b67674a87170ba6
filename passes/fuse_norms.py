"""A norm before a product joins its node (the rules of fusing are told in fxcompress.passes.fuse).

    %n = aten.layer_norm(%h, [384], self.norm.weight, self.norm.bias)
    %q = fused(%n, [...], [], "linear(x, ...)")

        ->    %q = fused(%h, [self.norm.weight, self.norm.bias, ...], [],
                         "layer_norm(x, normalized_shape=[384], weight=..., bias=...) | linear(step[0], ...)")

A norm is a call of aten.layer_norm or aten.rms_norm, or the calls an RMSNorm is written out in (a power, its mean, what
follows pointwise): calls of one activation and constants, with a reduction over the last dimension among them, read by
each other and by one fused node alone. Where anything else reads the result as well, as in a model that normalises
after the residual, nothing is saved by moving it, and it stays.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from fxcompress.codegen.ops import fused
from fxcompress.codegen.spec import POINTWISE, ROWWISE, Argument, Call, Input, Value, after, is_literal, parse, type_of
from fxcompress.core.fusing import absorb, crosses_mutation
from fxcompress.core.surgery import attribute_of

FUSED, PARALLEL = fused.fused._opoverload, fused.fused_parallel._opoverload


def fold_norms(graph: fx.Graph) -> None:
    """Take every norm that one fused node alone reads into that node."""
    for node in [n for n in graph.nodes if n.target in (FUSED, PARALLEL)]:
        members = _norm_before(node)
        if members is not None:
            _fold(node, members)


def _norm_before(node: fx.Node) -> list[fx.Node] | None:
    """The calls of the norm whose result `node` reads as its x, in order; None where there is no such norm."""
    last = node.args[0]
    assert isinstance(last, fx.Node)
    if any(last in extras for extras in node.args[2:3]):  # type: ignore[operator]
        return None
    members: set[fx.Node] = set()
    waiting = [last]
    while waiting:  # latest first, so that all readers of a call are known when its turn comes
        waiting.sort()
        at = waiting.pop()
        if at not in members and _belongs(at) and all(user in members or user is node for user in at.users):
            members.add(at)
            waiting += [a for a in at.all_input_nodes if a.op != "get_attr"]
    sources = {a for at in members for a in at.all_input_nodes if a.op != "get_attr"} - members
    normalises = any(at.target in ROWWISE for at in members)
    if last not in members or len(sources) != 1 or not normalises or crosses_mutation(min(members), node):
        return None
    (source,) = sources
    same = [_shape(source) == _shape(at) for at in members if at.target in ROWWISE[:2]]
    return sorted(members) if _shape(source) == _shape(last) and all(same) else None


def _belongs(node: fx.Node) -> bool:
    """True for a pointwise call or a reduction of the last dimension, of activations and constants."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
        return False
    given = _given(node) if node.target in (*POINTWISE, *ROWWISE) else {"": object()}
    if not all(isinstance(value, fx.Node) or is_literal(value) for value in given.values()):
        return False
    if node.target is ROWWISE[2]:  # mean
        return given.get("dim") in ([-1], (-1,)) and given.get("keepdim") is True and given.get("dtype") is None
    return node.target not in ROWWISE or len(given["normalized_shape"]) == 1  # type: ignore[arg-type]


def _fold(node: fx.Node, members: Sequence[fx.Node]) -> None:
    spec = parse(str(node.args[3]))
    rows = {leaf.rows for leaf in spec.inputs}
    if len(rows) != 1:  # x as it is, and as a matrix: the norm would be made twice
        return
    x = next(a for at in members for a in at.all_input_nodes if a.op != "get_attr" and a not in members)
    tensors: list[fx.Node] = []
    step = {at: number for number, at in enumerate(members)}

    def argument(value: object) -> Argument:
        if not isinstance(value, fx.Node):
            return tuple(value) if isinstance(value, list) else value  # type: ignore[return-value]
        if value in step:
            return Value(step[value])
        if value is x:
            return Input(*rows)
        tensors.append(value)
        return type_of(attribute_of(value))

    calls = [Call.of(at.target, {k: argument(v) for k, v in _given(at).items()}) for at in members]  # type: ignore[arg-type]
    joined = after(calls, spec)
    absorb(node, (x, [*tensors, *node.args[1]], node.args[2], str(joined), *node.args[4:]), members)  # type: ignore[misc]


def _given(node: fx.Node) -> dict[str, object]:
    return {**dict(zip((a.name for a in node.target._schema.arguments), node.args)), **node.kwargs}  # type: ignore[union-attr]


def _shape(node: fx.Node) -> object:
    return node.meta["val"].shape
