"""The call that Dynamo compiles, seen from its backend.

Dynamo says where each input of a graph comes from: `L['self']._modules['up']._parameters['weight']`, an expression in
the variables L and the globals G of the frame, which it evaluates itself to guard the graph.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch._dynamo.symbolic_convert import InstructionTranslator


@dataclass(frozen=True, eq=False)
class Frame:
    """What the sources speak of."""

    names: Mapping[str, Mapping[str, Any]]  # L: its variables, G: the globals it sees
    code: types.CodeType

    @classmethod
    def current(cls) -> Frame:
        """Raises `RuntimeError` outside of Dynamo."""
        root = InstructionTranslator.current_tx().output.root_tx
        return cls({"L": root.f_locals, "G": root.f_globals}, root.f_code)

    @property
    def is_resumed(self) -> bool:
        """True for what comes after a graph break."""
        return self.code.co_name.startswith("torch_dynamo_resume_in")

    def owners(self, gm: fx.GraphModule) -> list[nn.Module]:
        """The outermost modules that own the graph's parameters."""
        found: dict[int, nn.Module] = {}
        for node in gm.graph.find_nodes(op="placeholder"):
            name = source_of(node)
            if "._parameters[" in name:
                module = eval(re.split(r"\._(?:modules|parameters)\[", name)[0], dict(self.names))
                found.setdefault(id(module), module)
        return [*found.values()]

    def call_of(self, model: nn.Module) -> dict[str, Tensor] | None:
        """The tensors `model` is called with, by the names of its forward, where this is its call."""
        values, names, code = self.names["L"], self.code.co_varnames, self.code
        wrapped = code.co_freevars == ("fn",) and values.get("fn") is model  # how Dynamo calls torch.nn's own classes
        if not wrapped and (not names or values.get(names[0]) is not model):
            return None
        at = code.co_argcount + code.co_kwonlyargcount
        given = {name: values.get(name) for name in names[not wrapped : at]}
        if code.co_flags & inspect.CO_VARARGS:
            given.update(zip(inspect.signature(model.forward).parameters, values[names[at]]))
            at += 1
        if code.co_flags & inspect.CO_VARKEYWORDS:
            given.update(values[names[at]])
        return {name: value for name, value in given.items() if isinstance(value, Tensor)} or None


def source_of(node: fx.Node) -> str:
    """Where an input comes from; "" where Dynamo does not say."""
    name = getattr(getattr(node.meta.get("grapharg"), "source", None), "name", "")
    return str(name() if callable(name) else name)  # torch 2.11 has a method, 2.13 a property


def inputs_of(gm: fx.GraphModule, model: nn.Module) -> dict[int, str] | None:
    """Which inputs of the graph are arguments of the model's forward, and their names there; None where some tensor
    is neither that nor the model's own (a cache that a step before left)."""
    order, found = [*inspect.signature(model.forward).parameters], dict[int, str]()
    for at, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        source, value = source_of(node), node.meta.get("example_value")
        if not isinstance(value, Tensor) or "._parameters[" in source or "._buffers[" in source:
            continue
        named = re.fullmatch(r"L(?:\['kwargs'\])?\['(\w+)'\]", source)
        numbered = re.fullmatch(r"L\['args'\]\[(\d+)\]", source)
        name = named[1] if named else order[int(numbered[1])] if numbered else ""
        if name not in order:
            return None
        found[at] = name
    return found
