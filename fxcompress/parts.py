"""What a compiled graph holds in place of each weight: enough to put it somewhere else.

    encoder.layer.0.attention.self.query      quantize{bits=4, group_size=64}      codes  scales  zeros  grid  bias
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.core.errors import PlanError
from fxcompress.core.plan import KEEP, SiteInfo
from fxcompress.core.signature import SignedModule
from fxcompress.core.site import Site
from fxcompress.core.surgery import place
from fxcompress.passes import REWRITES
from fxcompress.passes.hidden_units import HiddenUnits
from fxcompress.passes.recipe import Recipe, parse


@dataclass(frozen=True, eq=False)
class Part:
    """What stands for the weight of a site: a recipe and its tensors by name, with the "bias" beside it, if any."""

    site: str
    rows: int
    columns: int
    recipe: Recipe
    tensors: Mapping[str, Tensor]


def parts_of(compiled: SignedModule) -> list[Part]:
    """One for each site that was rewritten, in graph order; the tensors are the graph's own. Raises `PlanError`."""
    if "plan" not in compiled.meta:
        raise PlanError("this graph was restructured without a plan; give one that fxcompress.compile returned.")
    sizes = {info.name: info for info in compiled.plan.sites}
    chosen = [choice for choice in compiled.plan.choices if choice.spec != KEEP]
    reads = _times_read(compiled)
    return [_part(compiled, sizes[choice.site], parse(choice.spec, REWRITES), reads) for choice in chosen]


def weight_of(model: nn.Module, part: Part) -> nn.Parameter:
    """The parameter that `part` stands for. Raises `PlanError` where the model has none of that name and size."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weight = parameters.get(f"{part.site}.weight", parameters.get(part.site))
    if weight is None:
        raise PlanError(
            f"the plan was made for another model: it says {part.recipe} at {part.site}, and {type(model).__name__} "
            "has no such weight."
        )
    sizes = {part.rows, part.columns}
    if sizes not in ({*weight.flatten(1).shape}, {*weight.flatten(0, -2).shape}):  # the latter of stacked experts
        raise PlanError(
            f"the plan was made for another model: {part.site} is {part.rows} x {part.columns} in the plan and "
            f"{' x '.join(map(str, weight.shape))} here."
        )
    return weight


def bias_beside(model: nn.Module, part: Part) -> nn.Parameter | None:
    """The parameter that the part's "bias" takes the place of; None where it has none, or nothing is named so."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    path = f"{part.site}.weight" if f"{part.site}.weight" in parameters else part.site
    owner, _, leaf = path.rpartition(".")
    bias = parameters.get(f"{owner}.{leaf.replace('weight', 'bias')}".lstrip("."))
    return None if "bias" not in part.tensors or bias is parameters.get(path) else bias


def _times_read(compiled: SignedModule) -> Counter[str]:
    """How often the graph reads each of its tensors."""
    found: Counter[str] = Counter()

    def count(read: fx.Node) -> fx.Node:
        if read.op == "get_attr":
            found[str(read.target)] += 1
        return read

    for node in compiled.graph.nodes:
        fx.map_arg((node.args, node.kwargs), count)
    return found


def _part(compiled: SignedModule, info: SiteInfo, recipe: Recipe, reads: Counter[str]) -> Part:
    if isinstance(recipe.structure, HiddenUnits):
        raise PlanError(
            f"{recipe} at {info.name} cuts what lies between weights, which a graph alone can hold; use the compiled "
            "graph, or compile without hidden_units."
        )
    paths = (f"{info.name}.weight",) if _owns(compiled, info.name) else (info.name,)
    site = Site(info.name, paths, torch.empty(info.rows, info.columns, device="meta"), ())
    owner_path, prefix = place(site)
    owner: Any = compiled.get_submodule(owner_path)
    names = recipe.names(site)
    path = f"{owner_path}.{prefix}{names[0]}".lstrip(".")
    if reads[path] < 2:  # a weight that several products read, each with a bias of its own, corrects none
        names = (*names, "bias")
    tensors = {name: getattr(owner, prefix + name) for name in names if hasattr(owner, prefix + name)}
    return Part(info.name, info.rows, info.columns, recipe, tensors)


def _owns(compiled: SignedModule, name: str) -> bool:
    """True where the site is named after a module, False where after its weight."""
    try:
        compiled.get_submodule(name)
    except AttributeError:
        return False
    return True
