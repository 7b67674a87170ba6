"""Groups of hidden units beside the choices of single weights: who plays a part, who must agree, what shrinks between.

    up (makes)  ->  gelu  ->  down (reads)        one group; its sites' choices keep the same units, or all of them

The planner chooses one candidate a site. `find_roles` tells the sites of a group what it is, `unit_ties` ties them
(fxcompress.core.ties), and `cut_between` shrinks what none of them owns: values, the sizes written into views, vectors
between two products. A site's own weight, and a bias nobody else reads, it rewrites itself.

A site that reads one group and makes another would need two cuts in one choice: its groups are left to
fxcompress.passes.prune_hidden_units.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from torch import Tensor, fx

from fxcompress.core.errors import PlanError
from fxcompress.core.plan import Candidate
from fxcompress.core.resize import resize
from fxcompress.core.signature import SignedModule
from fxcompress.core.site import Site, attribute, find_sites
from fxcompress.core.ties import Tie, label_of
from fxcompress.passes.dependency import HiddenGroup, find_groups
from fxcompress.passes.hidden_units import HiddenSite, HiddenUnits, Role, order_of_removal
from fxcompress.passes.recipe import Recipe


def find_roles(gm: SignedModule, informed: Callable[[Site], Site] = lambda site: site) -> dict[str, Role | str]:
    """What each site of a group has to do with it, or why it cannot be chosen alone; other sites are left out.

    informed: gives a consumer its statistics (`Calibration.informed`), when an order is first asked for.
    """
    gm = gm.copy()  # without names of tensors that the graph does not read them by; what is rewritten is a copy, too
    sites, groups = {site.name: site for site in find_sites(gm)}, find_groups(gm)[0]
    parts = Counter(name for group in groups for name in group.sites)
    roles: dict[str, Role | str] = {}
    for group in groups:
        both = next((name for name in group.sites if parts[name] > 1), None)
        if both is not None:
            why = f"{both} reads hidden units and makes others, and one choice cannot cut a weight twice"
            roles.update(dict.fromkeys(group.sites, why))
            continue
        order = functools.cache(functools.partial(_ordered, [sites[c] for c in group.consumers], group, informed))
        loose = _loose_bytes(gm, group, sites)
        roles.update({n: Role(group, n in group.producers, order, loose[n]) for n in group.sites})
    return roles


def take_roles(sites: Sequence[Site], roles: Mapping[str, Role | str]) -> list[Site]:
    """The same sites, those named in `roles` as `HiddenSite`s."""
    fields = [f.name for f in dataclasses.fields(Site)]
    taken: list[Site] = []
    for site in sites:
        role = roles.get(site.name)
        part = {"role": role} if isinstance(role, Role) else {"why": role}
        taken.append(site if role is None else HiddenSite(**{f: getattr(site, f) for f in fields}, **part))
    return taken


def _ordered(consumers: Sequence[Site], group: HiddenGroup, informed: Callable[[Site], Site]) -> Tensor:
    return order_of_removal([informed(site) for site in consumers], group)


def _loose_bytes(gm: fx.GraphModule, group: HiddenGroup, sites: Mapping[str, Site]) -> Counter[str]:
    """Bytes one unit fills in stored tensors that are no site's weight: a bias counts as its producer's, anything else
    as the first consumer's, so that the sum over the group is exact."""
    weights = {path for name in group.sites for path in sites[name].paths}
    nodes = {name: sites[name].uses[0].bias for name in group.producers}
    biases = [(name, attribute(gm, str(node.target))) for name, node in nodes.items() if node is not None]
    found: Counter[str] = Counter()
    for holder in {cut.holder for cut in group.stored} - weights:
        tensor = attribute(gm, holder)
        owner = next((name for name, bias in biases if bias is tensor), group.name)
        found[owner] += tensor.numel() * tensor.element_size() // group.units
    return found


def unit_ties(sites: Iterable[Site], candidates: Iterable[Candidate]) -> list[Tie]:
    """One for each group that any candidate cuts."""
    cut = {c.site for c in candidates if label_of("units", c.spec)}
    groups = {s.role.group.sites: None for s in sites if s.name in cut and isinstance(s, HiddenSite) and s.role}
    return [Tie("units", names) for names in groups]


def agreed(
    candidates: Sequence[Candidate], ties: Iterable[Tie]
) -> tuple[list[Candidate], list[tuple[str, str, str]]]:
    """Without candidates that some site tied by units has no match for -> (the rest, refusals where none is left)."""
    kept, refused = list(candidates), []
    for tie in (t for t in ties if t.by == "units"):
        mine = {name: {label_of("units", c.spec) for c in candidates if c.site == name} for name in tie.sites}
        common = set.intersection(*mine.values())
        kept = [c for c in kept if c.site not in mine or label_of("units", c.spec) in common]
        if common == {""}:
            why = f"no number of units is left to choose at every one of {', '.join(tie.sites)}"
            refused += [(name, HiddenUnits.name, why) for name, labels in mine.items() if len(labels) > 1]
    return kept, refused


def cut_between(gm: fx.GraphModule, sites: Mapping[str, Site], recipes: Mapping[str, Recipe]) -> None:
    """Shrink what lies between the sites whose recipes cut hidden units; the recipes must be applied next.

    Raises `PlanError` where a site of a group would keep other units than the rest.
    """
    cuts: dict[str, tuple[HiddenGroup, Tensor]] = {}
    own: set[str] = set()
    for name, recipe in recipes.items():
        structure, site = recipe.structure, sites[name]
        if not isinstance(structure, HiddenUnits):
            continue
        if not isinstance(site, HiddenSite) or site.role is None:
            raise PlanError(
                f"the plan was made for another model: it says {structure} at {name}, where {structure.refuses(site)}."
            )
        group = site.role.group
        odd = next((n for n in group.sites if n not in recipes or recipes[n].structure != structure), None)
        if odd is not None:
            raise PlanError(
                f"the plan says {structure} at {name} and {recipes.get(odd, Recipe())} at {odd}, which share their "
                f"hidden units; give {', '.join(group.sites)} the same number, or keep them."
            )
        cuts[group.name] = (group, structure.units(site))
        own.update(site.paths, [str(site.uses[0].bias.target)] if site.correctable else [])  # type: ignore[union-attr]
    shrink(gm, cuts.values(), {}, own)


def shrink(
    gm: fx.GraphModule,
    cuts: Iterable[tuple[HiddenGroup, Tensor]],
    tensors: Mapping[str, Tensor],
    spared: Collection[str] = (),
) -> None:
    """Cut every group down to its units kept (ascending): stored tensors but those `spared`, and values.

    tensors: by path, what takes the place of a stored tensor before it is cut.
    """
    changed = dict(tensors)
    sizes: dict[str, dict[int, int]] = {}
    for group, kept in cuts:
        for cut in group.stored:
            if cut.holder not in spared:
                whole = changed.get(cut.holder, attribute(gm, cut.holder).detach())
                changed[cut.holder] = whole.index_select(cut.axis, cut.span.positions(kept))
        for cut in group.values:
            sizes.setdefault(cut.holder, {})[cut.axis] = cut.span.size // cut.span.units * len(kept)
    resize(gm, changed, sizes)
