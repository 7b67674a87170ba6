"""What was done: by `compile`, predicted beside measured (bytes, errors); by `restructure`, what each site became."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from fxcompress.core.budget import Budget
from fxcompress.core.divergence import Kind
from fxcompress.core.units import format_bytes, format_seconds
from fxcompress.core.workload import Workload, weighted


@dataclass(frozen=True)
class SiteReport:
    """One site: what was chosen, and what came of it."""

    site: str
    spec: str
    predicted_bytes: int
    measured_bytes: int
    predicted_error: float  # of the site, ||y - y'|| / ||y||
    measured_error: float  # the same, of the tensors that were stored


@dataclass(frozen=True)
class Report:
    """bytes are of every file `save` writes; errors are the model's on the held-out examples (see `kind`)."""

    budget: str
    original_bytes: int
    predicted_bytes: int
    measured_bytes: int
    kind: Kind  # "relative": ||y - y'|| / ||y|| of the outputs; "kl": nats between the original's predictions and these
    predicted_error: float
    measured_error: float
    examples: int  # held-out examples the errors are of
    held_out: bool  # False: too little data to hold any out
    calibrated: bool
    sites: tuple[SiteReport, ...]
    first_error: float | None = None  # predicted before any price was corrected
    workload: tuple[Workload, ...] = ()  # where latency was asked: what seconds are of, medians of calls
    target: str = ""  # what it was lowered to when they were measured
    original_seconds: tuple[tuple[float, float], ...] = ()  # (predicted, measured), run the same way
    seconds: tuple[tuple[float, float], ...] = ()  # (predicted, measured), of the compressed model lowered

    @property
    def ratio(self) -> float:
        """original bytes / measured bytes."""
        return self.original_bytes / self.measured_bytes

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        told = {**data, "sites": tuple(SiteReport(**s) for s in data["sites"])}
        told["workload"] = tuple(Workload(**w) for w in data.get("workload", ()))
        told.update({k: tuple(map(tuple, data.get(k, ()))) for k in ("original_seconds", "seconds")})
        return cls(**told)

    def __str__(self) -> str:
        table = tabulate(self.rows(), headers=["", "predicted", "measured", "off by"], disable_numparse=True)
        return (
            f"report: {self.budget}; {format_bytes(self.original_bytes)} -> {format_bytes(self.measured_bytes)} "
            f"({self.ratio:.2f}x)\n\n{table}\n\nerror measured on {self.measured_on()}{self.lowered_how()}"
        )

    def rows(self) -> list[tuple[str, str, str, str]]:
        """What, predicted, measured, off by."""
        unit = "KL, nats" if self.kind == "kl" else "output error"
        off = (self.measured_error - self.predicted_error) / self.predicted_error if self.predicted_error else 0.0
        return [
            ("bytes on disk", format_bytes(self.predicted_bytes), format_bytes(self.measured_bytes),
             f"{(self.measured_bytes - self.predicted_bytes) / self.predicted_bytes:+.1%}"),
            (unit, f"{self.predicted_error:.4g}", f"{self.measured_error:.4g}", f"{off:+.1%}"),
            *self.latencies(),
        ]  # fmt: skip

    def measured_on(self) -> str:
        """Which examples the error is of."""
        on = "the example inputs, for want of calibration data"
        if self.calibrated:
            on = f"{self.examples} {'held-out' if self.held_out else 'calibration'} examples"
        if self.first_error not in (None, self.predicted_error):
            on += f"; {self.first_error:.4g} was predicted before prices were corrected"
        return on

    def latencies(self) -> list[tuple[str, str, str, str]]:
        """One a workload: what a call takes, predicted and measured, and how many times less than the original's."""
        told = []
        for workload, before, after in zip(self.workload, self.original_seconds, self.seconds):
            predicted, found = (f"{format_seconds(now)} ({then / now:.2f}x)" for then, now in zip(before, after))
            told.append((f"{workload} a call", predicted, found, f"{(after[1] - after[0]) / after[0]:+.1%}"))
        return told

    def missed_latency(self, budget: Budget) -> str | None:
        """What to say where a bound on latency was predicted to hold, and does not as measured."""
        if not self.workload:
            return None
        before, after = (weighted([s[1] for s in of], self.workload) for of in (self.original_seconds, self.seconds))
        bound = budget.latency_seconds(before)
        if bound is None or after <= bound:
            return None
        predicted = weighted([s[0] for s in self.seconds], self.workload)
        return (
            f"{budget} was asked, {format_seconds(predicted)} a call predicted and {format_seconds(after)} measured "
            f"({before / after:.2f}x of the original, on {', '.join(map(str, self.workload))}). Ask for a little more, "
            "or run `fxcompress profile` anew while the machine is quiet."
        )

    def lowered_how(self) -> str:
        """How the calls ran; nothing where none was timed."""
        if not self.workload:
            return ""
        return f"\ncalls of the model lowered to {self.target}; in brackets, against the original run the same way"

    def table(self) -> str:
        """Every site, predicted beside measured."""
        rows = [
            (s.site, s.spec, format_bytes(s.predicted_bytes), format_bytes(s.measured_bytes),
             f"{s.predicted_error:.4f}", f"{s.measured_error:.4f}")
            for s in self.sites
        ]  # fmt: skip
        heads = ["site", "rewrite", "bytes predicted", "measured", "error predicted", "measured"]
        return tabulate(rows, headers=heads, disable_numparse=True)

    def dumps(self) -> str:
        return json.dumps(self.to_json())


@dataclass(frozen=True)
class Restructured:
    """One site that a pattern matched."""

    site: str
    spec: str  # what it became; "keep" where the rewrite refused
    why: str  # the refusal, a clause; empty where the rewrite was carried out
    parameters_before: int
    parameters_after: int


@dataclass(frozen=True)
class RestructureReport:
    """Parameters are elements of matrices, however they are stored; of the whole model, a tied weight counts once."""

    sites: tuple[Restructured, ...]
    parameters_before: int
    parameters_after: int

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RestructureReport:
        return cls(**{**data, "sites": tuple(Restructured(**s) for s in data["sites"])})

    def __str__(self) -> str:
        rows = [
            (s.site, s.spec if not s.why else f"keep: {s.why}", f"{s.parameters_before:,}", f"{s.parameters_after:,}")
            for s in self.sites
        ]
        table = tabulate(rows, headers=["site", "rewrite", "parameters", "now"], disable_numparse=True,
                         colalign=("left", "left", "right", "right"))  # fmt: skip
        share = self.parameters_after / self.parameters_before
        return f"{table}\n\n{self.parameters_before:,} -> {self.parameters_after:,} parameters ({share:.1%})"
