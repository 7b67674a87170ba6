"""Several calls of a graph become one: the edit itself, and what an edit must never move a call across.

    %d = fxcompress.dequantize(self.up.codes, ...)
    %y = aten.linear(%x, %d, self.up.bias)             %z = fxcompress.fused(%x, [self.up.codes, ...], [], "...")
    %z = aten.gelu(%y)                         ->
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Collection, Sequence
from typing import Any

from torch import fx
from torch._ops import OpOverload

_FRAME = re.compile(r"\n(?= *File )")


def collapse(
    at: fx.Node,
    target: OpOverload,
    args: tuple[Any, ...],
    old: Collection[fx.Node],
    outputs: Sequence[fx.Node],
) -> list[fx.Node]:
    """Insert `target(*args)` before `at`; its results take the place of `outputs`, and what then has no reader of `old`
    is erased. get_attr nodes in `args` are read anew, since theirs may stand below. -> what took the outputs' place.

    One output: the call itself. Several: its items.
    """
    graph = at.graph
    with graph.inserting_before(at):
        call = graph.create_node("call_function", target, fx.node.map_arg(args, _read_again), name=target._opname)
        made = [call]
        if len(outputs) > 1:
            made = [graph.call_function(operator.getitem, (call, i)) for i in range(len(outputs))]
            call.meta["val"] = [output.meta.get("val") for output in outputs]
    told = provenance(sorted(old))
    for new, output in zip(made, outputs, strict=True):
        for key in ("val", "tensor_meta", "nn_module_stack"):
            if key in output.meta:
                new.meta[key] = output.meta[key]
        output.replace_all_uses_with(new)
    call.meta.update(told)
    reads = {read for node in old for read in node.all_input_nodes if read.op == "get_attr"}
    for node in sorted({*old, *reads}, reverse=True):
        if not node.users:
            graph.erase_node(node)
    return made


def absorb(node: fx.Node, args: tuple[Any, ...], members: Sequence[fx.Node]) -> None:
    """Give `node` the arguments with which it does the work of `members` as well, calls that stand above it; those that
    then have no reader are erased."""
    told = provenance([*members, node])
    node.args = args
    node.meta.update(told)
    for member in sorted(members, reverse=True):
        if not member.users:
            node.graph.erase_node(member)


def provenance(nodes: Sequence[fx.Node]) -> dict[str, str]:
    """What is told of the nodes, each thing once: the notes, and the stack traces, of each the frames that are new."""
    notes = [node.meta["fxcompress"] for node in nodes if "fxcompress" in node.meta]
    frames: list[str] = []
    before: list[str] = []
    for trace in dict.fromkeys(node.meta["stack_trace"] for node in nodes if node.meta.get("stack_trace")):
        now = _FRAME.split(trace.strip())
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, now))
        frames += now[len(list(same)) :]
        before = now
    told = {"fxcompress": "; ".join(dict.fromkeys(notes)), "stack_trace": "\n".join(f.rstrip() for f in frames)}
    return {key: text for key, text in told.items() if text}


def crosses_mutation(first: fx.Node, last: fx.Node) -> bool:
    """True if anything from `first` up to `last` may write to a tensor: a call must not move across it."""
    node = first
    while node is not last:
        if _mutates(node):
            return True
        node = node.next
    return False


def _mutates(node: fx.Node) -> bool:
    if node.op in ("placeholder", "get_attr"):
        return False
    if node.op != "call_function":  # methods and submodules: nobody knows
        return True
    if isinstance(node.target, OpOverload):
        return bool(node.target._schema.is_mutable)
    name = getattr(node.target, "__name__", "")
    harmless = getattr(node.target, "__module__", "") in ("_operator", "math")  # arithmetic on sizes
    return not harmless or name.startswith(("i", "set"))  # iadd, setitem


def _read_again(node: fx.Node) -> fx.Node:
    if node.op != "get_attr":
        return node
    copy = node.graph.get_attr(str(node.target))
    copy.meta.update(node.meta)
    return copy
