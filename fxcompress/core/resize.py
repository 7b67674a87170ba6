"""Smaller tensors in the same graph: the other editor of graphs, beside fxcompress.core.surgery, which swaps calls.

    %y = linear(%x, self.c_fc.weight, self.c_fc.bias)    self.c_fc.weight (3072, 768) -> (2304, 768), bias alike
    %v = view(%y, [-1, 3072])                            view(%y, [-1, 2304])

Every call stays; what changes is stored tensors, the sizes written into views, splits and expansions, and `val`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.core.site import attribute

aten = torch.ops.aten
_SHAPED = (aten.view, aten.reshape, aten._unsafe_view, aten.expand)  # args[1] is the whole shape


def resize(gm: fx.GraphModule, tensors: Mapping[str, Tensor], sizes: Mapping[str, Mapping[int, int]]) -> None:
    """Put `tensors`, by attribute path, in place of larger ones; `finish` must follow.

    A tensor with several paths is named by one of them and replaced at all.
    sizes: by node name, the new size of each dimension that shrank; the caller has found all of them.
    """
    named = [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]
    shapes: dict[str, dict[int, int]] = {}
    for path, tensor in tensors.items():
        old = attribute(gm, path)
        new = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
        for alias in [name for name, other in named if other is old]:
            owner, _, leaf = alias.rpartition(".")
            setattr(gm.get_submodule(owner), leaf, new)
            shapes[alias] = dict(enumerate(new.shape))
    for node in gm.graph.nodes:
        mine = shapes.get(str(node.target)) if node.op == "get_attr" else sizes.get(node.name)
        if mine:
            value = node.meta["val"]
            node.meta["val"] = value.new_empty([mine.get(axis, size) for axis, size in enumerate(value.shape)])
            _rewrite_sizes(node, mine)


def _rewrite_sizes(node: fx.Node, sizes: Mapping[int, int]) -> None:
    """Sizes among the arguments; -1 and dynamic ones fit by themselves."""
    packet, args = getattr(node.target, "overloadpacket", None), _arguments(node)
    if packet in _SHAPED and isinstance(args[1], list | tuple):
        node.update_arg(1, _written(list(args[1]), sizes, first=0))
    elif packet is aten.unflatten:
        node.update_arg(2, _written(args[2], sizes, first=args[1] % len(_arguments(node)[0].meta["val"].shape)))
    elif node.target is operator.getitem:
        _rewrite_split(node, sizes)


def _written(shape: list[Any], sizes: Mapping[int, int], first: int) -> list[Any]:
    """`shape` holds the sizes of the dimensions from `first` on."""
    return [
        sizes.get(first + at, size) if isinstance(size, int) and size != -1 else size for at, size in enumerate(shape)
    ]


def _rewrite_split(part: fx.Node, sizes: Mapping[int, int]) -> None:
    """One of equal parts shrank, and so do its siblings."""
    source, index = _arguments(part)
    values = list(source.meta["val"])
    values[index] = part.meta["val"]
    source.meta["val"] = values
    args = _arguments(source)
    axis = (args[2] if len(args) > 2 else source.kwargs.get("dim", 0)) % len(part.meta["val"].shape)
    if axis in sizes and source.target is aten.split.Tensor:
        source.update_arg(1, sizes[axis])
    elif axis in sizes and source.target is aten.split_with_sizes.default:
        source.update_arg(1, [sizes[axis]] * len(values))


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    return node.args
