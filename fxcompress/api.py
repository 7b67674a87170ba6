"""compile: capture -> sites -> calibrate -> propose -> select -> rewrite -> fuse -> verify -> report.

Every stage takes a runnable graph and leaves one. The caller's model, its mode, the random state and torch's settings
are not touched.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, overload

import torch
from torch import nn

from fxcompress import lowering, profiling
from fxcompress.carrying_out import carry_out, check_fit
from fxcompress.checkpoint import predicted_overhead
from fxcompress.codegen.cpu.module import LoweredModule, Target
from fxcompress.core.budget import Budget
from fxcompress.core.calibrate import Calibration, bind_batch, calibrate
from fxcompress.core.capture import capture, example_of, split_inputs
from fxcompress.core.divergence import Kind, kind_of, mask_of, named_outputs
from fxcompress.core.errors import BudgetError, CalibrationError, CaptureError, SpecError
from fxcompress.core.plan import Plan, SiteInfo
from fxcompress.core.rewrite import Rewrite
from fxcompress.core.signature import SignedModule
from fxcompress.core.site import find_sites
from fxcompress.core.surgery import stored_bytes
from fxcompress.core.ties import parallel
from fxcompress.core.workload import Workload, bind, parse_workload, shape_of
from fxcompress.cost_model.select import choose
from fxcompress.leaves import Compressed
from fxcompress.lowering import check_target
from fxcompress.measuring import measured
from fxcompress.passes import REWRITES
from fxcompress.passes.latency import Pricing, priced
from fxcompress.passes.propose import propose
from fxcompress.passes.unit_groups import find_roles, take_roles, unit_ties
from fxcompress.read_back import ReadsBack

log = logging.getLogger("fxcompress")


@overload
def compile(
    model: nn.Module,
    budget: Budget | str | float | None = None,
    *,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
    calibration: Iterable[Any] | None = None,
    rewrites: Sequence[str | type[Rewrite]] | None = None,
    plan: Plan | None = None,
    progress: bool = True,
    staged: bool = False,
    lower: None = None,
    workload: Iterable[Any] | None = None,
) -> SignedModule: ...


@overload
def compile(
    model: nn.Module,
    budget: Budget | str | float | None = None,
    *,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
    calibration: Iterable[Any] | None = None,
    rewrites: Sequence[str | type[Rewrite]] | None = None,
    plan: Plan | None = None,
    progress: bool = True,
    staged: bool = False,
    lower: Target,
    workload: Iterable[Any] | None = None,
) -> LoweredModule: ...


def compile(
    model: nn.Module,
    budget: Budget | str | float | None = None,
    *,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
    calibration: Iterable[Any] | None = None,
    rewrites: Sequence[str | type[Rewrite]] | None = None,
    plan: Plan | None = None,
    progress: bool = True,
    staged: bool = False,
    lower: Target | None = None,
    workload: Iterable[Any] | None = None,
) -> SignedModule | LoweredModule:
    """A smaller model with the same inputs and outputs, as an `fx.GraphModule` with `.plan` and `.report`.

    budget: `"4x"`, `"25%"`, `"12 MB"`, 0.25, or `Budget(size=…, error=…, flops=…, latency=…)`.
    example_inputs: a tuple of positional or a dict of keyword inputs; by default the first calibration batch, or, for a
        Hugging Face model, inputs made from its config.
    calibration: any iterable of such inputs (a few hundred examples); without it weights are rounded in their own
        metric.
    rewrites: names or classes to choose from, by default all of `fxcompress.passes.REWRITES`.
    plan: choices to replay; with a `budget` as well, the plan's candidates are chosen from anew and nothing is priced
        again.
    staged: collect what rounds and factorizes each weight anew behind the weights already compressed
        (fxcompress.staged), for another pass over the batches, which are kept until then. Not always less error: at 6x
        stories260K .0731 for .0780, vit_mnist .0462 for .0447; MiniLM at 8x .1184 for .1181.
    lower: "eager" or "inductor": hand the result to `fxcompress.lower`. What it returns is fast here and cannot be
        saved.
    workload: what latency is of: `[("decode", 1, 1), ("prefill", 8, 512, 0.3)]`, (name, batch, sequence, calls); by
        default one call of the example inputs' shape. With it, or with `Budget(latency=…)`, seconds are predicted from
        this machine's profile (measured first where there is none: two minutes), for the model lowered to `lower`, or
        to what the plan was made for, or else "inductor"; and measured at the end, beside the original run the same
        way (seconds for "eager", minutes of compiling for "inductor").

    Raises `BudgetError`, `InfeasibleBudgetError`, `CaptureError`, `CalibrationError`, `LoweringError`,
    `NonFiniteError`, `PlanError`, `SpecError` or `WorkloadError`.
    """
    if budget is None and plan is None:
        raise BudgetError('compile needs a budget such as "4x", or a plan to replay.')
    if lower is not None:
        check_target(lower)
    wanted = Budget.parse(budget) if budget is not None else None
    allowed, asked = resolve(rewrites), None if workload is None else parse_workload(workload)
    with untouched():
        original, known = observe(model, example_inputs, calibration, progress, staged=staged)
        pricing = _pricing(original, known, wanted, plan, asked, example_inputs, lower, progress)
        if plan is None:
            assert wanted is not None
            plan = price(original, allowed, known, wanted, progress, rewrites is not None, pricing)
        else:
            if pricing is not None and (plan.workload, plan.target) != (pricing.workload, pricing.target):
                check_fit(plan, find_sites(original))
                plan = priced(plan, original, take_roles(find_sites(original), find_roles(original)), pricing)
            plan = plan if wanted is None else choose(plan, wanted)
        if plan.calibrated and not known.calibrated:
            log.warning("the plan was made with calibration data and is replayed without: rounding will lose more.")
        compiled = carry_out(original, known, plan, wanted)
        if not compiled.plan.workload:
            return compiled if lower is None else lowering.lower(compiled, lower)
        target = lower or compiled.plan.target
        lowered = lowering.lower(compiled, target)
        report = measured(original, compiled, lowered, target, known.held_out[0])
        if missed := report.missed_latency(compiled.plan.budget):
            log.warning("%s", missed)
    return compiled if lower is None else lowered


def plan_only(
    model: nn.Module,
    budget: Budget | str | float,
    *,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
    calibration: Iterable[Any] | None = None,
    rewrites: Sequence[str | type[Rewrite]] | None = None,
    progress: bool = True,
    lower: Target | None = None,
    workload: Iterable[Any] | None = None,
) -> Plan:
    """The plan `compile` would carry out, with the same arguments; no model is made, so its size is a prediction."""
    if lower is not None:
        check_target(lower)
    wanted, allowed = Budget.parse(budget), resolve(rewrites)
    asked = None if workload is None else parse_workload(workload)
    with untouched():
        original, known = observe(model, example_inputs, calibration, progress)
        pricing = _pricing(original, known, wanted, None, asked, example_inputs, lower, progress)
        return price(original, allowed, known, wanted, progress, rewrites is not None, pricing)


def price(
    original: SignedModule,
    rewrites: Sequence[type[Rewrite]],
    known: Calibration,
    budget: Budget,
    progress: bool,
    named: bool = False,
    pricing: Pricing | None = None,
) -> Plan:
    """Every candidate of every site, and the best choice of them under `budget`."""
    sites = take_roles(find_sites(original), find_roles(original, known.informed))
    ties = parallel(sites)
    allowed = () if budget.as_it_is else rewrites
    candidates, refusals = propose(original, sites, ties, allowed, known, budget, named, progress, pricing)
    ties += unit_ties(sites, candidates)
    total = stored_bytes(original)
    table = Plan(
        sites=tuple(SiteInfo(s.name, s.kind, s.rows, s.columns) for s in sites),
        choices=(),
        candidates=tuple(candidates),
        refusals=tuple(refusals),
        ties=tuple(ties),
        budget=budget,
        original_bytes=original.meta["original_bytes"],
        fixed_bytes=total - sum(s.dense_bytes for s in sites),
        kind=_kind(original, known),
        calibrated=known.calibrated,
        gap=0.0,
    )
    if pricing is not None:
        table = priced(table, original, sites, pricing)
    return choose(replace(table, fixed_bytes=table.fixed_bytes + predicted_overhead(original, table)), budget)


def _pricing(
    original: SignedModule,
    known: Calibration,
    budget: Budget | None,
    plan: Plan | None,
    workload: tuple[Workload, ...] | None,
    example: tuple[Any, ...] | dict[str, Any] | None,
    lower: Target | None,
    progress: bool,
) -> Pricing | None:
    """How seconds are told, where latency is asked and `plan` does not hold them; this machine is measured if need be.
    """
    if workload is None and (budget is None or budget.latency is None):
        return None
    told = plan if plan is not None and plan.workload else None
    if told is not None and workload in (None, told.workload) and lower in (None, told.target):
        return None
    if workload is None and told is not None:
        workload = told.workload
    if workload is None:
        call = known.held_out[0] if example is None else bind_batch(original, example, 0)
        workload = (shape_of(original, call),)
    for one in workload:
        bind(original, one)  # before minutes are spent on a profile
    target: Target = lower or (told.target if told is not None else "inductor")  # type: ignore[assignment]
    profile = profiling.cached() or profiling.profile(progress)
    return Pricing.of(original, workload, profile, target)


def resolve(rewrites: Sequence[str | type[Rewrite]] | None) -> tuple[type[Rewrite], ...]:
    """Names or classes -> classes. Raises `SpecError`."""
    if rewrites is None:
        return REWRITES
    if isinstance(rewrites, str):
        rewrites = [rewrites]
    names = {r.name: r for r in REWRITES}
    unknown = [r for r in rewrites if isinstance(r, str) and r not in names]
    if unknown:
        raise SpecError(f"unknown rewrite {unknown[0]!r}; known are {', '.join(names)}.")
    return tuple(names[r] if isinstance(r, str) else r for r in rewrites)


def observe(
    model: nn.Module,
    example: tuple[Any, ...] | dict[str, Any] | None,
    batches: Iterable[Any] | None,
    progress: bool,
    trainable: bool = False,
    staged: bool = False,
) -> tuple[SignedModule, Calibration]:
    """Capture, then run the calibration batches; without any, the example inputs are all there is to judge by."""
    if staged and batches is None:
        raise CalibrationError("staged=True collects statistics anew, and there are none: give calibration=batches.")
    _refuse_compressed(model)
    batches, first = _peek(batches)
    example = example if example is not None else first if first is not None else example_of(model)
    original = capture(model, example, trainable)
    if batches is not None:
        return original, calibrate(original, find_sites(original), batches, progress, staged)
    call = bind_batch(original, example, 0)
    return original, Calibration(held_out=[call], examples=1, calibrated=False, has_held_out=False)


def _refuse_compressed(model: nn.Module) -> None:
    """Raises `CaptureError` where weights are compressed already: what is left would be taken for the whole."""
    held = ((path, m) for path, m in model.named_modules() if isinstance(m, Compressed | ReadsBack))
    leaf = next((f"{path} is a {type(m).__name__}" for path, m in held), None)
    if leaf is None and isinstance(model, SignedModule) and "plan" in model.meta:
        leaf = "this is what compile or load returned"
    if leaf is not None:
        raise CaptureError(
            f"the model is compressed already ({leaf}): give the original. For another budget from the same prices, "
            "give it with plan=compiled.plan."
        )


def _kind(gm: SignedModule, known: Calibration) -> Kind:
    args, kwargs = known.held_out[0]
    with torch.no_grad():
        return kind_of(named_outputs(gm(*args, **kwargs), mask_of(kwargs)))


def _peek(batches: Iterable[Any] | None) -> tuple[Iterable[Any] | None, Any]:
    """-> (the same batches, the first of them in the form example_inputs take)."""
    if batches is None:
        return None, None
    if isinstance(batches, torch.Tensor | dict | str) or not hasattr(batches, "__iter__"):
        raise CalibrationError(
            f"calibration is a {type(batches).__name__}; give an iterable of batches, such as a list of input dicts."
        )
    if hasattr(batches, "__len__"):
        first = next(iter(batches), None)
    else:
        iterator = iter(batches)
        first = next(iterator, None)
        batches = itertools.chain([first], iterator) if first is not None else ()
    if first is None:
        raise CalibrationError(
            "calibration is empty: give at least one batch of inputs, or calibration=None to go without data."
        )
    args, kwargs = split_inputs(first)
    return batches, kwargs or args


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """The caller's random state, whatever a library draws meanwhile."""
    with torch.random.fork_rng(devices=[]):
        yield

