"""restructure: named rewrites at named sites, into a graph that can be trained.

    small = fxcompress.restructure(model, {"*.query": "quaternion", "encoder.layer.*": "low_rank{rank=0.4}"},
                                   example_inputs=inputs)

Nothing is priced and nothing is chosen: the first pattern that matches a site's name says what becomes of it. This is
how low-rank, quaternion and tensor-train transformers are trained from scratch (init="random"), and how a trained
model is projected before it is healed (init="project").
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from fxcompress.api import observe, untouched
from fxcompress.codegen.costs import cost_of
from fxcompress.codegen.triton.listing import list_kernels
from fxcompress.core.attention import (
    AttentionRewrite,
    AttentionSample,
    AttentionSite,
    find_attention_sites,
    observe_attention,
)
from fxcompress.core.calibrate import Calibration, calibrate
from fxcompress.core.errors import SpecError
from fxcompress.core.rewrite import Rewrite, parse_spec
from fxcompress.core.signature import SignedModule
from fxcompress.core.site import Site, find_sites
from fxcompress.core.surgery import finish, own_tensors
from fxcompress.passes import ATTENTION_REWRITES, REWRITES
from fxcompress.passes.hidden_units import HiddenUnits
from fxcompress.passes.prune_hidden_units import prune_hidden_units
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
        attention, named after the module that computes it; `"hidden_units{kept=0.75}"` cuts neurons or heads out of
        the groups that a pattern names any site of, before anything else is done. A site whose rewrite refuses, or
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
    wanted = {pattern: _parse(spec) for pattern, spec in rewrites.items()}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    batches = None if calibration is None else list(calibration)  # read twice where hidden units are cut
    generator = torch.Generator().manual_seed(seed)
    with untouched():
        original, known = observe(model, example_inputs, batches, progress, trainable=True)
        work, done = _cut_hidden_units(original, known, {p: w for p, w in wanted.items() if isinstance(w, HiddenUnits)})
        if done and batches is not None:
            known = calibrate(work, find_sites(work), batches, progress)
        counted = sum(p.numel() for p in work.parameters())
        whole = work.copy()  # still runs while `work` is taken apart
        sites = find_sites(work)
        recipes = _match({p: w for p, w in wanted.items() if isinstance(w, Recipe)}, [s.name for s in sites], "sites")
        attentions = {site.name: site for site in find_attention_sites(work)}
        others = _match(
            {p: w for p, w in wanted.items() if isinstance(w, AttentionRewrite)}, [*attentions], "attentions"
        )
        carried = [
            _carry_out(work, known.informed(site), recipes[site.name], init, generator)
            for site in sites
            if site.name in recipes
        ]
        calls = known.held_out if known.calibrated else []
        seen = {s.name: partial(observe_attention, whole, s, calls) for s in find_attention_sites(whole)}
        carried += [_attend(work, attentions[n], r, init, seen[n], generator) for n, r in others.items()]
        finish(work)
        own_tensors(work)
    for name, parameter in work.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and name not in frozen)
    saved = sum(s.parameters_before - s.parameters_after for s in carried)
    before = sum(p.numel() for p in original.parameters())
    work.meta["report"] = RestructureReport((*done, *carried), before, counted - saved)
    work.meta.update(kernels=list_kernels, cost=cost_of)
    return work


def _parse(spec: str) -> Recipe | HiddenUnits | AttentionRewrite:
    """Of a weight, of the units between weights, or of an attention."""
    groups: tuple[type[Rewrite], ...] = (HiddenUnits, *ATTENTION_REWRITES)
    apart = {r.name: r for r in groups}
    if spec.split("{")[0].strip() in apart:
        return parse_spec(spec, apart)  # type: ignore[return-value]
    return parse(spec, REWRITES)


def _match(wanted: Mapping[str, T], names: list[str], kind: str) -> dict[str, T]:
    """-> {name: what the first pattern that matches it says}."""
    for pattern in wanted:
        if not fnmatch.filter(names, pattern):
            shown = f": {', '.join(names[:8])}{', …' if len(names) > 8 else ''}" if names else ""
            raise SpecError(f"the pattern {pattern!r} matches none of the {len(names)} {kind}{shown}.")
    found = {n: next((w for p, w in wanted.items() if fnmatch.fnmatchcase(n, p)), None) for n in names}
    return {name: what for name, what in found.items() if what is not None}


def _cut_hidden_units(
    original: SignedModule, known: Calibration, wanted: Mapping[str, HiddenUnits]
) -> tuple[SignedModule, list[Restructured]]:
    """-> (a copy without the units that go, the sites that shrank). Nothing is random about it: the best stay."""
    if not wanted:
        return original.copy(), []
    keep = {pattern: units.kept for pattern, units in wanted.items()}
    work = prune_hidden_units(original, known if known.calibrated else None, keep)
    now = {site.name: site for site in find_sites(work)}
    return work, [
        Restructured(s.name, f"hidden units: {s.rows} x {s.columns} -> {n.rows} x {n.columns}", "", *sizes)
        for s in find_sites(original)
        if (sizes := (s.weight.numel(), (n := now[s.name]).weight.numel()))[0] > sizes[1]
    ]


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
    seen: Callable[[], Sequence[AttentionSample]],
    generator: torch.Generator,
) -> Restructured:
    """Rewrite one attention, or say why not; its projections are parameters the model did not have."""
    why = rewrite.refuses(site)
    if why is not None:
        return Restructured(site.name, str(Recipe()), why, 0, 0)
    rewrite = rewrite.at(site)
    tensors = rewrite.factor(site, seen()) if init == "project" else rewrite.draw(site, generator)
    rewrite.apply(work, site, tensors)
    return Restructured(site.name, str(rewrite), "", 0, sum(t.numel() for t in tensors.values()))
