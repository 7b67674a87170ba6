"""A plan is data: which rewrite at which site, every candidate that was weighed, and why the others lost.

    predicted loss    = sum of the chosen candidates' losses                (fxcompress.core.divergence says of what)
    predicted bytes   = sum of the chosen candidates' bytes + fixed bytes   (what no rewrite touches, and the files)
    predicted seconds = the same of each workload, once the model is lowered (fxcompress.passes.latency)

It prints as a table, saves as JSON (the same bytes on every run with the same inputs), slices (`plan[:n]` applies the
first n choices only: halving n finds the choice that broke a model), and replays through `compile(model, plan=plan)`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from fxcompress.core.budget import Budget
from fxcompress.core.divergence import Kind, readable
from fxcompress.core.errors import PlanError
from fxcompress.core.ties import Tie, label_of
from fxcompress.core.units import format_bytes, format_seconds, speedup
from fxcompress.core.workload import Workload, weighted

if TYPE_CHECKING:
    from fxcompress.cost_model.pareto import ParetoPoint
    from fxcompress.report import Report

FORMAT = 3  # 2 had no seconds, and is still read
KEEP = "keep"


@dataclass(frozen=True)
class Candidate:
    """One recipe at one site, priced."""

    site: str
    spec: str  # "keep", "quantize{bits=4, group_size=64}", ...
    bytes: int  # stored, less what biases lose with it
    flops: float  # of one forward at the captured sizes
    error: float  # of the site, ||y - y'|| / ||y||
    loss: float  # predicted, of the model, when only this site is rewritten
    seconds: tuple[float, ...] = ()  # of one call of each workload, all uses of the site; empty where none was priced


@dataclass(frozen=True)
class SiteInfo:
    """What a plan remembers of a site, to print it and to tell whether it fits a model."""

    name: str
    kind: str  # linear, embedding, tied, convolution
    rows: int
    columns: int


@dataclass(frozen=True)
class Plan:
    """choices: one candidate a site, in graph order. Sites a slice cut off are kept as they are."""

    sites: tuple[SiteInfo, ...]
    choices: tuple[Candidate, ...]
    candidates: tuple[Candidate, ...]
    refusals: tuple[tuple[str, str, str], ...]  # (site, rewrite, why)
    ties: tuple[Tie, ...]
    budget: Budget
    original_bytes: int
    fixed_bytes: int
    kind: Kind
    calibrated: bool
    gap: float
    workload: tuple[Workload, ...] = ()  # what seconds are of, one for each; empty where no latency was asked
    fixed_seconds: tuple[float, ...] = ()  # everything that is no site
    original_seconds: tuple[float, ...] = ()  # of the model as it was, run the same way without compression
    target: str = ""  # what it was priced for: "eager" or "inductor"

    def __getitem__(self, index: slice) -> Plan:
        """Some of the choices. Where a hidden layer is cut in half, the sites of it that are left are kept as they are:
        its units go at all of its sites or at none."""
        chosen = {c.site: c for c in self.choices[index]}
        for tie in (t for t in self.ties if t.by == "units"):
            if len({label_of("units", chosen[n].spec) if n in chosen else "" for n in tie.sites}) > 1:
                left = {name for name in tie.sites if name in chosen}
                chosen.update({c.site: c for c in self.candidates if c.spec == KEEP and c.site in left})
        return dataclasses.replace(self, choices=tuple(chosen.values()))

    def __len__(self) -> int:
        return len(self.choices)

    def spec_of(self, site: str) -> str:
        """The chosen recipe's text; "keep" for a site the plan leaves alone."""
        return next((c.spec for c in self.choices if c.site == site), KEEP)

    @property
    def predicted_bytes(self) -> int:
        chosen = {c.site for c in self.choices}
        kept = sum(c.bytes for c in self.candidates if c.spec == KEEP and c.site not in chosen)
        return self.fixed_bytes + kept + sum(c.bytes for c in self.choices)

    @property
    def predicted_loss(self) -> float:
        return sum(c.loss for c in self.choices)

    @property
    def predicted_error(self) -> float:
        return readable(self.predicted_loss, self.kind)

    @property
    def predicted_seconds(self) -> tuple[float, ...]:
        """One call of each workload, lowered."""
        chosen = {c.site for c in self.choices}
        kept = [c for c in self.candidates if c.spec == KEEP and c.site not in chosen]
        return tuple(
            fixed + sum(c.seconds[w] for c in (*self.choices, *kept)) for w, fixed in enumerate(self.fixed_seconds)
        )

    @property
    def latency(self) -> float:
        """The mean of `predicted_seconds`, weighted; raises `PlanError` where nothing was priced."""
        return weighted(self._priced().predicted_seconds, self.workload)

    @property
    def original_latency(self) -> float:
        """The same of the model as it was."""
        return weighted(self._priced().original_seconds, self.workload)

    def seconds_of(self, candidate: Candidate) -> float:
        """Its mean over the workloads, weighted; 0 where nothing was priced."""
        return weighted(candidate.seconds, self.workload) if self.workload else 0.0

    def slows(self, kind: str, candidate: Candidate, kept: Candidate) -> bool:
        """True where `candidate` takes longer than the weight as it is, at a site of that kind. A lookup is hardly any
        time either way: it counts in the sum, and is not turned away for a microsecond of unpacking."""
        return kind != "embedding" and self.seconds_of(candidate) > self.seconds_of(kept)

    def _priced(self) -> Plan:
        if not self.workload:
            raise PlanError(
                "the plan holds no seconds: no latency was asked when it was made. Make it with "
                'compile(model, Budget(latency="2x"), workload=[("decode", 1, 1)]).'
            )
        return self

    def explain(self, site: str) -> str:
        """Every candidate of one site, best loss first, with why it lost."""
        info = next((s for s in self.sites if s.name == site), None)
        if info is None:
            near = ", ".join(s.name for s in self.sites[:8])
            raise PlanError(
                f"no site is called {site!r}; there are {len(self.sites)}: "
                f"{near}{', …' if len(self.sites) > 8 else ''}."
            )
        mine = sorted((c for c in self.candidates if c.site == site), key=lambda c: (c.loss, c.bytes))
        chosen = self.spec_of(site)
        pick = next(c for c in mine if c.spec == chosen)
        rows = [
            (c.spec, format_bytes(c.bytes), f"{c.error:.4f}", f"{c.loss:.3g}", *map(format_seconds, c.seconds),
             self._why(info.kind, c, pick, mine))
            for c in mine
        ]  # fmt: skip
        heads = ["rewrite", "bytes", "site error", "model loss", *(w.name for w in self.workload), "verdict"]
        table = tabulate(rows, headers=heads, disable_numparse=True)
        refused = [f"refused: {name}: {why}" for at, name, why in self.refusals if at == site]
        return "\n".join([f"{site}: {info.kind}, {info.rows} x {info.columns}", "", table, *refused])

    def __str__(self) -> str:
        by_name = {s.name: s for s in self.sites}
        keeps = {c.site: c.bytes for c in self.candidates if c.spec == KEEP}
        total = self.predicted_loss or 1.0
        rows = [
            (
                c.site,
                f"{by_name[c.site].rows} x {by_name[c.site].columns}",
                c.spec,
                format_bytes(c.bytes),
                f"{c.bytes / keeps[c.site]:.0%}",
                f"{c.error:.4f}",
                f"{c.loss / total:.1%}",
            )
            for c in self.choices
        ]
        rows.append(("everything else", "", "", format_bytes(self.fixed_bytes), "", "", ""))
        unit = "nats of KL" if self.kind == "kl" else "relative output error"
        uncalibrated = "" if self.calibrated else "   (not calibrated: errors are of the weights alone)"
        head = f"plan: {self.budget}{uncalibrated}"
        heads = ["site", "shape", "rewrite", "bytes", "share", "site error", "of model loss"]
        tail = (
            f"total {format_bytes(self.original_bytes)} -> {format_bytes(self.predicted_bytes)} "
            f"({self.original_bytes / self.predicted_bytes:.2f}x), predicted {unit} {self.predicted_error:.4g}, "
            f"optimal within {self.gap:.1e}"
        )
        table = tabulate(rows, headers=heads, disable_numparse=True, colalign=("left", "left", "left", *("right",) * 4))
        seconds = _second_lines(self) if self.workload else []
        return "\n".join([head, "", table, "", tail, *seconds, *refusal_lines(self.refusals)])

    def _why(self, kind: str, c: Candidate, pick: Candidate, all_of_site: list[Candidate]) -> str:
        kept = next(o for o in all_of_site if o.spec == KEEP)
        asked, longer = self.budget.latency is not None, self.seconds_of(c) - self.seconds_of(pick)
        if c is not pick and asked and self.slows(kind, c, kept):
            times = f"{format_seconds(self.seconds_of(c))} a call against {format_seconds(self.seconds_of(kept))}"
            return f"slower here than the weight as it is: {times}"
        if asked and longer > 0 and c.loss <= pick.loss and (self.budget.size is None or c.bytes <= pick.bytes):
            return f"{format_seconds(longer)} more a call; that time saves more loss at other sites"
        return _why(c, pick, all_of_site)

    def pareto(self, sizes: int = 12, latencies: int = 4) -> list[ParetoPoint]:
        """The best plans between small, fast and exact, from the candidates of this one (fxcompress.cost_model.pareto);
        some tens of exact choices, each in `.plan` of a point of bytes, seconds and error."""
        from fxcompress.cost_model.pareto import pareto

        return pareto(self, sizes, latencies)

    def to_html(self, report: Report | None = None) -> str:
        """One self-contained page: the Pareto front, every site, refusals, and predicted beside measured with a report.
        """
        from fxcompress.html_report import html_of

        return html_of(self, report)

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        order = [f.name for f in dataclasses.fields(Candidate)]
        for key in ("choices", "candidates"):
            data[key] = [[_rounded(entry[name]) for name in order if entry[name] != ()] for entry in data[key]]
        for key in ("fixed_seconds", "original_seconds"):
            data[key] = _rounded(data[key])
        data["workload"] = [list(w.values()) for w in data["workload"]]
        data["sites"] = [list(s.values()) for s in data["sites"]]
        data["ties"] = [[t["by"], *t["sites"]] for t in data["ties"]]
        return {"format": FORMAT, **data}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Raises `PlanError` for anything `to_json` did not write."""
        try:
            if data["format"] not in (2, FORMAT):
                raise PlanError(f"the plan has format {data['format']!r}; this version reads format {FORMAT}.")
            made = cls(
                tuple(SiteInfo(*entry) for entry in data["sites"]),
                tuple(_candidate(entry) for entry in data["choices"]),
                tuple(_candidate(entry) for entry in data["candidates"]),
                tuple((str(a), str(b), str(c)) for a, b, c in data["refusals"]),
                tuple(Tie(by, tuple(names)) for by, *names in data["ties"]),
                Budget(**data["budget"]),
                int(data["original_bytes"]),
                int(data["fixed_bytes"]),
                data["kind"],
                bool(data["calibrated"]),
                float(data["gap"]),
                tuple(Workload(*entry) for entry in data.get("workload", ())),
                tuple(map(float, data.get("fixed_seconds", ()))),
                tuple(map(float, data.get("original_seconds", ()))),
                str(data.get("target", "")),
            )
            count = {len(c.seconds) for c in (*made.choices, *made.candidates)}
            count |= {len(made.fixed_seconds), len(made.original_seconds)}
            if count != {len(made.workload)}:
                raise PlanError(f"the plan has seconds of {sorted(count)} workloads and names {len(made.workload)}.")
            return made
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"this is no plan written by Plan.save: {type(error).__name__} {error}.") from None

    def to_text(self) -> str:
        """The saved form: JSON, one candidate a line."""
        data = self.to_json()
        lists = ("sites", "choices", "candidates", "refusals", "ties")
        parts = [f'"{k}": {json.dumps(v)}' for k, v in data.items() if k not in lists]
        for key in lists:
            body = ",\n  ".join(json.dumps(entry) for entry in data[key])
            parts.append(f'"{key}": [\n  {body}\n ]' if body else f'"{key}": []')
        return "{\n " + ",\n ".join(parts) + "\n}\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, all of it or nothing."""
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            partial.write_text(self.to_text(), encoding="utf-8")
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what `save` wrote. Raises `PlanError`."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise PlanError(f"{path} cannot be read as a plan: {error}.") from None
        if not isinstance(data, dict):
            raise PlanError(f"{path} is no plan written by Plan.save: it holds a {type(data).__name__}.")
        return cls.from_json(data)


