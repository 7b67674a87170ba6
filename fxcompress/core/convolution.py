"""A convolution is a matrix product over patches.

    y[n, :, t] = W p[n, t] + b      W (out, channels prod(kernel))    the weight, flattened
                                    p[n, t]                           what the kernel covers at output position t

in 1, 2 or 3 dimensions. Border patches hold the zeros of the padding: they are inputs like any other, so every formula
for y = W x + b holds for convolutions with patches in place of x. Only groups = 1, not transposed; a grouped weight is
several matrices, each with inputs of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

aten = torch.ops.aten
PLAIN = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
TARGETS = (*PLAIN, aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding, aten.convolution.default)


@dataclass(frozen=True)
class Window:
    """Where a kernel is put: all that a patch depends on beside the input."""

    channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # zeros before and after, by dimension
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, node: fx.Node, shape: Sequence[int]) -> Window | None:
        """Of a call with a weight of `shape` (out, channels, *kernel); None where it is no convolution as above."""
        if node.target not in TARGETS or node.kwargs or len(shape) < 3:
            return None
        arguments = node.target._schema.arguments
        given = {a.name: a.default_value if i >= len(node.args) else node.args[i] for i, a in enumerate(arguments)}
        kernel, dims = tuple(shape[2:]), len(shape) - 2
        stride, dilation = (_each(given[name], dims) for name in ("stride", "dilation"))
        padding = _padding(given["padding"], kernel, dilation)
        numbers = (*stride, *dilation, *(p for pair in padding for p in pair))
        if given["groups"] != 1 or given.get("transposed") or not all(isinstance(n, int) for n in numbers):
            return None
        return cls(shape[1], kernel, stride, padding, dilation)

    @property
    def columns(self) -> int:
        """Length of a patch."""
        return self.channels * math.prod(self.kernel)

    def patches(self, x: Tensor) -> Tensor:
        """x (N, channels, *sizes), or without N -> (N, *positions, channels, *kernel), a view of padded x."""
        dims = len(self.kernel)
        x = x if x.dim() == dims + 2 else x.unsqueeze(0)
        view = F.pad(x, [zeros for pair in reversed(self.padding) for zeros in pair])
        for axis, (size, stride, dilation) in enumerate(zip(self.kernel, self.stride, self.dilation), start=2):
            view = view.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        return view.movedim(1, dims + 1)


def convolve(graph: fx.Graph, node: fx.Node, window: Window, matrix: fx.Node, bias: fx.Node | None) -> fx.Node:
    """Insert the convolution `node` is, with `matrix` (rows, columns) as its weight."""
    weight = graph.call_function(aten.view.default, (matrix, [-1, window.channels, *window.kernel]))
    return graph.call_function(node.target, (node.args[0], weight, bias, *node.args[3:]))  # type: ignore[arg-type]


def mix(graph: fx.Graph, x: fx.Node, window: Window, matrix: fx.Node, channels: int, bias: fx.Node | None) -> fx.Node:
    """Insert the 1 x 1 convolution of x (N, channels, *sizes), what `window` gave, with `matrix` (rows, channels)."""
    dims = len(window.kernel)
    weight = graph.call_function(aten.view.default, (matrix, [-1, channels, *[1] * dims]))
    return graph.call_function(PLAIN[dims - 1], (x, weight, bias))


def _each(value: Any, dims: int) -> tuple[Any, ...]:
    """One number for every dimension; ATen takes a single one for all."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * dims if len(values) == 1 else values


def _padding(value: Any, kernel: Sequence[int], dilation: Sequence[Any]) -> tuple[tuple[Any, Any], ...]:
    """Zeros before and after. "same" puts the odd one of an even kernel after."""
    if value == "valid":
        return ((0, 0),) * len(kernel)
    if value == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in _each(value, len(kernel)))
