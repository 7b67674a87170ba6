"""The original module tree with other leaves: each weight that a plan rewrites, in the module that owns it.

generate, pipelines, Trainer and adapters see the modules that they know, and the numbers are the compiled graph's.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.api import compile
from fxcompress.core.errors import PlanError
from fxcompress.core.plan import Plan
from fxcompress.core.signature import SignedModule
from fxcompress.leaves import hollow, native_of, swap
from fxcompress.parts import Part, parts_of, weight_of
from fxcompress.read_back import keep_read_back


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

    Every leaf is still an `nn.Linear`, `nn.Embedding`, ... . Outputs are those of the compiled graph; where another
    module owns a weight, it is read back, and products of factors may round otherwise. Raises `PlanError` where the
    plan is of another model; and what `compile` raises.
    """
    if isinstance(plan, Plan):
        plan = compile(model, plan=plan, example_inputs=example_inputs, calibration=calibration, progress=progress)
    if not isinstance(plan, SignedModule):
        raise PlanError(f"apply takes a Plan, or what compile or load returned, not a {type(plan).__name__}.")
    return with_parts(model, parts_of(plan))


def with_parts(model: nn.Module, parts: Sequence[Part]) -> nn.Module:
    """A copy of `model` that holds `parts`. All else is copied, but not the weights that they stand for.

    Linear modules, tables and convolutions are swapped; any other owner reads its weight back (fxcompress.read_back).
    Raises `PlanError`.
    """
    owners = {part.site: owners_of(model, part) for part in parts}
    weights = [weight_of(model, part) for part in parts]
    skipped = {id(weight): nn.Parameter(hollow(weight), requires_grad=False) for weight in weights}
    twin = copy.deepcopy(model, dict[int, Any](skipped))
    for part, weight in zip(parts, weights):
        own = replace(part, tensors={name: _copied(t, weight.device) for name, t in part.tensors.items()})
        for path, name in owners[part.site]:
            leaf = twin.get_submodule(path)
            if name == "weight" and native_of(type(leaf)) is not None:
                swap(leaf, own.recipe, own.tensors)
            else:
                keep_read_back(leaf, name, own, weight)
    if (quantizer := sys.modules.get("fxcompress.hf_quantizer")) is not None:
        quantizer.adopt(twin)
    return twin


def owners_of(model: nn.Module, part: Part) -> list[tuple[str, str]]:
    """(path of a module, name of its parameter) wherever the weight is that the part stands for."""
    weight = weight_of(model, part)
    return [(path, name) for path, m in model.named_modules() for name, p in m._parameters.items() if p is weight]


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    copied = tensor.detach().to(device, copy=True)
    return nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied
