"""Hidden units cut out of a whole model: every group, or those that are named, at one stroke.

    linear (1536, 384) -> gelu -> linear (384, 1536)    becomes    linear (1152, 384) -> gelu -> linear (384, 1152)

Groups come from fxcompress.passes.dependency, the units to keep and the refitted consumers from
fxcompress.passes.hidden_units, the smaller graph from fxcompress.core.resize. All groups are judged on the inputs of
the model as it was.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from fxcompress.core.calibrate import Calibration
from fxcompress.core.errors import SpecError
from fxcompress.core.metric import corrected_bias, local_error
from fxcompress.core.signature import SignedModule
from fxcompress.core.site import Site, find_sites
from fxcompress.core.surgery import attribute_of, finish, own_tensors
from fxcompress.passes.dependency import HiddenGroup, find_groups
from fxcompress.passes.hidden_units import HiddenUnits, order_of_removal, refit, units_left
from fxcompress.passes.unit_groups import shrink


@dataclass(frozen=True, eq=False)
class Removal:
    """What one group keeps, and what its consumers become."""

    group: HiddenGroup
    kept: Tensor  # unit numbers, ascending
    weights: dict[str, Tensor]  # by site: W' (rows, columns) in the dtype of W, zero at what is removed
    # By site: ||y - y'|| / ||y|| over the calibration inputs; over those held out, where some were: they also chose one
    # number, the damping, of the refit.
    errors: dict[str, float]


def remove(consumers: Sequence[Site], group: HiddenGroup, kept: int) -> Removal:
    """The best `kept` units of `group`, found greedily, and the consumers refitted to them."""
    left = units_left(order_of_removal(consumers, group, group.units - kept), group.units, kept)
    weights = {s.name: refit(s, group.span_of(s), left).to(s.weight.dtype) for s in consumers}
    return Removal(group, left, weights, {s.name: local_error(s, weights[s.name]) ** 0.5 for s in consumers})


def prune_hidden_units(
    gm: SignedModule, calibration: Calibration | None, keep: float | Mapping[str, int | float] = 0.75
) -> SignedModule:
    """A smaller dense copy of a captured graph; `gm` stays as it is.

    calibration: what `calibrate(gm, find_sites(gm), batches)` saw; None chooses by the norm of the columns alone.
    keep: the share of its units each group keeps, or by glob on the names of its sites (the first pattern that matches
        any of them wins) a number of units or a share of them; groups that no pattern names are left whole.

    Parameters need gradients where those of `gm` did. Raises `SpecError`.
    """
    work = gm.copy()
    for told in ("plan", "report"):  # they are of the model before
        work.meta.pop(told, None)
    counts = _counts(work, keep)
    sites = {site.name: site for site in find_sites(work)}
    tensors: dict[str, Tensor] = {}
    removals = []
    for group, kept in counts:
        consumers = [sites[name] for name in group.consumers]
        consumers = consumers if calibration is None else [calibration.informed(site) for site in consumers]
        removals.append(remove(consumers, group, kept))
        for site in consumers:
            tensors.update(_refitted(site, removals[-1].weights[site.name]))
    # after every refit: one site may read one group and make another
    shrink(work, [(removal.group, removal.kept) for removal in removals], tensors)
    finish(work)
    trained = {name for name, parameter in gm.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    own_tensors(work)
    for name, parameter in work.named_parameters():
        parameter.requires_grad_(name in trained)
    return work


def _refitted(site: Site, weight: Tensor) -> dict[str, Tensor]:
    """The stored tensors of a consumer, by path, at their old sizes."""
    tensors = {site.paths[0]: weight.T if site.transposed else weight}
    bias = site.uses[0].bias
    if bias is not None and site.correctable:
        tensors[str(bias.target)] = corrected_bias(site, weight, attribute_of(bias))
    return tensors


def _counts(gm: fx.GraphModule, keep: float | Mapping[str, int | float]) -> list[tuple[HiddenGroup, int]]:
    """How many units each group keeps, those that keep all of them left out."""
    groups, refused = find_groups(gm)
    wanted = {p: HiddenUnits(k) for p, k in (keep if isinstance(keep, Mapping) else {"*": keep}).items()}
    for pattern in wanted:
        if not any(_matches(group.sites, pattern) for group in groups):
            near = next((r for r in refused if _matches(r.producers + r.consumers, pattern)), None)
            said = "" if near is None else f" ({near.consumers[0]} reads units that cannot be cut: {near.why})"
            names = ", ".join(group.name for group in groups) or "none"
            raise SpecError(f"{pattern!r} names no site of a group of hidden units{said}; groups are {names}.")
    counts = []
    for group in groups:
        asked = next((units for pattern, units in wanted.items() if _matches(group.sites, pattern)), None)
        kept = group.units if asked is None else asked.count(group)
        if kept < group.units:
            counts.append((group, kept))
    return counts


def _matches(names: Sequence[str], pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)
