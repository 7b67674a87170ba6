"""A leaf of a module tree whose weight is kept as a recipe says.

    Linear(64, 172)   ->   CompressedLinear(64, 172, quantize{bits=4, group_size=64})

It keeps its class as a base, its attributes and its hooks. Its forward is that of the compiled graph at this place: the
leaf is written as a graph of one product, and the surgery of `compile` (fxcompress.core.surgery) is done on that.
`weight` is read back whenever something asks for it, and held by nobody.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from fxcompress.core.errors import PlanError
from fxcompress.core.site import Site, find_sites
from fxcompress.core.surgery import finish
from fxcompress.passes import REWRITES
from fxcompress.passes.fuse import FUSED, fuse_here
from fxcompress.passes.recipe import Recipe, parse

aten = torch.ops.aten
BODY = "_fxcompress_body"  # in the leaf's __dict__, beside whatever its class keeps there
CONVOLUTIONS = {nn.Conv1d: aten.conv1d, nn.Conv2d: aten.conv2d, nn.Conv3d: aten.conv3d}


def swap(module: nn.Module, recipe: Recipe, tensors: Mapping[str, Tensor]) -> None:
    """Put `tensors` of `recipe`, and a "bias" where it has one, in place of the module's weight; on meta, too."""
    base, weight = type(module), module.get_parameter("weight")
    body, found = Body.of(base, module, recipe, tensors, hollow(weight))
    del module._parameters["weight"]
    for name, tensor in found.items():
        module._parameters.pop(name, None)
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(name, tensor)
        else:
            module.register_buffer(name, tensor)
    _become(module, base, body)


@dataclass(frozen=True, eq=False)
class Body:
    """What a leaf computes, and how its weight is read."""

    forward: Callable[[Any, Tensor], Tensor]  # (leaf, x) -> y, generated
    recipe: Recipe
    site: Site  # sizes alone: its weight is on meta

    @classmethod
    def of(
        cls, base: type[nn.Module], leaf: nn.Module, recipe: Recipe, tensors: Mapping[str, Tensor], weight: Tensor
    ) -> tuple[Body, dict[str, Tensor]]:
        """-> (body, `tensors` as the leaf shall hold them). leaf: the rest of what a `base` knows. weight: what it had,
        on meta."""
        gm, site = alone(base, leaf, recipe, tensors, weight)
        for node in gm.graph.find_nodes(op="call_function", target=FUSED):
            node.update_arg(4, f"a {base.__name__} of {' x '.join(map(str, weight.shape))}")  # what warnings call it
        gm.recompile()
        found = {name: getattr(gm, name) for name in tensors if hasattr(gm, name)}  # a table reads no bias of its head
        gm._parameters.clear()  # the site knows its graph, which would hold them where the leaf has moved on
        gm._buffers.clear()
        return cls(type(gm).forward, recipe, site), found

    def weight(self, leaf: nn.Module) -> Tensor:
        """As it is read back, in the shape of the original."""
        return self.site.stored(self.recipe.of(self.site, self.tensors(leaf)).read(self.site))

    def tensors(self, leaf: nn.Module) -> dict[str, Tensor]:
        """What the leaf holds in place of its weight, by name."""
        return {name: getattr(leaf, name) for name in self.recipe.names(self.site)}


class Compressed(nn.Module):
    """A leaf whose weight is kept as a recipe says. Stands between the leaf's own class and torch's."""

    original: ClassVar[type[nn.Module]]  # the class it had

    def forward(self, input: Tensor) -> Tensor:
        """What the leaf computed, of what is left of its weight."""
        return self._body.forward(self, input)

    @property
    def _body(self) -> Body:
        body: Body = self.__dict__[BODY]
        return body

    @property
    def weight(self) -> nn.Parameter:
        """Read back anew each time, without a gradient. A parameter, as callers expect, but none of the module's."""
        weight = nn.Parameter(self._body.weight(self).detach(), requires_grad=False)
        weight._is_hf_initialized = True  # type: ignore[attr-defined]  # or from_pretrained would draw one
        return weight

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What it holds in place of its weight, by name; the bias is none of them."""
        return self._body.tensors(self)

    @property
    def spec(self) -> str:
        """The rewrite, as plans name it."""
        return str(self._body.recipe)

    def extra_repr(self) -> str:
        own = super().extra_repr()
        return f"{own}, {self.spec}" if own else self.spec

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":
            return super().__setattr__(name, value)
        if not (isinstance(value, Tensor) and value.shape == self.weight.shape and torch.equal(value, self.weight)):
            raise PlanError(
                f"the weight of a {type(self).__name__} is kept as {self.spec} and cannot be set. Set that of the "
                "original model and compress it again."
            )  # the one it has: transformers ties weights whenever a model is saved, moved or resized

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for name, tensor in [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]:
            wanted = fn(tensor.new_empty(0)).dtype
            if wanted != tensor.dtype:
                raise PlanError(
                    f"{name} of a {type(self).__name__} cannot be cast from {tensor.dtype} to {wanted}: its answers "
                    f"are {self._body.site.weight.dtype}. Cast the original model and compress that."
                )
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {key: value for key, value in self.__dict__.items() if key != BODY}
        site = self._body.site
        shape = tuple(site.stored(site.weight).shape)
        return _restored, (self.original, self.spec, shape, site.weight.dtype, state)


def _restored(
    base: type[nn.Module], spec: str, shape: tuple[int, ...], dtype: torch.dtype, state: dict[str, Any]
) -> nn.Module:
    leaf = base.__new__(base)
    leaf.__dict__.update(state)
    recipe, tensors = parse(spec, REWRITES), {**leaf._parameters, **leaf._buffers}
    known = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    body, _ = Body.of(base, leaf, recipe, known, torch.empty(shape, dtype=dtype, device="meta"))
    return _become(leaf, base, body)


def _become(leaf: nn.Module, base: Any, body: Body) -> nn.Module:
    leaf.__class__ = _class_of(base)
    leaf.__dict__[BODY] = body  # no submodule: its tensors are the leaf's
    return leaf


@functools.cache  # one class for all leaves of a kind
def _class_of(base: Any) -> Any:
    """`base` with `Compressed` in front of torch's class, so that a subclass which scales a lookup still does."""
    native: Any = native_of(base)
    assert native is not None
    bases = (Compressed, native) if base is native else (base, _class_of(native))
    return types.new_class(f"Compressed{base.__name__}", bases, exec_body=lambda ns: ns.update(original=base))


