"""torch.compile(model, backend="fxcompress", options={"budget": "4x", "calibration": batches})

    first graph         the model that owns its parameters is compressed whole, as `fxcompress.compile` does it
    every graph         parameters are replaced by the parts made of them, by identity (fxcompress.dynamo_graph)
    then                handed to Inductor, on kernels of this CPU where they are asked for, or run as it is

So prefill and decode graphs, graph breaks and recompilations for other shapes share one set of tensors, made once. All
that is kept from one graph to the next is in the `Session` of the options that torch.compile hands on each time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import tracing
from torch._inductor.compile_fx import compile_fx
from torch.utils.weak import WeakTensorKeyDictionary

from fxcompress.api import compile
from fxcompress.checkpoint import load
from fxcompress.codegen.cpu.module import INDUCTOR
from fxcompress.core.budget import Budget
from fxcompress.core.errors import BackendError
from fxcompress.core.plan import Plan
from fxcompress.core.signature import SignedModule
from fxcompress.dynamo_cpu import Lowering
from fxcompress.dynamo_frame import Frame, inputs_of
from fxcompress.dynamo_graph import rewritten
from fxcompress.parts import Part, bias_beside, parts_of, weight_of

OPTIONS = ("budget", "calibration", "warmup_batches", "plan", "lower", "rewrites", "example_inputs", "progress")
LOWER = ("inductor", "eager", "cpu")


def fxcompress(
    gm: fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend; torch.compile calls it with each graph and its options.

    options: `budget`, `calibration`, `rewrites`, `example_inputs` and `progress` as `fxcompress.compile` takes them;
        `plan`: a Plan, what `compile` or `load` returned, or the folder `save` wrote, whose tensors are taken;
        `warmup_batches`: in place of calibration, so many calls run as they are and calibrate what follows;
        `lower`: "inductor" (the default), "eager", or "cpu": Inductor with the products of `fxcompress.lower`, which
        round their inputs to 8 bits.

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
    frame = Frame.current()
    new = [m for m in frame.owners(gm) if any(p not in session.seen for p in m.parameters())]
    for model in new:
        if model.training:
            raise BackendError(
                f"backend 'fxcompress' serves inference, and {type(model).__name__} is in training mode: call "
                "model.eval() first."
            )
        if not session.is_cold:
            session.learn(model, frame.call_of(model))
    if session.is_cold and new:
        known = len(new) == 1 and (frame.is_resumed or frame.call_of(new[0]) is not None)
        if not known:
            raise BackendError(
                "option warmup_batches collects the calls of one model, and here a function around it is compiled: "
                "compile the model itself, or give calibration."
            )
        return Warming(session, gm, new[0], None if frame.is_resumed else inputs_of(gm, new[0]))
    work = session.rewritten(gm, inputs)
    if session.lower == "eager":
        return work.forward
    lowered = compile_fx(work, list(inputs), config_patches=dict(INDUCTOR) if session.lower == "cpu" else None)
    assert callable(lowered)
    return lowered


@dataclass(eq=False)
class Session:
    """What one call of torch.compile has compressed so far."""

    options: Mapping[str, Any]  # held, so that its id stays its own
    seen: MutableMapping[Tensor, bool] = field(default_factory=WeakTensorKeyDictionary)  # parameters
    part_of: MutableMapping[Tensor, Part] = field(default_factory=WeakTensorKeyDictionary)  # by weight
    beside: MutableMapping[Tensor, Part] = field(default_factory=WeakTensorKeyDictionary)  # by the bias it corrects
    calls: list[dict[str, Tensor]] = field(default_factory=list)  # that warm it up
    lowering: Lowering = field(default_factory=Lowering)  # where lower is "cpu"

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
        warmup = options.get("warmup_batches", 0)
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
            raise BackendError(f"option warmup_batches={warmup!r} must be a number of calls, such as 8.")
        if warmup and ("calibration" in options or "plan" in options):
            raise BackendError("option warmup_batches collects calibration; leave it out beside one, or a plan.")
        if options.get("lower", LOWER[0]) not in LOWER:
            raise BackendError(f"option lower={options['lower']!r}: it is one of {', '.join(map(repr, LOWER))}.")
        return _SESSIONS.setdefault(id(options), cls(options))

    @property
    def lower(self) -> str:
        """One of `LOWER`."""
        return str(self.options.get("lower", LOWER[0]))

    def rewritten(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
        """A graph with the parts of what was learned."""
        if self.lower != "cpu":
            return rewritten(gm, inputs, self.part_of, self.beside)
        work = rewritten(gm, inputs, self.part_of, self.beside, self.lowering.put)
        self.lowering.between(work)
        return work

    @property
    def is_cold(self) -> bool:
        """True while calls are collected."""
        return len(self.calls) < int(self.options.get("warmup_batches", 0))

    def learn(self, model: nn.Module, call: dict[str, Any] | None) -> None:
        """Compress `model`, which is being called with `call` where that is known."""
        with _apart():
            parts = self._parts(model, call)
        for part in parts:
            weight, bias = weight_of(model, part), bias_beside(model, part)
            here = replace(part, tensors={name: t.to(weight.device) for name, t in part.tensors.items()})
            self.part_of[weight] = here
            if bias is not None:
                self.beside[bias] = here
        self.seen.update(dict.fromkeys(model.parameters(), True))

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
        calibration, example = self.options.get("calibration", self.calls or None), self.options.get("example_inputs")
        if example is None and calibration is None:
            example = call
        compiled = compile(
            model, budget, plan=plan, calibration=calibration, example_inputs=example,
            rewrites=self.options.get("rewrites"), progress=self.options.get("progress", False),
        )  # fmt: skip
        return parts_of(compiled)


_SESSIONS: dict[int, Session] = {}


@dataclass(eq=False)
class Warming:
    """A graph that runs as it is and collects its inputs, until there are enough; then with the parts."""

    session: Session
    gm: fx.GraphModule
    model: nn.Module
    names: Mapping[int, str] | None  # of inputs that are arguments of the model; None: its calls tell nothing
    lowered: Callable[..., Any] | None = None

    def __call__(self, *inputs: Any) -> Any:
        if self.session.is_cold:
            if self.names is not None:
                with torch.inference_mode(False):
                    self.session.calls.append({name: inputs[at].clone() for at, name in self.names.items()})
            return self.gm.forward(*inputs)
        if self.lowered is None:
            if any(p not in self.session.seen for p in self.model.parameters()):
                self.session.learn(self.model, None)
            work = self.session.rewritten(self.gm, inputs)
            sized = any(isinstance(value, int) for value in inputs)  # Dynamo guards every other size
            settings = dict(INDUCTOR) if self.session.lower == "cpu" else None
            eager = self.session.lower == "eager"
            self.lowered = work.forward if eager else torch.compile(work, dynamic=sized, options=settings)
        return self.lowered(*inputs)


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
