"""Seconds of a graph on this CPU, from a profile's measurements alone: lowered, or as it was captured.

    eager       every node by itself: a library call, a pass over its elements, or a view, each with its dispatch
    inductor    library calls, and between two of them one compiled loop: its passes without launches, and a launch

    passes that only compute on what was just made (a + b of the loop's own values) cost a loop little; those that read
    another activation are "add".

Sizes become numbers first: the graph is walked with fake tensors of the sizes asked for, so every node's shapes are
those it will meet. A product whose kernel depends on the number of tokens is priced with the one that will run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fxcompress.codegen.cpu import pointwise, products
from fxcompress.codegen.cpu.lower import weight_bytes
from fxcompress.codegen.cpu.module import LoweredModule
from fxcompress.codegen.cpu.rules import Rule, attends_in_float, attends_in_full, kernel_at, kernels_of
from fxcompress.core.errors import InputError
from fxcompress.core.surgery import attribute_of
from fxcompress.cost_model.device import DeviceProfile, Target

aten = torch.ops.aten
_CHEAP = frozenset((
    "add", "sub", "rsub", "mul", "div", "neg", "relu", "clamp", "clamp_min", "abs", "where", "masked_fill", "pow",
    "rsqrt", "sqrt", "mean", "sum", "amax", "amin", "eq", "ne", "ge", "gt", "le", "lt", "logical_and", "logical_not",
    "bitwise_and", "__and__", "__or__", "maximum", "minimum", "square", "reciprocal", "expand", "cat", "stack",
    "cumsum", "index",
))  # fmt: skip
_CURVED = frozenset(("tanh", "sigmoid", "exp", "silu", "erf", "log", "sin", "cos", "softplus"))
_PASSES = {"layer_norm": "norm", "native_layer_norm": "norm", "rms_norm": "norm", "softmax": "softmax",
           "_softmax": "softmax", "gelu": "gelu", "to": "cast", "_to_copy": "cast", "embedding": "embedding",
           "contiguous": "copy", "clone": "copy", "reshape": "copy", "additive": "mul"}  # fmt: skip
_PRODUCTS = frozenset(("linear", "addmm", "mm", "matmul", "bmm", "baddbmm"))


@dataclass(frozen=True)
class Seconds:
    """nodes: {name: seconds} of every node that takes any. calls: the module's own, loops' launches among them."""

    total: float
    nodes: Mapping[str, float]
    calls: float

    def __float__(self) -> float:
        return self.total


def seconds_of(
    gm: fx.GraphModule | LoweredModule, profile: DeviceProfile, sizes: Mapping[str, int], target: Target | None = None
) -> Seconds:
    """One call of a graph: what `lower` returned, or a captured one, run with `target`. sizes: {symbol: number}."""
    if isinstance(gm, LoweredModule):
        target, gm = target or gm.target, gm.graph_module
    walk = _Walk(gm, profile, target or "inductor")
    with torch.no_grad():
        walk.run(sizes)
    calls = walk.overhead("call") + (walk.inputs - 1) * walk.overhead("input") + walk.reads * walk.overhead("attribute")
    if walk.target == "inductor":
        calls += walk.loops * walk.overhead("kernel")
    return Seconds(calls + sum(walk.found.values()), walk.found, calls)


def chain_seconds(
    products: Sequence[tuple[int, int, bool]],
    tokens: float,
    profile: DeviceProfile,
    *,
    target: Target = "inductor",
    dtype: torch.dtype = torch.float32,
    groups: Sequence[int | None] | None = None,
    working_set: float = 0,
) -> float:
    """Of products (rows, columns, compressed) one after the other, each by the kernel that `lower` gives it.

    groups: columns of a scale of each, where it is stored as codes of 4 bits or fewer. working_set: bytes of all the
    weights of the model, which pass through the cache between two calls.
    """
    total, rule = 0.0, Rule(profile, target, working_set)
    for at, (rows, columns, compressed) in enumerate(products):
        group = groups[at] if groups else None
        kernel = kernel_at(kernels_of(rows, columns, dtype, compressed, rule, group), tokens)
        total += profile.product_seconds(kernel, tokens, rows, columns, target=target, working_set=working_set)
    return total


class _Walk:
    """The nodes in order, with numbers for sizes."""

    def __init__(self, gm: fx.GraphModule, profile: DeviceProfile, target: Target) -> None:
        self.gm, self.profile, self.target = gm, profile, target
        self.found: dict[str, float] = {}
        self.loops, self.open = 0, False  # compiled loops; is one being written
        self.inputs, self.reads = 0, 0  # weights and buffers are read
        self.near: set[fx.Node] = set()  # made since the last library call
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.working_set = weight_bytes(gm)

    def run(self, sizes: Mapping[str, int]) -> None:
        made: dict[fx.Node, Any] = {}
        with self.mode:
            for node in self.gm.graph.nodes:
                if node.op == "placeholder":
                    made[node] = _numbered(node, sizes)
                    self.inputs += 1
                elif node.op == "get_attr":
                    value = attribute_of(node)
                    made[node] = self.mode.from_tensor(value)
                    self.reads += 1
                elif node.op == "call_function":
                    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: made[n])
                    made[node] = node.target(*args, **kwargs)
                    seconds = self._price(node, args, kwargs, made[node])
                    if seconds:
                        self.found[node.name] = seconds

    def overhead(self, name: str) -> float:
        return self.profile.overhead(f"{self.target}.{name}", self.working_set)

    def _price(self, node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> float:
        name = _name(node)
        if node.target in (products.int8_linear, products.bucketed_linear, products.bf16_linear, products.int8_dynamic):
            return self._product(node, args)
        if name in _PRODUCTS:
            return self._plain_product(name, args, out)
        if node.target is pointwise.attention:
            return self._attention(args)
        if name == "scaled_dot_product_attention":
            return self._flash(args, kwargs)
        if name in ("convolution", "conv2d", "conv1d"):
            return self._convolution(args, out)
        return self._pass(node, name, args, out)

    def _product(self, node: fx.Node, args: tuple[Any, ...]) -> float:
        x, weight = args[:2]
        tokens, columns = x.numel() // x.shape[-1], x.shape[-1]
        kernel = "int8"
        if node.target is products.bf16_linear:
            kernel = "bf16"
        elif node.target is products.bucketed_linear:
            kernel = next((name for name, most in args[5] if tokens <= most), "int8")
        before, after = ("round", "scale") if kernel == "int8" else ("cast", "cast")
        around = self._around(before, tokens, columns) + self._around(after, tokens, len(weight))
        return around + self._library(kernel, tokens, len(weight), columns)

    def _around(self, name: str, rows: float, columns: float) -> float:
        return self.profile.pass_seconds(name, rows, columns, self.target)

    def _library(self, kernel: str, tokens: float, rows: int, columns: int) -> float:
        """The call; the loop before it, with what it rounds, ends here, and one begins that scales."""
        if kernel != "float" or self.open:
            self.loops += 1
        self.near, self.open = set(), kernel != "float"
        return self.profile.bare_seconds(kernel, tokens, rows, columns, working_set=self.working_set)

    def _plain_product(self, name: str, args: tuple[Any, ...], out: Tensor) -> float:
        x, w = (args[1], args[2]) if name in ("addmm", "baddbmm") else args[:2]
        kernel = "bf16" if x.dtype == torch.bfloat16 else "float"
        columns = x.shape[-1]
        if w.dim() > 2:  # every one of a batch; half of what attention's two take
            heads, m, n = math.prod(out.shape[:-2]), out.shape[-2], out.shape[-1]
            self._closed()
            pair = self.profile.attention_seconds(f"products_{kernel}", heads, max(m, 1), min(columns, n))
            share: float = max(columns, n) / max(m, 1)
            return pair / 2 * share
        return self._library(kernel, x.numel() // columns, out.shape[-1], columns)

    def _closed(self) -> None:
        """A library call without passes of its own."""
        self.loops += self.open
        self.near, self.open = set(), False

    def _attention(self, args: tuple[Any, ...]) -> float:
        q, k = args[:2]
        heads, positions, size = q.shape[0] * q.shape[1], k.shape[2], q.shape[3]
        if not attends_in_full(positions):
            return self._flash(args, {})
        self.loops, self.near, self.open = self.loops + self.open, set(), True  # its own loops are in its seconds
        name = "compiled_short" if attends_in_float(q.shape[0], positions) else "compiled"
        share: float = q.shape[2] / max(positions, 1)
        return self.profile.attention_seconds(name, heads, positions, size) * share

    def _flash(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
        q, k = args[:2]
        mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
        causal = kwargs.get("is_causal", len(args) > 5 and args[5])
        name = "flash_causal" if causal else "flash" if mask is None else "flash_masked"
        self._closed()
        heads = q.shape[0] * q.shape[1]
        seconds = self.profile.attention_seconds(name, heads, k.shape[2], q.shape[3])
        return seconds * min(float(q.shape[2]) / float(k.shape[2]), 1.0)

    def _convolution(self, args: tuple[Any, ...], out: Tensor) -> float:
        """As the product of its patches."""
        weight = args[1]
        tokens = out.numel() // out.shape[1]
        return self._library("float", tokens, weight.shape[0], weight[0].numel())

    def _pass(self, node: fx.Node, name: str, args: tuple[Any, ...], out: Any) -> float:
        value = next((v for v in pytree.tree_leaves(out) if isinstance(v, Tensor)), None)
        if value is None:
            return self._view(name)
        read = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
        if any(v is value or v.untyped_storage()._cdata == value.untyped_storage()._cdata for v in read):
            self.near.update({node} if set(node.all_input_nodes) <= self.near else ())
            return self._view(name)
        largest = max([value, *read], key=Tensor.numel) if name in ("mean", "sum", "amax", "amin") else value
        columns = largest.shape[-1] if largest.dim() else 1
        rows = largest.numel() / max(columns, 1)
        what = self._kind(node, name, read, largest)
        if what is None:
            return self._view(name)
        self.near.add(node)
        self.open = True
        return self._around(what, rows, columns)

    def _kind(self, node: fx.Node, name: str, read: Sequence[Tensor], largest: Tensor) -> str | None:
        """The pass that a node is; None where it is nothing in a loop."""
        if node.target is products.gather:
            return "gather"
        if node.target is pointwise.gelu:
            return "quick_gelu" if self.target == "inductor" else "gelu"
        if name in _PASSES:
            what = _PASSES[name]
            if self.target == "inductor" and what in ("copy", "cast"):
                return None if what == "copy" else "mul"
            return what
        if name in _CURVED:
            return "tanh"
        full = [n for n in node.all_input_nodes if n not in self.near]
        whole = sum(t.numel() >= largest.numel() for t in read)
        if self.target == "eager":
            return "add" if whole > 1 else "mul"
        return "add" if whole > 1 and full else None if whole <= 1 and name in _CHEAP else "mul"

    def _view(self, name: str) -> float:
        """A dispatch, where nodes are dispatched."""
        return self.overhead("view") if self.target == "eager" and name != "getitem" else 0.0


def _name(node: fx.Node) -> str:
    target = node.target
    packet = getattr(target, "overloadpacket", None)
    return str(packet.__name__ if packet is not None else getattr(target, "__name__", target)).rstrip("_")


def _numbered(node: fx.Node, sizes: Mapping[str, int]) -> Any:
    """An input of the sizes asked for."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return value
    shape = []
    for size in value.shape:
        expr = size.node.expr if isinstance(size, torch.SymInt) else None
        if expr is None:
            shape.append(int(size))
            continue
        missing = [s.name for s in expr.free_symbols if s.name not in sizes]
        if missing:
            raise InputError(
                f"input {node.name} has a size {expr}, and no number is given for {', '.join(missing)}: "
                f"give sizes such as {{'{missing[0]}': 8}}."
            )
        shape.append(int(expr.subs({s: sizes[s.name] for s in expr.free_symbols})))
    return torch.empty(shape, dtype=value.dtype)
