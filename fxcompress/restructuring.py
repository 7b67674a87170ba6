"""restructure: named rewrites at named sites, into a graph that can be trained.

    small = fxcompress.restructure(model, {"*.query": "quaternion", "encoder.layer.*": "low_rank{rank=0.4}"},
                                   example_inputs=inputs)

Nothing is priced and nothing is chosen: the first pattern that matches a site's name says what becomes of it. This is
how low-rank, quaternion and tensor-train transformers are trained from scratch (init="random"), and how a trained
model is projected before it is healed (init="project").
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from fxcompress.api import observe, untouched
from fxcompress.core.errors import SpecError
from fxcompress.core.signature import SignedModule
from fxcompress.core.site import Site, find_sites
from fxcompress.core.surgery import finish, own_tensors
from fxcompress.passes import REWRITES
from fxcompress.passes.recipe import Recipe, parse
from fxcompress.report import Restructured, RestructureReport


def restructure(
    model: nn.Module,
    rewrites: Mapping[str, str],
    *,
    init: Literal["project", "random"] = "project",
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
    calibration: Iterable[Any] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SignedModule:
    """The model with `rewrites` carried out, as a trainable GraphModule; `.report` says what became of each site.

    rewrites: {pattern: spec}. Patterns are globs over site names (fnmatch, `*` crosses dots), the first that matches a
        site wins; a spec is what plans print: `"monarch{blocks=4}"`, `"low_rank{rank=64} | quantize{bits=8,
        group_size=0}"`, `"keep"`. A `rank` below 1 is a share of the break-even rank. A site whose rewrite refuses, or
        would not make it smaller, is kept and reported.
    init: "project" starts from the nearest weight of that form (in the metric of the inputs where `calibration` is
        given), "random" from a fresh draw of the same spread; everything no pattern matches keeps its values.
    example_inputs, calibration: as in `fxcompress.compile`.
    seed: of the random start. The caller's random state is neither read nor changed.

    Every floating parameter may be trained, except those that were frozen in `model`.

    Raises `SpecError` for a spec that does not parse, a pattern that matches nothing, or parameters that do not fit a
    site; otherwise as `compile` does.
    """
    if init not in ("project", "random"):
        raise SpecError(f"init={init!r}: allowed are 'project' and 'random'.")
    wanted = {pattern: parse(spec, REWRITES) for pattern, spec in rewrites.items()}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    with untouched():
        original, known = observe(model, example_inputs, calibration, progress, trainable=True)
        work = original.copy()
        sites = find_sites(work)
        matched = _match(wanted, [s.name for s in sites])
        generator = torch.Generator().manual_seed(seed)
        done = []
        for site in sites:
            if site.name in matched:
                done.append(_carry_out(work, known.informed(site), matched[site.name], init, generator))
                site.forget()
        finish(work)
        own_tensors(work)
    for name, parameter in work.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and name not in frozen)
    before = sum(p.numel() for p in original.parameters())
    saved = sum(s.parameters_before - s.parameters_after for s in done)
    work.meta["report"] = RestructureReport(tuple(done), before, before - saved)
    return work


def _match(wanted: Mapping[str, Recipe], names: list[str]) -> dict[str, Recipe]:
    """-> {site: the recipe of the first pattern that matches it}."""
    for pattern in wanted:
        if not fnmatch.filter(names, pattern):
            shown = ", ".join(names[:8])
            raise SpecError(
                f"the pattern {pattern!r} matches none of the {len(names)} sites: "
                f"{shown}{', …' if len(names) > 8 else ''}."
            )
    first = {n: next((r for p, r in wanted.items() if fnmatch.fnmatchcase(n, p)), None) for n in names}
    return {name: recipe for name, recipe in first.items() if recipe is not None}


def _carry_out(
    work: SignedModule, site: Site, recipe: Recipe, init: str, generator: torch.Generator
) -> Restructured:
    """Rewrite one site, or say why not."""
    before = site.weight.numel()
    why = recipe.refuses(site)
    if why is None and not recipe.is_keep:
        recipe = recipe.at(site)
        stored = recipe.stored_bytes(site)
        if stored >= site.dense_bytes:
            why = f"{recipe} stores {stored} bytes, the weight itself {site.dense_bytes}"
    if why is not None or recipe.is_keep:
        return Restructured(site.name, str(Recipe()), why or "", before, before)
    made = recipe.make(site) if init == "project" else recipe.draw(site, generator)
    made.apply(work, site)
    return Restructured(site.name, str(recipe), "", before, recipe.parameters(site))
