"""Staged calibration: each weight is fitted to the inputs that it will get, not to those it was trained with.

Sites are rewritten in graph order; once those before a site are, its inputs are x' in place of x, and its statistics
are collected anew, H' = E[x' x'^T]. Roundings with error feedback and whitened factors then minimise the error on what
really arrives (GPTQ, Frantar et al. 2023, section 4: "statistics of already quantized layers"). One pass over the
calibration batches serves a whole plan: a frontier (fxcompress.core.frontier) moves through the graph once, and holds
what is alive at one place of it for every batch.

Tables, weights that are read before all of their inputs are known (a tied word table, a layer used twice) and layers
whose units are cut keep the statistics of the original.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from fxcompress.core.ahead import ahead
from fxcompress.core.calibrate import Calibration, multiplied
from fxcompress.core.divergence import mask_of
from fxcompress.core.frontier import Frontier, put
from fxcompress.core.moment import HeldMoment, Moment
from fxcompress.core.signature import SignedModule
from fxcompress.core.site import Site, Use, find_sites
from fxcompress.passes.recipe import Made, Recipe


class Fixed:
    """The statistics of the original's activations, for every site. What was made of a site once is not made again: a
    plan that missed its size by a little has most of its choices in common with the next."""

    def __init__(self, known: Calibration) -> None:
        self.known = known
        self._settled: dict[tuple[str, str], tuple[Made, float]] = {}

    def begun(self) -> Fixed:
        """For one pass over a graph, from its start."""
        return self

    def settle(self, site: Site, recipe: Recipe) -> tuple[Made, float]:
        """The recipe carried out, and its squared relative error. Sites must be asked for in graph order."""
        key = site.name, str(recipe)
        if key not in self._settled:
            made, error = self.make(site, recipe)
            self._settled[key] = made.settled(), error
        return self._settled[key]

    def all_settled(self, chosen: Sequence[tuple[Site, Recipe]]) -> Iterator[tuple[Made, float]]:
        """`settle` of sites in graph order, which a caller may rewrite as it goes."""
        tasks = (partial(self.settle, site, recipe) for site, recipe in chosen)
        return iter([*ahead(tasks)])  # none is rewritten before the last is read

    def make(self, site: Site, recipe: Recipe) -> tuple[Made, float]:
        """The same, with the dense weight it amounts to."""
        site = self.informed(site)
        made = recipe.make(site)
        self.rewritten(site, made)
        return made, recipe.error(site, made.weight)

    def informed(self, site: Site) -> Site:
        """The site with what was seen at it."""
        return self.known.informed(site)

    def rewritten(self, site: Site, made: Made) -> None:
        """What became of a site, once it is settled."""


def watched(original: SignedModule, known: Calibration) -> Fixed:
    """What tells each site its statistics while a plan is carried out."""
    return Staged(original, known) if known.fitted else Fixed(known)


class Staged(Fixed):
    """The statistics of activations behind the sites rewritten so far."""

    def __init__(self, original: SignedModule, known: Calibration) -> None:
        super().__init__(replace(known, moments=dict(known.moments), checks=dict(known.checks)))
        self._gm, self._source = original, known
        self._own = {site.name: site for site in find_sites(original)}
        self._seen = set[str]()
        self._batches = [known.fitted, known.held_out if known.has_held_out else []]
        self._frontiers = [Frontier(original, calls) for calls in self._batches]

    def begun(self) -> Fixed:
        return Staged(self._gm, self._source)

    def settle(self, site: Site, recipe: Recipe) -> tuple[Made, float]:
        return self.make(site, recipe)  # its inputs are another pass's no more

    def all_settled(self, chosen: Sequence[tuple[Site, Recipe]]) -> Iterator[tuple[Made, float]]:
        return (self.settle(site, recipe) for site, recipe in chosen)  # each sees what became of those before

    def informed(self, site: Site) -> Site:
        """With the statistics of its inputs as they are now."""
        own = self._own[site.name]
        products = [use for use in own.uses if use.kind != "embedding"]
        start = self._frontiers[0].first_use(own)
        if products and all(self._frontiers[0].is_known_at(use.x, start) for use in own.uses):
            for use in products:
                self._observe(use, start)
        return self.known.informed(site)

    def rewritten(self, site: Site, made: Made) -> None:
        """What comes behind the site will be seen through `made`."""
        if made.weight.shape != site.weight.shape:  # units are cut: no weight of the original's graph
            return
        for frontier in self._frontiers:
            for env in frontier.values:
                put(env, self._gm, self._own[site.name], made.weight, made.bias)

    def _observe(self, use: Use, start: int) -> None:
        """Collect the moments of one input anew, once for all the sites that read it."""
        if use.key in self._seen:
            return
        self._seen.add(use.key)
        fit, check = Moment(), HeldMoment()
        for frontier, calls, moment in zip(self._frontiers, self._batches, (fit, check)):
            frontier.advance(start)
            for env, call in zip(frontier.values, calls):
                moment.add(multiplied(use, env[use.x], mask_of(call[1])))
        self.known.moments[use.key] = fit
        if check.count:
            self.known.checks[use.key] = check
