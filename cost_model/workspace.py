"""Memory that a call of aten needs for itself while it runs, beside its operands and results.

    attention      a boolean mask as numbers, and the logarithm of each row's sum of exponentials
    convolution    its input and its weight in the order of its vector units, then its result in that order
    max pooling    the place of each maximum
    layer norm     mean and deviation of each row

Bytes as torch 2.13 allocates them on a CPU (torch.profiler, tests/test_peak_memory.py); a GPU's libraries have
workspaces of their own. What is left out does not grow with the batch: a tile of attention scores a thread. Small
convolutions (kernels as large as their image, images of a few pixels) keep their order, and need less than this says;
at 224 x 224 pixels the peaks of ResNet-50, MobileNetV2 and a ViT are within 1.4 %.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import sympy
import torch

from fxcompress.cost_model.calls import Call

Workspace = Callable[[Call], tuple[sympy.Expr, ...]]


def workspace_of(call: Call) -> tuple[sympy.Expr, ...]:
    """Bytes at each of the moments of a call that can be its worst."""
    name = call.op._schema.name.removeprefix("aten::")
    return _TABLE[name](call) if name in _TABLE else ()


def _attention(call: Call) -> tuple[sympy.Expr, ...]:
    query, mask = call["query"], call["attn_mask"]
    converted = mask is not None and mask.dtype == torch.bool
    return (4 * query.rows + (mask.memory * query.dtype.itemsize if converted else 0),)


def _convolution(call: Call) -> tuple[sympy.Expr, ...]:
    return call["input"].bytes + call["weight"].bytes, call.out.bytes


def _max_pool(call: Call) -> tuple[sympy.Expr, ...]:
    return (8 * call.out.elements,)


def _norm(call: Call) -> tuple[sympy.Expr, ...]:
    return (2 * call.out.rows * call.out.dtype.itemsize,)


_TABLE: Mapping[str, Workspace] = {
    "scaled_dot_product_attention": _attention,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "max_pool2d": _max_pool,
    "layer_norm": _norm,
}
