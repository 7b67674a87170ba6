"""What calls of a model take here, lowered and as it was: medians of calls in turn, so that both meet the same machine.

The original is run the same way: node after node for "eager", compiled by Inductor with the same options for
"inductor" (which takes about a minute a shape, once for each of the two).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

from fxcompress.checkpoint import attach, bytes_on_disk
from fxcompress.codegen.cpu.module import LoweredModule, Target
from fxcompress.core.calibrate import Call
from fxcompress.core.plan import Plan
from fxcompress.core.signature import SignedModule
from fxcompress.core.workload import inputs_of
from fxcompress.report import Report

ROUNDS = 5  # at least
SECONDS = 0.5  # of calls of each model, once there are enough rounds


def measured(
    original: SignedModule, compiled: SignedModule, lowered: LoweredModule, target: Target, call: Call
) -> Report:
    """The report of `compiled`, with the seconds of its plan's workloads beside what `lowered` takes; also attached.

    call: inputs whose values are repeated or cut to the workloads' shapes.
    """
    plan: Plan = compiled.plan
    before = LoweredModule(original, target)
    times = [medians([before, lowered], inputs_of(original, w, call)) for w in plan.workload]

    def beside(predicted: Sequence[float], which: int) -> tuple[tuple[float, float], ...]:
        return tuple((_short(p), _short(t[which])) for p, t in zip(predicted, times))

    report: Report = replace(
        compiled.report,
        workload=plan.workload,
        target=target,
        original_seconds=beside(plan.original_seconds, 0),
        seconds=beside(plan.predicted_seconds, 1),
    )
    attach(compiled, compiled.signature, plan, report)
    report = replace(report, measured_bytes=bytes_on_disk(compiled))
    attach(compiled, compiled.signature, plan, report)
    lowered.graph_module.meta["report"] = report
    return report


def medians(models: Sequence[LoweredModule], call: Call) -> list[float]:
    """Seconds of a call of each model."""
    args, kwargs = call
    for model in models:  # compiled, packed, caches filled
        model(*args, **kwargs)
        model(*args, **kwargs)
    found: list[list[float]] = [[] for _ in models]
    while min(len(times) for times in found) < ROUNDS or min(sum(times) for times in found) < SECONDS:
        for model, times in zip(models, found):
            begun = time.perf_counter()
            model(*args, **kwargs)
            times.append(time.perf_counter() - begun)
    return [statistics.median(times) for times in found]


def _short(seconds: float) -> float:
    """Four digits: they are not known better, and a report has room for no more (fxcompress.carrying_out)."""
    return float(f"{seconds:.3e}")
