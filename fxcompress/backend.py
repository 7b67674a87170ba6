"""torch.compile(model, backend="fxcompress", options={"budget": "4x", "calibration": batches})

    first graph         the model that owns its parameters is compressed whole, as `fxcompress.compile` does it
    every graph         parameters are replaced by the parts made of them, by identity (fxcompress.dynamo_graph)
    then                handed to Inductor, or run as it is

So prefill and decode graphs, graph breaks and recompilations for other shapes share one set of tensors, made once. All
that is kept from one graph to the next is in the `Session` of the options that torch.compile hands on each time.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import tracing
from torch._inductor.compile_fx import compile_fx

from fxcompress.api import compile
from fxcompress.checkpoint import load
from fxcompress.core.budget import Budget
from fxcompress.core.errors import BackendError
from fxcompress.core.plan import Plan
from fxcompress.core.signature import SignedModule
from fxcompress.dynamo_graph import rewritten
from fxcompress.parts import Part, parts_of

OPTIONS = ("budget", "calibration", "plan", "lower", "rewrites", "example_inputs", "progress")
LOWER = ("inductor", "eager")


def fxcompress(
    gm: fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend; torch.compile calls it with each graph and its options.

    options: `budget`, `calibration`, `rewrites`, `example_inputs` and `progress` as `fxcompress.compile` takes them;
        `plan`: a Plan, what `compile` or `load` returned, or the folder `save` wrote, whose tensors are taken;
        `lower`: "inductor" (the default) or "eager".

    Raises `BackendError` in training mode, with gradients, and for options that mean nothing; and what `compile`
    raises. torch.compile puts each into its own BackendCompilerFailed, with the text.
    """
    session = Session.of(options)
    parameters = [value for value in inputs if isinstance(value, nn.Parameter)]
    if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
        raise BackendError(
            "backend 'fxcompress' serves inference, and gradients are asked for: call the model under "
            "torch.no_grad() or torch.inference_mode(). To train compressed layers, use fxcompress.restructure."
        )
    if any(id(p) not in session.seen for p in parameters):
        session.learn(gm)
        session.seen.update({id(p): p for p in parameters})
    work = rewritten(gm, inputs, session.part_of)
    lowered = compile_fx(work, list(inputs)) if session.lower == "inductor" else work.forward
    assert callable(lowered)
    return lowered


@dataclass(eq=False)
class Session:
    """What one call of torch.compile has compressed so far."""

    options: Mapping[str, Any]  # held, so that its id stays its own
    seen: dict[int, Tensor] = field(default_factory=dict)  # parameters by id, held for the same reason
    part_of: dict[int, Part] = field(default_factory=dict)

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> Session:
        """The one of these options. Raises `BackendError`."""
        options = {} if options is None else options
        if id(options) in _SESSIONS:
            return _SESSIONS[id(options)]
        unknown = [name for name in options if name not in OPTIONS]
        if unknown:
            raise BackendError(f"backend 'fxcompress' has no option {unknown[0]!r}; it takes {', '.join(OPTIONS)}.")
        if options.get("budget") is None and options.get("plan") is None:
            raise BackendError(
                "backend 'fxcompress' needs to know how small: "
                'torch.compile(model, backend="fxcompress", options={"budget": "4x"}), or a "plan".'
            )
        if options.get("lower", LOWER[0]) not in LOWER:
            raise BackendError(f"option lower={options['lower']!r}: allowed are {' and '.join(map(repr, LOWER))}.")
        return _SESSIONS.setdefault(id(options), cls(options))

    @property
    def lower(self) -> str:
        """ "inductor" or "eager"."""
        return str(self.options.get("lower", LOWER[0]))

    def learn(self, gm: fx.GraphModule) -> None:
        """Compress the models that own the parameters of a graph."""
        frame = Frame.current()
        for model in frame.owners(gm):
            parameters = dict(model.named_parameters(remove_duplicate=False))
            if all(id(p) in self.seen for p in parameters.values()):
                continue
            if model.training:
                raise BackendError(
                    f"backend 'fxcompress' serves inference, and {type(model).__name__} is in training mode: call "
                    "model.eval() first."
                )
            with _apart():
                parts = self._parts(model, frame.call_of(model))
            for part in parts:
                self.part_of[id(parameters[_path(part.site, parameters)])] = part
            self.seen.update({id(p): p for p in parameters.values()})

    def _parts(self, model: nn.Module, call: dict[str, Any] | None) -> list[Part]:
        plan, budget = self.options.get("plan"), self.options.get("budget")
        if isinstance(plan, str | Path):
            plan = load(plan)
        if isinstance(plan, SignedModule):
            return parts_of(plan)
        if not (plan is None or isinstance(plan, Plan)):
            raise BackendError(f"option plan is a {type(plan).__name__}; give a Plan, a compiled graph or a folder.")
        if plan is None and budget is not None and Budget.parse(budget).as_it_is:
            return []
        calibration, example = self.options.get("calibration"), self.options.get("example_inputs")
        if example is None and calibration is None:
            example = call
        compiled = compile(
            model, budget, plan=plan, calibration=calibration, example_inputs=example,
            rewrites=self.options.get("rewrites"), progress=self.options.get("progress", False),
        )  # fmt: skip
        return parts_of(compiled)