def native_of(kind: Any) -> type[nn.Module] | None:
    """The class it computes like; None where that is none which can be swapped."""
    known = {nn.Linear, nn.Embedding, *CONVOLUTIONS}
    return next((k for k in kind.__mro__ if k in known or _is_conv1d(k)), None)


def _is_conv1d(kind: type) -> bool:
    """transformers' Conv1D, a linear module that keeps (in, out)."""
    return (kind.__module__, kind.__qualname__) == ("transformers.pytorch_utils", "Conv1D")


def alone(
    base: type[nn.Module], leaf: Any, recipe: Recipe, tensors: Mapping[str, Tensor], weight: Tensor
) -> tuple[fx.GraphModule, Site]:
    """-> (the leaf as a graph of one fused node: on a GPU it runs the kernels of the compiled graph, its site)."""
    gm = _dense(base, leaf, weight)
    sites = find_sites(gm)
    if len(sites) != 1:
        raise PlanError(f"{recipe}: {leaf} computes no product that a rewrite could stand for.")
    recipe.of(sites[0], tensors).apply(gm, sites[0])
    finish(gm)
    fuse_here(gm)
    return gm, sites[0]


def _dense(base: type[nn.Module], leaf: Any, weight: Tensor) -> fx.GraphModule:
    """The leaf as a graph of one product, with `weight` (on meta) and its own bias."""
    native, graph, root = native_of(base), fx.Graph(), nn.Module()
    root.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    root.register_parameter("bias", leaf._parameters.get("bias"))
    x, w = graph.placeholder("x"), graph.get_attr("weight")
    b = None if root.bias is None else graph.get_attr("bias")
    seen = torch.empty(2, weight.shape[-1], dtype=weight.dtype, device="meta")
    if native is nn.Embedding:
        seen = torch.zeros(2, dtype=torch.int64, device="meta")
        y = graph.call_function(aten.embedding.default, (w, x))
    elif native in CONVOLUTIONS:
        if leaf.padding_mode != "zeros":
            raise PlanError(f"{leaf}: padding_mode={leaf.padding_mode!r} is done outside of the convolution.")
        seen = seen.new_empty(2, leaf.in_channels, *(64 for _ in leaf.kernel_size))
        named = isinstance(leaf.padding, str)
        target = CONVOLUTIONS[native].padding if named else CONVOLUTIONS[native].default
        padding = leaf.padding if named else [*leaf.padding]
        y = graph.call_function(target, (x, w, b, [*leaf.stride], padding, [*leaf.dilation], leaf.groups))
    elif native is nn.Linear:
        y = graph.call_function(aten.linear.default, (x, w, b))
    else:
        seen = seen.new_empty(2, weight.shape[0])
        y = graph.call_function(aten.linear.default, (x, graph.call_function(aten.t.default, (w,)), b))
    graph.output(y)
    gm = fx.GraphModule(root, graph)
    _describe(gm, seen)
    return gm


def _describe(gm: fx.GraphModule, x: Tensor) -> None:
    """`val` of every node, on meta."""
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            node.meta["val"] = x
        elif node.op == "get_attr":
            node.meta["val"] = hollow(getattr(gm, str(node.target)))
        elif node.op == "call_function":
            args = fx.map_arg(node.args, lambda a: a.meta["val"])
            node.meta["val"] = node.target(*args)


def hollow(tensor: Tensor) -> Tensor:
    """The same on meta."""
    return torch.empty_like(tensor, device="meta").detach()
