"""Does an attention mask depend on the query? A proof over the graph, for every input and every length.

A mask (..., m, n) that hides keys alone (padding) says the same to all m queries, although frameworks build it n x n.
Evaluating it on examples proves nothing: a window of 128 positions looks like no window on shorter texts. So each node
of the mask's subgraph is given the dimensions, counted from the last, along which its value may vary at all:

    arange                    -1, and it is never negative
    full, ones, zeros         none
    x >= c                    none where x is known to be at least c: how "every query exists" is written
    pointwise, cast, expand   those of its arguments
    unsqueeze, slice, select  those of its argument, moved
    x[i, j, ...]              those of the indices, where there is one for each dimension of x
    anything else, inputs     all whose size is not 1

What is overwritten in place elsewhere has no proof.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

aten = torch.ops.aten

_CONSTANT = ("full", "full_like", "ones", "ones_like", "zeros", "zeros_like", "new_full", "new_ones", "new_zeros",
             "scalar_tensor")  # fmt: skip
# Elementwise, but without the tag torch has for that.
_ELEMENTWISE = ("to", "_to_copy", "clone", "contiguous", "expand", "alias", "detach", "lift_fresh_copy", "slice",
                "__and__", "__or__", "__xor__", "where", "masked_fill")  # fmt: skip
_KEEPS_ORDER = ("to", "_to_copy", "clone", "contiguous", "expand", "alias", "detach", "slice", "unsqueeze", "select")


class _Fact(NamedTuple):
    """varies: negative dimensions; low: no element is smaller."""

    varies: frozenset[int]
    low: float = -math.inf


def ignores_queries(mask: fx.Node) -> bool:
    """True where every row of `mask` (..., m, n) along dimension -2 is proven to be the same."""
    nodes = ancestors(mask)
    if any(_overwritten_elsewhere(node) for node in nodes):
        return False
    facts: dict[fx.Node, _Fact] = {}
    for node in mask.graph.nodes:
        if node in nodes and _shape(node) is not None:
            fact = _fact(node, facts)
            facts[node] = fact._replace(varies=fact.varies & _all(node))
    return -2 not in facts[mask].varies


def ancestors(node: fx.Node) -> set[fx.Node]:
    """`node` and everything it is computed from."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        if (next_ := waiting.pop()) not in found:
            found.add(next_)
            waiting += next_.all_input_nodes
    return found


def _fact(node: fx.Node, facts: dict[fx.Node, _Fact]) -> _Fact:
    unknown = _Fact(_all(node))
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in node.target.tags:
        return unknown
    name, args = node.target._schema.name.removeprefix("aten::"), node.args
    name = name if name.endswith("__") else name.removesuffix("_")  # add_ is add, __and__ is itself
    given = [facts[a] for a in node.all_input_nodes if a in facts]
    low = given[0].low if name in _KEEPS_ORDER and given and not _narrows(node) else -math.inf
    if name == "arange":
        start = args[0] if len(args) > 1 else 0
        rising = len(args) < 3 or (isinstance(args[2], int) and args[2] > 0)
        return _Fact(frozenset({-1}), start if rising and isinstance(start, int) else -math.inf)
    if name in _CONSTANT:
        return _Fact(frozenset())
    if name in ("ge", "gt", "lt", "le") and _decided(name, args, facts):
        return _Fact(frozenset())
    if name == "index":
        return _indexed(node, facts) or unknown
    if name in ("unsqueeze", "select") and len(args) > 1:
        return _Fact(_moved(node, name, given[0].varies), low) if len(given) == 1 else unknown
    if name == "add" and len(args) == 2 and len(given) == 1 and isinstance(args[1], int) and not node.kwargs:
        return _Fact(given[0].varies, given[0].low + args[1])
    if name in _ELEMENTWISE or torch.Tag.pointwise in node.target.tags:
        return _Fact(frozenset[int]().union(*(f.varies for f in given)), low)
    return unknown


def _decided(name: str, args: tuple[Any, ...], facts: dict[fx.Node, _Fact]) -> bool:
    """A comparison of x with a number that x's lower bound settles for all of x."""
    x, number = args
    if not isinstance(number, int | float) or x not in facts:
        return False
    return facts[x].low >= number if name in ("ge", "lt") else facts[x].low > number


def _indexed(node: fx.Node, facts: dict[fx.Node, _Fact]) -> _Fact | None:
    source, indices = node.args
    assert isinstance(source, fx.Node)
    assert isinstance(indices, list | tuple)
    whole = len(indices) == len(_shape(source) or ()) and all(i in facts for i in indices)
    if not whole or any(_value(i).dtype in (torch.bool, torch.uint8) for i in indices):  # those select, not look up
        return None
    return _Fact(frozenset[int]().union(*(facts[i].varies for i in indices)))  # type: ignore[index]


def _moved(node: fx.Node, name: str, varies: frozenset[int]) -> frozenset[int]:
    """Where the argument's dimensions are after one was put in, or taken out."""
    rank, at = len(_shape(node) or ()), int(node.args[1])  # type: ignore[arg-type]
    longer = rank if name == "unsqueeze" else rank + 1
    at = at if at < 0 else at - longer  # of the longer of the two shapes, from its end
    if name == "unsqueeze":
        return frozenset(d if d > at else d - 1 for d in varies)
    return frozenset(d if d > at else d + 1 for d in varies if d != at)


def _narrows(node: fx.Node) -> bool:
    """A cast after which a lower bound may not hold: to bool, or to an integer that wraps around."""
    return _value(node).dtype not in (torch.int64, torch.float32, torch.float64)


def _overwritten_elsewhere(node: fx.Node) -> bool:
    """Something writes into the tensor, or a view of it, other than as the only step between two nodes."""
    waiting, seen = [node], set[fx.Node]()
    while waiting:
        tensor = waiting.pop()
        seen.add(tensor)
        for user in tensor.users:
            how = _aliasing(user, tensor)
            if how == "write" and not (len(tensor.users) == 1 and _private(tensor)):
                return True
            if how and user not in seen:
                waiting.append(user)
    return False


def _private(tensor: fx.Node) -> bool:
    """No other node can see its memory."""
    shared = [(a, how) for a in tensor.all_input_nodes if (how := _aliasing(tensor, a))]
    return tensor.op == "call_function" and all(
        how == "write" and len(a.users) == 1 and _private(a) for a, how in shared
    )


def _aliasing(user: fx.Node, tensor: fx.Node) -> str:
    """"write" where `user` overwrites `tensor`, "view" where its answer may share memory with it, otherwise ""."""
    if not isinstance(user.target, torch._ops.OpOverload):
        return ""
    found = ""
    for argument, schema in zip(user.args, user.target._schema.arguments):
        listed = argument if isinstance(argument, list | tuple) else (argument,)
        if schema.alias_info is not None and any(a is tensor for a in listed):
            found = "write" if schema.alias_info.is_write else found or "view"
    return found


def _value(node: Any) -> Tensor:
    value = node.meta.get("val")
    assert isinstance(value, Tensor)
    return value


def _shape(node: fx.Node) -> torch.Size | None:
    value = node.meta.get("val")
    return value.shape if isinstance(value, Tensor) else None


def _all(node: fx.Node) -> frozenset[int]:
    """Every dimension whose size is not the number 1."""
    shape = _shape(node) or ()
    return frozenset(d - len(shape) for d, size in enumerate(shape) if not (isinstance(size, int) and size == 1))