_SESSIONS: dict[int, Session] = {}


def _path(site: str, parameters: Mapping[str, Tensor]) -> str:
    return f"{site}.weight" if f"{site}.weight" in parameters else site


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Outside of what the caller and Dynamo have set: no tracing, no autocast, no inference mode; and eager, because
    `model.forward = torch.compile(model.forward, ...)` would come back here."""
    with contextlib.ExitStack() as apart:
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            apart.enter_context(torch.autocast(device, enabled=False))
        apart.enter_context(torch.inference_mode(False))
        apart.enter_context(tracing(None))
        apart.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@dataclass(frozen=True, eq=False)
class Frame:
    """The call that Dynamo compiles: what its sources (`L['self']._modules['up']._parameters['weight']`) speak of."""

    names: Mapping[str, Mapping[str, Any]]  # L: its variables, G: the globals it sees
    code: types.CodeType

    @classmethod
    def current(cls) -> Frame:
        """Raises `RuntimeError` outside of Dynamo."""
        root = InstructionTranslator.current_tx().output.root_tx
        return cls({"L": root.f_locals, "G": root.f_globals}, root.f_code)

    def owners(self, gm: fx.GraphModule) -> list[nn.Module]:
        """The outermost modules that own the graph's parameters."""
        found: dict[int, nn.Module] = {}
        for node in gm.graph.find_nodes(op="placeholder"):
            name = getattr(getattr(node.meta.get("grapharg"), "source", None), "name", None)
            name = name() if callable(name) else name  # torch 2.11 has a method, 2.13 a property
            if isinstance(name, str) and "._parameters[" in name:  # an expression that Dynamo itself evaluates
                module = eval(re.split(r"\._(?:modules|parameters)\[", name)[0], dict(self.names))
                found.setdefault(id(module), module)
        return [*found.values()]

    def call_of(self, model: nn.Module) -> dict[str, Tensor] | None:
        """The tensors `model` is called with, by the names of its forward, where this is its call."""
        values, names, code = self.names["L"], self.code.co_varnames, self.code
        if not names or values.get(names[0]) is not model:
            return None
        at = code.co_argcount + code.co_kwonlyargcount
        given = {name: values.get(name) for name in names[1:at]}
        if code.co_flags & inspect.CO_VARARGS:
            given.update(zip(inspect.signature(model.forward).parameters, values[names[at]]))
            at += 1
        if code.co_flags & inspect.CO_VARKEYWORDS:
            given.update(values[names[at]])
        return {name: value for name, value in given.items() if isinstance(value, Tensor)} or None
