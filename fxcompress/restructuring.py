"""restructure: named rewrites at named sites, into a graph that can be trained.

    small = fxcompress.restructure(model, {"*.query": "quaternion", "encoder.layer.*": "low_rank{rank=0.4}"},
                                   example_inputs=inputs)

Nothing is priced and nothing is chosen: the first pattern that matches a site's name says what becomes of it. This is
how low-rank, quaternion and tensor-train transformers are trained from scratch (init="random"), and how a trained
model is projected before it is healed (init="project").
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from fxcompress.api import observe, untouched
from fxcompress.core.attention import (
    AttentionRewrite,
    AttentionSample,
    AttentionSite,
    find_attention_sites,
    observe_attention,
)
from fxcompress.core.errors import SpecError
from fxcompress.core.rewrite import parse_spec
from fxcompress.core.signature import SignedModule
from fxcompress.core.site import Site, find_sites
from fxcompress.core.surgery import finish, own_tensors
from fxcompress.passes import ATTENTION_REWRITES, REWRITES
from fxcompress.passes.recipe import Recipe, parse
from fxcompress.report import Restructured, RestructureReport

T = TypeVar("T")


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
        group_size=0}"`, `"keep"`. A `rank` below 1 is a share of the break-even rank. `"linformer{length=128}"` acts on
        attention, named after the module that computes it. A site whose rewrite refuses, or would not make it smaller,
        is kept and reported.
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
    wanted = {pattern: _parse(spec) for pattern, spec in rewrites.items()}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    with untouched():
        original, known = observe(model, example_inputs, calibration, progress, trainable=True)
        work = original.copy()
        sites, attentions = find_sites(work), find_attention_sites(work)
        weighed, watched = _match(wanted, [s.name for s in sites], [s.name for s in attentions])
        generator = torch.Generator().manual_seed(seed)
        done = []
        for site in sites:
            if site.name in weighed:
                done.append(_carry_out(work, known.informed(site), weighed[site.name], init, generator))
        calls = known.held_out if known.calibrated else []
        for attention in attentions:
            if attention.name in watched:
                samples = observe_attention(original, attention, calls)
                done.append(_attend(work, attention, watched[attention.name], init, samples, generator))
        finish(work)
        own_tensors(work)
    for name, parameter in work.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and name not in frozen)
    before = sum(p.numel() for p in original.parameters())
    saved = sum(s.parameters_before - s.parameters_after for s in done)
    work.meta["report"] = RestructureReport(tuple(done), before, before - saved)
    return work


def _parse(spec: str) -> Recipe | AttentionRewrite:
    """Of a weight or of an attention."""
    known = {r.name: r for r in ATTENTION_REWRITES}
    if spec.split("{")[0].strip() in known:
        return parse_spec(spec, known)  # type: ignore[return-value]
    return parse(spec, REWRITES)


def _match(
    wanted: Mapping[str, Recipe | AttentionRewrite], weights: list[str], attentions: list[str]
) -> tuple[dict[str, Recipe], dict[str, AttentionRewrite]]:
    """-> ({weight: recipe}, {attention: rewrite}), each of the first pattern that matches and has something for it."""
    for pattern, what in wanted.items():
        names, kind = (weights, "sites") if isinstance(what, Recipe) else (attentions, "attentions")
        if not fnmatch.filter(names, pattern):
            shown = f": {', '.join(names[:8])}{', …' if len(names) > 8 else ''}" if names else ""
            raise SpecError(f"the pattern {pattern!r} matches none of the {len(names)} {kind}{shown}.")
    recipes = {p: r for p, r in wanted.items() if isinstance(r, Recipe)}
    others = {p: r for p, r in wanted.items() if not isinstance(r, Recipe)}
    return _first(recipes, weights), _first(others, attentions)


def _first(wanted: Mapping[str, T], names: list[str]) -> dict[str, T]:
    found = {n: next((r for p, r in wanted.items() if fnmatch.fnmatchcase(n, p)), None) for n in names}
    return {name: what for name, what in found.items() if what is not None}


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


def _attend(
    work: SignedModule,
    site: AttentionSite,
    rewrite: AttentionRewrite,
    init: str,
    samples: Sequence[AttentionSample],
    generator: torch.Generator,
) -> Restructured:
    """Rewrite one attention, or say why not; its projections are parameters the model did not have."""
    why = rewrite.refuses(site)
    if why is not None:
        return Restructured(site.name, str(Recipe()), why, 0, 0)
    rewrite = rewrite.at(site)
    tensors = rewrite.factor(site, samples) if init == "project" else rewrite.draw(site, generator)
    rewrite.apply(work, site, tensors)
    return Restructured(site.name, str(rewrite), "", 0, sum(t.numel() for t in tensors.values()))
