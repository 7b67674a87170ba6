"""The original module tree with other leaves: each weight that a plan rewrites, in the module that owns it.

generate, pipelines, Trainer and adapters see the modules that they know, and the numbers are the compiled graph's.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from fxcompress.api import compile
from fxcompress.core.errors import PlanError
from fxcompress.core.plan import Plan
from fxcompress.core.signature import SignedModule
from fxcompress.leaves import hollow, native_of, swap
from fxcompress.parts import Part, parts_of, weight_of


def apply(
    model: nn.Module,
    plan: Plan | SignedModule,
    *,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
    calibration: Iterable[Any] | None = None,
    progress: bool = True,
) -> nn.Module:
    """A copy of `model`, in its mode, whose linears, embeddings and convolutions are kept as `plan` says.

    plan: what `compile` or `load` returned of this model, whose tensors are taken; or a plan alone, which is carried
        out first, with the other arguments as `compile` takes them.

    Every leaf is still an `nn.Linear`, `nn.Embedding`, ... . Outputs are those of the compiled graph. Raises
    `PlanError` where the plan is of another model, or rewrites what no module owns; and what `compile` raises.
    """
    if isinstance(plan, Plan):
        plan = compile(model, plan=plan, example_inputs=example_inputs, calibration=calibration, progress=progress)
    if not isinstance(plan, SignedModule):
        raise PlanError(f"apply takes a Plan, or what compile or load returned, not a {type(plan).__name__}.")
    return with_parts(model, parts_of(plan))


def with_parts(model: nn.Module, parts: Sequence[Part]) -> nn.Module:
    """A copy of `model` that holds `parts`. All else is copied, but not the weights that they stand for.

    Raises `PlanError` where a weight is in no module that can be swapped.
    """
    owners = {part.site: owners_of(model, part) for part in parts}
    weights = [weight_of(model, part) for part in parts]
    skipped = {id(weight): nn.Parameter(hollow(weight), requires_grad=False) for weight in weights}
    twin = copy.deepcopy(model, dict[int, Any](skipped))
    for part, weight in zip(parts, weights):
        tensors = {name: t.detach().to(weight.device, copy=True) for name, t in part.tensors.items()}
        for path in owners[part.site]:
            swap(twin.get_submodule(path), part.recipe, tensors)
    if (quantizer := sys.modules.get("fxcompress.hf_quantizer")) is not None:
        quantizer.adopt(twin)
    return twin


def owners_of(model: nn.Module, part: Part) -> list[str]:
    """Paths of the modules whose `weight` the part stands for. Raises `PlanError` where there is none, or another."""
    weight, where = weight_of(model, part), f"{part.recipe} at {part.site}"
    owners = {path: m for path, m in model.named_modules() if m._parameters.get("weight") is weight}
    if not owners:
        raise PlanError(f"{where}: this is no module's `weight`; module mode swaps modules. Use the compiled graph.")
    for path, module in owners.items():
        if native_of(type(module)) is None:
            raise PlanError(
                f"{where}: {path} is a {type(module).__name__}; module mode swaps Linear, Embedding, convolutions and "
                "transformers' Conv1D. Use the compiled graph."
            )
    return [*owners]