def _candidate(entry: list[Any]) -> Candidate:
    plain = Candidate(*entry[:6])
    return plain if len(entry) < 7 else dataclasses.replace(plain, seconds=tuple(map(float, entry[6])))


def _why(c: Candidate, pick: Candidate, all_of_site: list[Candidate]) -> str:
    if c is pick:
        return "chosen"
    label = label_of("units", c.spec)
    rivals = [o for o in all_of_site if label_of("units", o.spec) == label and o != c]
    better = next(
        (o for o in rivals if o.bytes <= c.bytes and o.loss <= c.loss and all(map(float.__le__, o.seconds, c.seconds))),
        None,
    )
    if better is not None:
        return f"dominated by {better.spec}"
    if label != label_of("units", pick.spec):
        return "the sites of a hidden layer keep the same units, and all together do better as chosen"
    if c.bytes > pick.bytes:
        return f"{format_bytes(c.bytes - pick.bytes)} more; those bytes save more loss at other sites"
    return f"{c.loss - pick.loss:.2g} more loss; other sites give up bytes more cheaply"


def refusal_lines(refusals: tuple[tuple[str, str, str], ...]) -> list[str]:
    """One line a reason: the rewrites it was given for, and where. Reasons that differ in one percentage are one."""
    reasons: dict[str, dict[str, list[str]]] = {}
    shares: dict[str, list[int]] = {}
    for site, rewrite, why in refusals:
        reason = _SHARE.sub("{}", why, count=1)
        reasons.setdefault(reason, {}).setdefault(rewrite, []).append(site)
        shares.setdefault(reason, []).extend(int(found) for found in _SHARE.findall(why)[:1])
    return [
        "refused: "
        + ", ".join(f"{name} at {s[0] if len(s) == 1 else f'{len(s)} sites'}" for name, s in at.items())
        + f": {reason.replace('{}', _span(shares[reason]), 1)}"
        for reason, at in reasons.items()
    ]


def _second_lines(plan: Plan) -> list[str]:
    """One a workload, and the mean where there are several."""
    told = [
        f"{workload}: predicted {speedup(before, after)} a call, lowered to {plan.target}"
        for workload, before, after in zip(plan.workload, plan.original_seconds, plan.predicted_seconds)
    ]
    if len(plan.workload) > 1:
        weights = ", ".join(f"{w.weight:g} {w.name}" for w in plan.workload)
        told.append(f"mean of {weights}: predicted {speedup(plan.original_latency, plan.latency)} a call")
    return told


_SHARE = re.compile(r"(\d+)%")


def _span(shares: list[int]) -> str:
    low, high = min(shares, default=0), max(shares, default=0)
    return f"{low}%" if low == high else f"{low}% to {high}%"


def _rounded(value: Any) -> Any:
    """Seven significant digits: the file must not tell two runs apart by the last bits of a sum."""
    if isinstance(value, tuple):
        return [_rounded(one) for one in value]
    return float(f"{value:.6e}") if isinstance(value, float) else value
