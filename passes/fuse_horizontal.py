"""Fused nodes that share their input become one node of several outputs (the rule is told in fxcompress.passes.fuse).

    %q = fused(%h, [...], [], "linear(x, ...)")
    %k = fused(%h, [...], [], "linear(x, ...)")     ->     fused_parallel(%h, [... ...], [],
    %v = fused(%h, [...], [], "linear(x, ...)")                "linear(x, ...) | ... | outputs(step[0], step[1], _)")
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx
from torch._ops import OpOverload

from fxcompress.codegen.ops import fused
from fxcompress.codegen.spec import beside, parse
from fxcompress.core.fusing import collapse, crosses_mutation

aten = torch.ops.aten
FUSED, PARALLEL = fused.fused._opoverload, fused.fused_parallel._opoverload
_PRODUCTS = (
    aten.addmm.default, aten.baddbmm.default, aten.bmm.default, aten.conv1d.default, aten.conv2d.default,
    aten.convolution.default, aten.einsum.default, aten.linear.default, aten.matmul.default, aten.mm.default,
    aten.scaled_dot_product_attention.default,
)  # fmt: skip


def merge_parallel(graph: fx.Graph) -> None:
    """Make one node of each run of fused nodes on one input."""
    by_input: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=FUSED):
        by_input.setdefault(node.args[0], []).append(node)
    for nodes in by_input.values():
        run = nodes[:1]
        for node in nodes[1:]:
            if not _can_join([*run, node]):
                _merge(run)
                run = []
            run.append(node)
        _merge(run)


def _can_join(run: Sequence[fx.Node]) -> bool:
    """True if all of `run` can be computed before the first reader of any of them, with no other product between.

    The last condition keeps outputs short-lived: keys and values of every decoder layer read the same encoder output.
    """
    at = _first_reader(run)
    if at is None or crosses_mutation(run[0], max(at, run[-1])):
        return False
    if any(extra in run or not extra < at for node in run for extra in _extras(node)):
        return False
    node = run[0]
    while node is not run[-1]:
        if node not in run and _is_product(node):
            return False
        node = node.next
    return True


def _merge(run: Sequence[fx.Node]) -> None:
    if len(run) < 2:
        return
    at = _first_reader(run)
    assert at is not None
    extras = list(dict.fromkeys(extra for node in run for extra in _extras(node)))
    numbers = [tuple(extras.index(extra) for extra in _extras(node)) for node in run]
    spec = beside([parse(str(node.args[3])) for node in run], numbers)
    tensors = [tensor for node in run for tensor in node.args[1]]  # type: ignore[union-attr]
    names = ", ".join(str(name) for node in run for name in node.args[4:])
    collapse(at, PARALLEL, (run[0].args[0], tensors, extras, str(spec), names), run, run)


def _first_reader(run: Sequence[fx.Node]) -> fx.Node | None:
    return min((user for node in run for user in node.users), default=None)


def _extras(node: fx.Node) -> list[fx.Node]:
    return list(node.args[2])  # type: ignore[arg-type]


def _is_product(node: fx.Node) -> bool:
    own = isinstance(node.target, OpOverload) and node.target.namespace == "fxcompress"
    return own or node.target in _PRODUCTS
