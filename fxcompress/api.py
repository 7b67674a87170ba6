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

from fxcompress import lowering
from fxcompress.carrying_out import carry_out
from fxcompress.checkpoint import predicted_overhead
from fxcompress.codegen.cpu.module import LoweredModule, Target
from fxcompress.core.budget import Budget
from fxcompress.core.calibrate import Calibration, bind_batch, calibrate
from fxcompress.core.capture import capture, example_of, split_inputs
from fxcompress.core.divergence import Kind, kind_of, mask_of, named_outputs
from fxcompress.core.errors import BudgetError, CalibrationError, SpecError
from fxcompress.core.plan import Plan, SiteInfo
from fxcompress.core.rewrite import Rewrite
from fxcompress.core.signature import SignedModule
from fxcompress.core.site import find_sites
from fxcompress.core.surgery import stored_bytes
from fxcompress.core.ties import parallel
from fxcompress.cost_model.select import choose
from fxcompress.lowering import check_target
from fxcompress.passes import REWRITES
from fxcompress.passes.propose import propose
from fxcompress.passes.unit_groups import find_roles, take_roles, unit_ties

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
) -> SignedModule | LoweredModule:
    """A smaller model with the same inputs and outputs, as an `fx.GraphModule` with `.plan` and `.report`.

    budget: `"4x"`, `"25%"`, `"12 MB"`, 0.25, or `Budget(size=…, error=…, flops=…)`.
    example_inputs: a tuple of positional or a dict of keyword inputs; by default the first calibration batch, or, for a
        Hugging Face model, inputs made from its config.
    calibration: any iterable of such inputs (a few hundred examples); without it weights are rounded in their own
        metric.
    rewrites: names or classes to choose from, by default all of `fxcompress.passes.REWRITES`.
    plan: choices to replay; with a `budget` as well, the plan's candidates are chosen from anew and nothing is priced
        again.
    staged: collect what rounds and factorizes each weight anew behind the weights already compressed
        (fxcompress.staged): a little less error, for another pass over the calibration batches, which are kept until
        then.
    lower: "eager" or "inductor": hand the result to `fxcompress.lower`. What it returns is fast here and cannot be
        saved.

    Raises `BudgetError`, `InfeasibleBudgetError`, `CaptureError`, `CalibrationError`, `LoweringError`,
    `NonFiniteError`, `PlanError` or `SpecError`.
    """
    if budget is None and plan is None:
        raise BudgetError('compile needs a budget such as "4x", or a plan to replay.')
    if lower is not None:
        check_target(lower)
    wanted = Budget.parse(budget) if budget is not None else None
    allowed = resolve(rewrites)
    with untouched():
        original, known = observe(model, example_inputs, calibration, progress, staged=staged)
        if plan is None:
            assert wanted is not None
            plan = price(original, allowed, known, wanted, progress, named=rewrites is not None)
        elif wanted is not None:
            plan = choose(plan, wanted)
        if plan.calibrated and not known.calibrated:
            log.warning("the plan was made with calibration data and is replayed without: rounding will lose more.")
        compiled = carry_out(original, known, plan, wanted)
    return compiled if lower is None else lowering.lower(compiled, lower)


def plan_only(
    model: nn.Module,
    budget: Budget | str | float,
    *,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
    calibration: Iterable[Any] | None = None,
    rewrites: Sequence[str | type[Rewrite]] | None = None,
    progress: bool = True,
) -> Plan:
    """The plan `compile` would carry out, with the same arguments; no model is made, so its size is a prediction."""
    wanted, allowed = Budget.parse(budget), resolve(rewrites)
    with untouched():
        original, known = observe(model, example_inputs, calibration, progress)
        return price(original, allowed, known, wanted, progress, named=rewrites is not None)


def price(
    original: SignedModule,
    rewrites: Sequence[type[Rewrite]],
    known: Calibration,
    budget: Budget,
    progress: bool,
    named: bool = False,
) -> Plan:
    """Every candidate of every site, and the best choice of them under `budget`."""
    sites = take_roles(find_sites(original), find_roles(original, known.informed))
    ties = parallel(sites)
    as_it_is = budget.size_bytes(100) == 100 and budget.error is None and budget.flops is None
    allowed = () if as_it_is else rewrites
    candidates, refusals = propose(original, sites, ties, allowed, known, budget, named, progress)
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
    return choose(replace(table, fixed_bytes=table.fixed_bytes + predicted_overhead(original, table)), budget)


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
    batches, first = _peek(batches)
    example = example if example is not None else first if first is not None else example_of(model)
    original = capture(model, example, trainable)
    if batches is not None:
        return original, calibrate(original, find_sites(original), batches, progress, staged)
    call = bind_batch(original, example, 0)
    return original, Calibration(held_out=[call], examples=1, calibrated=False, has_held_out=False)


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

