"""Every recipe worth weighing at every site, priced: bytes, flops, the site's own error, the loss it costs the model.

1. Each storage on the dense weight: its error in the calibration statistics, told from rows that stand for all where
   there are many (fxcompress.core.sample): of MiniLM's weights within 1 to 3 %.
2. Each structure, plain and with each storage on its factors. A structure's error before storing is a closed form and a
   lower bound; a recipe is dropped unmade when that error, plus what the same storage does to the dense weight, is no
   better than stored dense weights of as many bytes (with some room, because kappa differs between families), and made
   and measured otherwise, or inferred between two that are. Nothing is dropped where flops are bounded, nor of a
   structure whose losses lie elsewhere, nor what is clearly faster than every stored dense weight where latency is
   asked.
3. One probe of the model per site and family that is left (fxcompress.cost_model.sensitivity) turns site errors into
   losses.

1 and 2 know nothing of other weights, and run ahead of 3 for some of those to come (fxcompress.core.ahead).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import sympy
from torch import Tensor
from torch.utils import _pytree as pytree
from tqdm import tqdm

from fxcompress.core.ahead import ahead
from fxcompress.core.budget import Budget
from fxcompress.core.calibrate import Calibration, Call, is_divisible, thinned
from fxcompress.core.divergence import mask_of
from fxcompress.core.plan import Candidate
from fxcompress.core.rewrite import Rewrite, Storage, Structure
from fxcompress.core.signature import SignedModule
from fxcompress.core.site import Site
from fxcompress.core.ties import Tie
from fxcompress.cost_model.sensitivity import Prober, kappa, price
from fxcompress.passes.hull import NOTHING, Hull
from fxcompress.passes.latency import Pricing
from fxcompress.passes.probes import MADE_EACH, Probe, Trial, family_of, probes_of
from fxcompress.passes.recipe import Recipe
from fxcompress.passes.unit_groups import agreed, unit_ties

FASTER = 0.9  # of the seconds of a stored dense weight: less is within what a profile is good for
# MiniLM's 32 held-out sentences take 2e10. Of a BERT-base's 32 it is 4, which tell losses with a spread of 5 %.
PROBE_FLOPS = 2.5e10
MINOR = 0.25  # of what the largest of a series loses; storing half of its rank adds an eighth less (BERT, 768 x 3072)
DOUBT = 0.03  # of what a structure loses itself: what storing adds is a difference, and drowns beside a large loss
MOST_LOST = 0.15  # of the squared output; 2 bits lose a twentieth: a structure that loses more answers no budget


@dataclass(frozen=True)
class Tried:
    """All that is known of a site before the model is asked; not its statistics, which are large."""

    site: str
    trials: list[Trial]
    refused: list[tuple[str, str]]  # (rewrite, why)
    probes: Callable[[Tensor], Iterable[Probe]]  # from the rows that probing reads


@dataclass(frozen=True)
class Draft:
    """A site before its structures are made."""

    site: Site
    trials: list[Trial]  # storages of the dense weight, measured
    estimates: list[Trial]  # structures, neither made nor dropped
    promising: set[str]  # specs of the estimates worth making
    refused: list[tuple[str, str]]  # (rewrite, why)


def propose(
    gm: SignedModule,
    sites: Sequence[Site],
    ties: Sequence[Tie],
    rewrites: Sequence[type[Rewrite]],
    calibration: Calibration,
    budget: Budget,
    named: bool = False,
    progress: bool = True,
    pricing: Pricing | None = None,
) -> tuple[list[Candidate], list[tuple[str, str, str]]]:
    """-> (candidates, refusals), sites in order, `keep` first at each. `named`: the user asked for these rewrites.
    pricing: where latency is asked."""
    prober = Prober(gm, probed(gm, sites, calibration))
    sizes = sizes_of(gm, calibration)
    by_name = {site.name: site for site in sites}
    with_me = {name: tie.sites for tie in ties if tie.by == "spec" for name in tie.sites}
    groups = dict.fromkeys(with_me.get(name, (name,)) for name in by_name)
    tasks = (partial(_tried, [by_name[n] for n in group], rewrites, calibration, budget, named, pricing)
             for group in groups)  # fmt: skip
    tried: dict[str, Tried] = {}
    candidates: list[Candidate] = []
    refusals: list[tuple[str, str, str]] = []
    with closing(ahead(tasks)) as found:
        for name in tqdm(by_name, "propose", unit="site", disable=not progress, leave=False):
            if name not in tried:
                tried.update({one.site: one for one in next(found)})
            site, one = by_name[name], tried.pop(name)
            kappas = {p.family: _kappa(prober, site, p) for p in one.probes(prober.rows_read(site))}
            candidates.append(_candidate(site, Recipe(), 0.0, 0.0, sizes))
            for trial in one.trials:
                storage, family = trial.recipe.storage, family_of(site, type(trial.recipe.structure))
                loss = price(kappas, family, storage.name if storage else "", trial.structure_error, trial.error)
                candidates.append(_candidate(site, trial.recipe, trial.error, loss, sizes))
            refusals += [(name, rewrite, why) for rewrite, why in one.refused]
    candidates, disagreed = agreed(candidates, unit_ties(sites, candidates))
    return candidates, refusals + disagreed


def _tried(
    sites: Sequence[Site],
    rewrites: Sequence[type[Rewrite]],
    calibration: Calibration,
    budget: Budget,
    named: bool,
    pricing: Pricing | None,
) -> list[Tried]:
    """Some tied sites, with all that is known of each but how the model minds it."""
    made = trials_of([calibration.informed(site) for site in sites], rewrites, budget, named, pricing)
    return [Tried(s.name, trials, refused, probes_of(s, trials)) for s, trials, refused in made]


def trials_of(
    sites: Sequence[Site],
    rewrites: Sequence[type[Rewrite]],
    budget: Budget,
    named: bool = False,
    pricing: Pricing | None = None,
) -> list[tuple[Site, list[Trial], list[tuple[str, str]]]]:
    """-> (site, recipes that save at least the budget's `min_gain` of its bytes, refusals) for each of some tied sites.

    What is promising at one of them is made at all: they can only choose what they have in common.
    """
    drafts = [_draft(site, rewrites, budget, named, pricing) for site in sites]
    wanted = set[str]().union(*(d.promising for d in drafts))
    return [(d.site, d.trials + _measured(d, wanted), d.refused) for d in drafts]


def probed(gm: SignedModule, sites: Sequence[Site], calibration: Calibration) -> list[Call]:
    """The held-out calls, or so much of each that running all of them takes PROBE_FLOPS: probes are many."""
    calls = calibration.held_out
    sizes = [gm.signature.symbols(*call) for call in calls]
    flops = sum(flops_of(Recipe(), site, each) for each in sizes for site in sites)
    return [unpadded(gm, c) for c in thinned(calls, PROBE_FLOPS / max(flops, 1.0), whole=not is_divisible(gm))]


def unpadded(gm: SignedModule, call: Call) -> Call:
    """The call without the columns at its end that no example reads, as its attention mask tells; as it is where it has
    none, or was captured for one length."""
    mask, (leaves, spec) = mask_of(call[1]), pytree.tree_flatten(call)
    slots = gm.signature.slots
    at = next((slot.dims[1] for slot, leaf in zip(slots, leaves) if leaf is mask and len(slot.dims) == 2), 0)
    if mask is None or mask.is_floating_point() or isinstance(at, int):
        return call
    read = mask.ne(0).any(0).nonzero()
    length = max(at[1], 1 + int(read[-1])) if len(read) else mask.shape[1]
    for i, slot in enumerate(slots):
        for axis, dim in enumerate(slot.dims):
            if dim == at:
                leaves[i] = leaves[i].narrow(axis, 0, length)
    cut: Call = pytree.tree_unflatten(leaves, spec)
    return cut


def _measured(draft: Draft, wanted: set[str]) -> list[Trial]:
    """What is wanted, made; of a large weight only a few of each structure and storage: what storing adds hardly
    depends on how much of the weight they keep, and between those that are made it is a line in their bytes. Where it
    is surely little beside what the largest of them loses itself, the smallest is all that is made."""
    site = draft.site
    groups: dict[Hashable, list[Trial]] = {}
    for e in draft.estimates:
        if str(e.recipe) in wanted:
            alone = site.weight.numel() <= MADE_EACH or e.recipe.storage is None
            groups.setdefault(str(e.recipe) if alone else (e.recipe.structure.name, e.recipe.storage), []).append(e)
    found: dict[str, Trial] = {}
    for group in groups.values():
        own = [_own_error(e.recipe.structure, site) for e in group]  # a tied site may want what was hopeless here
        by_size = sorted(range(len(group)), key=lambda i: group[i].bytes)
        smallest, *others = [by_size[i] for i in sorted({0, len(group) // 2 if len(group) > 4 else 0, len(group) - 1})]
        added = {smallest: max(_error(site, group[smallest].recipe) - own[smallest], 0.0)}
        if added[smallest] + DOUBT * own[smallest] > MINOR * own[by_size[-1]]:
            added |= {i: max(_error(site, group[i].recipe) - own[i], 0.0) for i in others}
        told = np.interp([e.bytes for e in group], [group[i].bytes for i in added], [*added.values()])
        found.update({str(e.recipe): Trial(e.recipe, e.bytes, o, o + float(a)) for e, o, a in zip(group, own, told)})
    return [found[str(e.recipe)] for e in draft.estimates if str(e.recipe) in found]


def _draft(
    site: Site, rewrites: Sequence[type[Rewrite]], budget: Budget, named: bool, pricing: Pricing | None
) -> Draft:
    trials: list[Trial] = []
    refused: list[tuple[str, str]] = []
    most = (1 - budget.min_gain) * site.dense_bytes
    weighed = [r for r in rewrites if not _refused(r, site, budget, named, refused)]
    storages = [r for r in weighed if issubclass(r, Storage)]
    for storage in storages:
        for instance, error in storage.dense_errors(site).items():
            recipe = Recipe(storage=instance)
            trials.append(Trial(recipe, recipe.net_bytes(site), 0.0, error))
    trials = [t for t in trials if t.bytes <= most]
    if storages and not trials:
        refused.append((storages[0].name, f"nothing saves {budget.min_gain:.0%} of {site.dense_bytes} bytes"))
    # Where flops count, fewer bytes and less error do not make up for a dense product: no structure is dropped.
    estimates: list[Trial] = []
    kept: set[str] = set()
    for structure in (r for r in weighed if issubclass(r, Structure)):
        judged = budget.flops is None and not structure.joint
        alone = [t for t in trials + estimates if not t.recipe.structure.joint]
        rivals = Hull.of([(t.bytes, t.error) for t in alone] + [(site.dense_bytes, 0.0)]) if judged else NOTHING
        mine = _estimates(site, structure, storages, trials, most, 1.0 if named else MOST_LOST, rivals)
        family = family_of(site, structure)
        kin = mine + [e for e in estimates if family_of(site, type(e.recipe.structure)) == family]
        good = {str(e.recipe) for e in (_promising(mine, kin, rivals) if judged else mine)}
        if pricing is not None and judged:
            good |= {str(e.recipe) for e in _faster(_promising(mine, mine, NOTHING), site, trials, pricing)}
        if not good:
            refused.append((structure.name, _why_not(mine)))
        estimates += mine
        kept |= good
    return Draft(site, trials, estimates, kept, refused)


def _why_not(estimates: Sequence[Trial]) -> str:
    if estimates:
        return "quantized dense weights, or a structure tried before it, are closer at the same bytes"
    return f"every form of it that saves enough loses more than {MOST_LOST:.0%} of the squared output"


def _estimates(
    site: Site,
    structure: type[Structure],
    storages: Sequence[type[Storage]],
    dense: Sequence[Trial],
    most: float,
    most_lost: float,
    rivals: Hull,
) -> list[Trial]:
    """Every instance with every storage of its factors; errors: its own plus that storage's on the dense weight.

    One that a rival beats by its bound alone is not computed and keeps its bound for an error: what it could beat
    because of that, the same rival beats too. Largest first: what loses least bounds the rest of its series.
    """
    added: dict[Storage | None, float] = {t.recipe.storage: t.error for t in dense} | {None: 0.0}
    kinds = (None, *(s for kind in storages for s in kind.for_factors(site)))

    def hopes(recipe: Recipe, bound: float) -> bool:
        return not rivals.beats(recipe.net_bytes(site), bound + added.get(recipe.storage, 0.0))

    found: list[list[Trial]] = []
    before: dict[Hashable, tuple[Structure, float]] = {}
    for instance in reversed([*structure.space(site)]):
        stored = kinds if instance.matrices(site) else (None,)
        recipes = [r for s in stored if (r := Recipe(instance, s)).net_bytes(site) <= most]
        own = instance.bound_from(site, *before[instance.series()]) if instance.series() in before else 0.0
        closer = instance.rising_errors(site)
        while own <= most_lost and any(hopes(r, own) for r in recipes) and (bound := next(closer, None)) is not None:
            own = max(own, bound)
        if not recipes or own > most_lost:
            continue
        before[instance.series()] = instance, own
        found.append([Trial(r, r.net_bytes(site), own, own + added.get(r.storage, 0.0)) for r in recipes])
    return [t for trials in reversed(found) for t in trials if t.structure_error <= most_lost]


def _own_error(structure: Structure, site: Site) -> float:
    """Of the structure before anything is stored."""
    return max(structure.rising_errors(site))


def _promising(estimates: Sequence[Trial], kin: Sequence[Trial], rivals: Hull) -> list[Trial]:
    """Those that no estimate of the same family dominates, and no rival beats clearly."""
    return [
        e
        for e in estimates
        if not rivals.beats(e.bytes, e.error) and not any(o.bytes <= e.bytes and o.error < e.error for o in kin)
    ]


def _faster(estimates: Sequence[Trial], site: Site, dense: Sequence[Trial], pricing: Pricing) -> list[Trial]:
    """Those that take clearly less time than any way to store the dense weight, and than the weight as it is."""
    rivals = [Recipe(), *(t.recipe for t in dense)]
    least = min(pricing.latency(recipe, site) for recipe in rivals)
    return [e for e in estimates if pricing.latency(e.recipe, site) < FASTER * least]


def _error(site: Site, recipe: Recipe) -> float:
    """Squared relative error of the recipe, carried out."""
    if recipe.storage is None:
        return _own_error(recipe.structure, site)
    return recipe.error(site, recipe.make(site).weight)


def sizes_of(gm: SignedModule, calibration: Calibration) -> dict[str, int]:
    """The value of every size symbol in the first held-out batch."""
    return gm.signature.symbols(*calibration.held_out[0])


def flops_of(recipe: Recipe, site: Site, sizes: Mapping[str, int]) -> float:
    """Of one forward at `sizes`; symbols that are no input's size count as 1."""
    flops = sympy.sympify(recipe.cost(site).at(**sizes).flops)
    return float(flops.xreplace({s: sympy.Integer(1) for s in flops.free_symbols}))


def _candidate(site: Site, recipe: Recipe, squared: float, loss: float, sizes: Mapping[str, int]) -> Candidate:
    return Candidate(
        site.name, str(recipe), recipe.net_bytes(site), flops_of(recipe, site, sizes), squared**0.5, loss
    )


def _refused(
    rewrite: type[Rewrite], site: Site, budget: Budget, named: bool, refused: list[tuple[str, str]]
) -> bool:
    why = rewrite.refuses(site) or (None if named else rewrite.unasked(site, budget))
    if why:
        refused.append((rewrite.name, why))
    return why is not None


def _kappa(prober: Prober, site: Site, probe: Probe) -> float:
    """How much the model minds what the family loses at the site."""
    return kappa(prober.loss(site, probe.weight, probe.bias), probe.error)
