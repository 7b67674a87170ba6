"""Carrying a plan out: rewrite, fuse, verify, and choose anew where what was measured is not what was promised."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from fxcompress.checkpoint import attach, bytes_on_disk
from fxcompress.core.budget import Budget
from fxcompress.core.calibrate import Calibration
from fxcompress.core.divergence import additive
from fxcompress.core.errors import InfeasibleBudgetError, PlanError
from fxcompress.core.plan import KEEP, Plan
from fxcompress.core.signature import SignedModule
from fxcompress.core.site import Site, find_sites
from fxcompress.core.surgery import finish, own_tensors
from fxcompress.core.verify import compare
from fxcompress.cost_model.corrections import corrected, shares
from fxcompress.cost_model.select import choose
from fxcompress.passes import REWRITES
from fxcompress.passes.fuse import fuse
from fxcompress.passes.hidden_units import Role
from fxcompress.passes.recipe import parse
from fxcompress.passes.unit_groups import cut_between, find_roles, take_roles
from fxcompress.report import Report, SiteReport
from fxcompress.staged import Fixed, watched

log = logging.getLogger("fxcompress")

SIZE_ROUNDS = 4  # measured sizes settle after one or two
MARGIN = 64  # bytes left from the second round on, more each time: how well files compress changes with every choice
WASTE = 0.004  # of the size: more room than this left by the files around the tensors is used in a second round
CORRECTIONS = 2  # plans after the first
SLIGHT = 0.01  # errors below it are not worth a second choice
SLACK = 256  # bytes by which the files around the tensors of two plans of one small model differ
TIMES_BYTES = 64  # of a compressed file, for what a report adds about a workload once it is measured
OFF = 1.25  # measured over predicted error, either way, from which prices are corrected


def carry_out(original: SignedModule, known: Calibration, plan: Plan, budget: Budget | None) -> SignedModule:
    """Rewrite, and keep the promise of the budget; where the prices did not hold, correct them and choose anew."""
    roles, seen = find_roles(original, known.informed), watched(original, known)
    best = _meet(original, known, plan, budget, roles, seen, None)
    first = best.plan.predicted_error
    for _ in range(CORRECTIONS if budget is not None and plan.calibrated else 0):
        if not _is_off(best.report):
            break
        assert budget is not None
        found = shares(original, *_weights(original, best.plan, roles, seen), known.held_out)
        loss = additive(best.report.measured_error, best.plan.kind)
        priced = replace(corrected(best.plan, loss, found.of), budget=budget)
        log.info("predicted error %.4g, measured %.4g", best.plan.predicted_error, best.report.measured_error)
        other = _retried(original, known, priced, budget, roles, seen, first)
        if other is None or other.report.measured_error >= best.report.measured_error:
            # The same choices, at prices that hold there.
            return _meet(original, known, priced, budget, roles, seen, first)
        best = other
    return best


def _is_off(report: Report) -> bool:
    predicted, measured = report.predicted_error, report.measured_error
    return max(predicted, measured) >= SLIGHT and not predicted / OFF <= measured <= predicted * OFF


def _retried(
    original: SignedModule, known: Calibration, priced: Plan, budget: Budget, roles: Mapping[str, Role | str],
    seen: Fixed, first: float,
) -> SignedModule | None:  # fmt: skip
    """What the new prices choose; None where that is what there is already, or the budget cannot be met with it."""
    try:
        plan = choose(priced, budget)
        same = [c.spec for c in plan.choices] == [c.spec for c in priced.choices]
        return None if same else _meet(original, known, plan, budget, roles, seen, first)
    except InfeasibleBudgetError:
        return None


def _weights(
    original: SignedModule, plan: Plan, roles: Mapping[str, Role | str], seen: Fixed
) -> tuple[list[Site], dict[str, tuple[Tensor, Tensor | None]]]:
    """The sites, and what each rewritten weight amounts to."""
    sites = take_roles(find_sites(original), roles)
    specs = {choice.site: choice.spec for choice in plan.choices if choice.spec != KEEP}
    found, seen = {}, seen.begun()
    for site in sites:
        if site.name in specs:
            made, _ = seen.make(site, parse(specs[site.name], REWRITES))
            if made.weight.shape == site.weight.shape:  # cut units are no weight of that shape
                found[site.name] = (made.weight, made.bias)
    return sites, found


def _meet(
    original: SignedModule, known: Calibration, plan: Plan, budget: Budget | None, roles: Mapping[str, Role | str],
    seen: Fixed, first: float | None,
) -> SignedModule:  # fmt: skip
    """Rewrite; where the measured size or error breaks the promise, choose anew with what was measured, and rewrite.
    Where much room is left in the end, a plan that is thought to be slightly too large is tried as well."""
    room, target = budget, None if budget is None or budget.error is None else budget.error
    for turn in range(SIZE_ROUNDS):
        compiled = _carried(original, known, plan, roles, seen, first)
        total, measured = compiled.report.measured_bytes, compiled.report.measured_error
        if budget is None or room is None:
            return compiled
        size = budget.size_bytes(plan.original_bytes)
        too_big = size is not None and total > size and size < plan.original_bytes
        too_wrong = target is not None and measured > target
        wasteful = size is not None and turn == 0 and plan.predicted_bytes - total > WASTE * plan.predicted_bytes
        if not too_big and not too_wrong and not wasteful:
            if size is None or size - total <= WASTE * size:
                return compiled
            other = _filled(plan, room, budget, total)
            fuller = None if other is None else _carried(original, known, other, roles, seen, first)
            return compiled if fuller is None or not _is_better(fuller.report, compiled.report, size) else fuller
        if too_wrong:
            assert room.error is not None
            assert target is not None
            room = replace(room, error=room.error * 0.98 * target / measured)
        log.info("round: %d bytes and error %.4g against %s; choosing again", total, measured, budget)
        fixed = plan.fixed_bytes + (total - plan.predicted_bytes if too_big or wasteful else 0)
        plan = replace(choose(replace(plan, fixed_bytes=fixed + turn * MARGIN), room), budget=budget)
    raise InfeasibleBudgetError(
        f"budget {budget} was not met in {SIZE_ROUNDS} rounds: the best found has {total} bytes and error "
        f"{measured:.4g} on held-out batches. Ask for less, or give more calibration data."
    )


def _carried(
    original: SignedModule, known: Calibration, plan: Plan, roles: Mapping[str, Role | str], seen: Fixed,
    first: float | None,
) -> SignedModule:  # fmt: skip
    """The plan carried out and measured: `.report` holds its bytes on disk and its error."""
    compiled, reports = _rewrite(original, plan, roles, seen)
    error = compare(original, compiled, known.held_out).error
    report = replace(_report(plan, reports, error, known, plan.predicted_bytes), first_error=first)
    attach(compiled, original.signature, plan, report)
    total = bytes_on_disk(compiled) + TIMES_BYTES * len(plan.workload)
    return attach(compiled, original.signature, plan, replace(report, measured_bytes=total))


def _filled(plan: Plan, room: Budget, budget: Budget, total: int) -> Plan | None:
    """What would be chosen if its files took SLACK bytes less than those of `plan`, `total` in all: descriptions that
    are all alike compress better. None where that is the same."""
    fixed = plan.fixed_bytes + total - plan.predicted_bytes - SLACK
    other = replace(choose(replace(plan, fixed_bytes=fixed), room), budget=budget, fixed_bytes=fixed + SLACK)
    return None if [c.spec for c in other.choices] == [c.spec for c in plan.choices] else other


def _is_better(one: Report, other: Report, size: float) -> bool:
    """`one` fits, and no more is lost."""
    return one.measured_bytes <= size and one.measured_error <= other.measured_error


def _rewrite(
    original: SignedModule, plan: Plan, roles: Mapping[str, Role | str], seen: Fixed
) -> tuple[SignedModule, list[SiteReport]]:
    """A copy of the graph with every choice of the plan carried out."""
    work = original.copy()
    sites = {s.name: s for s in take_roles(find_sites(work), roles)}
    check_fit(plan, sites.values())
    recipes = {choice.site: parse(choice.spec, REWRITES) for choice in plan.choices}
    cut_between(work, sites, recipes)
    reports, seen = [], seen.begun()
    chosen = [c.site for c in plan.choices if c.spec != KEEP]
    settled = seen.all_settled([(sites[name], recipes[name]) for name in chosen])
    for choice in plan.choices:
        site = sites[choice.site]
        if choice.spec == KEEP:
            reports.append(SiteReport(site.name, KEEP, choice.bytes, site.dense_bytes, 0.0, 0.0))
            continue
        recipe = recipes[site.name]
        made, error = next(settled)
        stored = sum(t.numel() * t.element_size() for t in made.tensors.values()) - recipe.structure.freed_bytes(site)
        made.apply(work, site)
        reports.append(SiteReport(site.name, choice.spec, choice.bytes, stored, choice.error, error**0.5))
    finish(work)
    own_tensors(work)
    return fuse(work), reports


def _report(plan: Plan, sites: list[SiteReport], measured: float, known: Calibration, size: int) -> Report:
    return Report(
        budget=str(plan.budget),
        original_bytes=plan.original_bytes,
        predicted_bytes=plan.predicted_bytes,
        measured_bytes=size,
        kind=plan.kind,
        predicted_error=plan.predicted_error,
        measured_error=measured,
        examples=known.held_out_examples,
        held_out=known.has_held_out,
        calibrated=known.calibrated,
        sites=tuple(sites),
    )


def check_fit(plan: Plan, sites: Iterable[Site]) -> None:
    """Raises `PlanError` where the plan is of other sites."""
    of = {site.name: site for site in sites}
    for info in plan.sites:
        site = of.get(info.name)
        if site is None:
            raise PlanError(
                f"the plan was made for another model: it names {info.name!r}, and this model has no such site."
            )
        if (site.rows, site.columns) != (info.rows, info.columns):
            raise PlanError(
                f"the plan was made for another model: {info.name!r} is {info.rows} x {info.columns} in the plan and "
                f"{site.rows} x {site.columns} here."
            )
