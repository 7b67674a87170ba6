"""What sites share of an error that did not add up: their prices are put right, and the choice is made anew.

Squared errors of sites add up while each is small (fxcompress.cost_model.sensitivity); far beyond that they do not, and
a plan is then chosen by prices that do not hold where it stands. So each choice is taken back alone:

    share_i  = max(0, E(plan) - E(plan without i))
    w_i      = E(plan) share_i / (sum of shares) / loss_i         within 1/10 .. 10
    loss'    = w_i loss         for every candidate of site i

Now the prices add up to E(plan) at the plan, and say there what each site costs. Another plan is another place: the
choice made by the new prices is measured, and kept only where it is better.

Losses are of the original graph with the weights that the plan amounts to: sites + 1 forwards over the held-out calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fxcompress.core.calibrate import Call
from fxcompress.core.divergence import Divergence, mask_of, named_outputs
from fxcompress.core.frontier import reads_of
from fxcompress.core.plan import KEEP, Candidate, Plan
from fxcompress.core.signature import SignedModule
from fxcompress.core.site import Site

MOST = 10.0  # times a price may change: one measured share is no more certain than that


@dataclass(frozen=True)
class Shares:
    """whole: the loss of the plan. of: what taking each choice back alone leaves of it."""

    whole: float
    of: Mapping[str, float]


def shares(
    gm: SignedModule, sites: Sequence[Site], weights: Mapping[str, tuple[Tensor, Tensor | None]], calls: Sequence[Call]
) -> Shares:
    """weights: what each rewritten site amounts to, (rows, columns), and its bias where that changed as well."""
    twin = gm.copy()
    rewritten = [site for site in sites if site.name in weights]

    def put(site: Site, pair: tuple[Tensor, Tensor | None]) -> None:
        for read in reads_of(twin, site):  # a tied weight has paths that no node reads, and the copy has not
            _set(twin, str(read.target), site.stored(pair[0]))
        if pair[1] is not None and site.uses[0].bias is not None:
            _set(twin, str(site.uses[0].bias.target), pair[1])

    own = {site.name: (site.weight, _bias(gm, site)) for site in rewritten}
    with torch.no_grad():
        references = [_outputs(gm, call) for call in calls]
        for site in rewritten:
            put(site, weights[site.name])
        whole = _loss(twin, calls, references)
        left = {}
        for site in rewritten:
            put(site, own[site.name])
            left[site.name] = whole - _loss(twin, calls, references)
            put(site, weights[site.name])
    return Shares(whole, {name: max(0.0, share) for name, share in left.items()})


def corrected(plan: Plan, measured: float, of: Mapping[str, float]) -> Plan:
    """`plan` with every price multiplied by its site's w; the choices stay, and add up to `measured`, the loss."""
    total = sum(of.values())
    factors = {
        choice.site: min(MOST, max(1 / MOST, measured * of[choice.site] / total / choice.loss))
        for choice in plan.choices
        if choice.spec != KEEP and choice.loss > 0 and total > 0 and choice.site in of
    }
    # Within its limits no factor may be enough; all together they are.
    priced = sum(c.loss * factors.get(c.site, 1.0) for c in plan.choices)
    even = measured / priced if priced > 0 else 1.0

    def put(candidate: Candidate) -> Candidate:
        return replace(candidate, loss=candidate.loss * factors.get(candidate.site, 1.0) * even)

    return replace(plan, candidates=tuple(map(put, plan.candidates)), choices=tuple(map(put, plan.choices)))


def _set(module: nn.Module, path: str, value: Tensor) -> None:
    owner, _, leaf = path.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def _bias(gm: SignedModule, site: Site) -> Tensor | None:
    node = site.uses[0].bias
    return None if node is None else gm.get_parameter(str(node.target)).detach()


def _outputs(gm: SignedModule, call: Call) -> dict[str, Tensor]:
    args, kwargs = call
    return named_outputs(gm(*args, **kwargs), mask_of(kwargs))


def _loss(gm: SignedModule, calls: Sequence[Call], references: Sequence[dict[str, Tensor]]) -> float:
    divergence = Divergence()
    for call, reference in zip(calls, references):
        divergence.add(reference, _outputs(gm, call))
    return divergence.loss
