"""A plan, what it competes with, and what came of it, as one HTML file that asks nothing of any network.

Every text of the plan is escaped; the page's own policy forbids requests. The tables sort where a head is clicked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from fxcompress.core.plan import Plan, refusal_lines
from fxcompress.core.units import format_bytes, format_seconds, speedup
from fxcompress.cost_model.pareto import ParetoPoint, pareto, point_of
from fxcompress.html_plot import plot
from fxcompress.report import Report, SiteReport

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2330; background: #fff; max-width: 1320px; margin: 2rem auto;
       padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.note { color: #5a6475; margin: .2rem 0 1rem; }
.cards { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.2rem 0; }
.card { border: 1px solid #d8dde6; border-radius: 8px; padding: .7rem 1rem; min-width: 11rem; }
.card b { display: block; font-size: 1.3rem; font-weight: 600; } .card span { color: #5a6475; font-size: .85rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; white-space: nowrap; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #e6e9ef; }
th { border-bottom: 2px solid #c3cad6; cursor: pointer; user-select: none; } th:hover { background: #f2f5fa; }
th.text, td.text { text-align: left; } td.text { font-family: ui-monospace, monospace; }
th[aria-sort=ascending]::after { content: " \\25B2"; } th[aria-sort=descending]::after { content: " \\25BC"; }
.grid { stroke: #e6e9ef; } .tick { font-size: 11px; fill: #5a6475; } .name { font-size: 12px; text-anchor: middle; }
.dot { stroke: #fff; } .ring { fill: none; stroke: #d1341f; stroke-width: 2.5; } svg { max-width: 100%; }
li { font-size: .85rem; margin: .2rem 0; }
"""
_SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    const key = row => { const v = row.cells[column].dataset.value ?? row.cells[column].textContent;
                         return v !== "" && !isNaN(v) ? Number(v) : v; };
    const order = (a, b) => { const x = key(a), y = key(b); return x < y ? -1 : x > y ? 1 : 0; };
    const rows = [...table.tBodies[0].rows].sort((a, b) => down ? order(b, a) : order(a, b));
    table.tBodies[0].append(...rows);
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
  }));
}
"""
Cell = tuple[str, float | None]
"""Text, and the number it is sorted by; None for text."""


def html_of(plan: Plan, report: Report | None = None, points: Sequence[ParetoPoint] | None = None) -> str:
    """points: of `pareto`; found anew if not given, which takes some tens of exact choices."""
    points = pareto(plan) if points is None else points
    error = "nats of KL" if plan.kind == "kl" else "relative output error"
    parts = [
        "<h1>fxcompress plan</h1>",
        f'<p class="note">{escape(str(plan.budget))}'
        f"{'' if plan.calibrated else '; not calibrated: errors are of the weights alone'}</p>",
        _cards(plan, report, error),
        "<h2>Size against error</h2>",
        '<p class="note">Each point is the exact choice under one budget; what another point beats in every respect is '
        "left out.</p>",
        plot(points, point_of(plan), error),
        _details("every point as numbers", _points(plan, points, error)),
    ]
    if report is not None:
        parts += ["<h2>Predicted beside measured</h2>", _measured(report, error)]
    parts += ["<h2>Every weight</h2>", _sites(plan, report)]
    if lines := refusal_lines(plan.refusals):
        shown = "".join(f"<li>{escape(line.removeprefix('refused: '))}</li>" for line in lines)
        parts += ["<h2>Refused</h2>", f'<ul class="refused">{shown}</ul>']
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<title>fxcompress plan: {escape(str(plan.budget))}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n<script>{_SCRIPT}</script></body></html>\n"
    )


def _cards(plan: Plan, report: Report | None, error: str) -> str:
    size = report.measured_bytes if report else plan.predicted_bytes
    loss = report.measured_error if report else plan.predicted_error
    cards = [
        (f"{plan.original_bytes / size:.2f}x smaller", f"{format_bytes(plan.original_bytes)} to {format_bytes(size)}"),
        (f"{loss:.4g}", error),
    ]
    pairs = [*zip(plan.original_seconds, plan.predicted_seconds)]
    if report is not None and report.workload:
        pairs = [(before[1], after[1]) for before, after in zip(report.original_seconds, report.seconds)]
    for workload, (before, after) in zip(plan.workload, pairs):
        cards.append((f"{before / after:.2f}x the speed", f"{workload}: {speedup(before, after).partition(' (')[0]}"))
    told = "measured" if report else "predicted"
    shown = (f'<div class="card"><b>{escape(b)}</b><span>{escape(s)}, {told}</span></div>' for b, s in cards)
    return f'<div class="cards">{"".join(shown)}</div>'


def _points(plan: Plan, points: Sequence[ParetoPoint], error: str) -> str:
    heads = ["bytes", "times smaller", error, *(["a call", "times faster"] if plan.workload else []), "budget"]
    rows = []
    for p in points:
        row: list[Cell] = [(format_bytes(p.bytes), p.bytes), _number(plan.original_bytes / p.bytes, "{:.2f}x"),
                           _number(p.error, "{:.4g}")]  # fmt: skip
        if p.seconds is not None:
            row += [(format_seconds(p.seconds), p.seconds), _number(plan.original_latency / p.seconds, "{:.2f}x")]
        rows.append([*row, (str(p.plan.budget), None)])
    return _table("points", heads, rows)


def _measured(report: Report, error: str) -> str:
    rows: list[list[Cell]] = [
        [(name, None), (predicted, None), (found, None), (off, None)] for name, predicted, found, off in report.rows()
    ]
    note = f"error measured on {report.measured_on()}{report.lowered_how()}".replace("\n", "; ")
    table = _table("measured", ["", "predicted", "measured", "off by"], rows, texts=(0,))
    return table + f'<p class="note">{escape(note)}</p>'


def _sites(plan: Plan, report: Report | None) -> str:
    infos = {s.name: s for s in plan.sites}
    kept = {c.site: c.bytes for c in plan.candidates if c.spec == "keep"}
    told: dict[str, SiteReport] = {s.site: s for s in report.sites} if report else {}
    total = plan.predicted_loss or 1.0
    heads = ["weight", "shape", "rewrite", "bytes", "share", "its error", "of model loss"]
    heads += [f"a call, {w}" for w in plan.workload] + (["bytes measured", "error measured"] if told else [])
    rows = []
    for c in plan.choices:
        info = infos[c.site]
        row: list[Cell] = [
            (c.site, None), (f"{info.rows} x {info.columns}", info.rows * info.columns), (c.spec, None),
            (format_bytes(c.bytes), c.bytes), _number(c.bytes / kept[c.site], "{:.0%}"), _number(c.error, "{:.4f}"),
            _number(c.loss / total, "{:.1%}"), *((format_seconds(s), s) for s in c.seconds),
        ]  # fmt: skip
        if told:
            found = told.get(c.site)
            measured: list[Cell] = [("", None), ("", None)]
            if found is not None:
                measured = [(format_bytes(found.measured_bytes), found.measured_bytes),
                            _number(found.measured_error, "{:.4f}")]  # fmt: skip
            row += measured
        rows.append(row)
    return _table("sites", heads, rows, texts=(0, 2))


def _number(value: float, form: str) -> Cell:
    return form.format(value), value


def _table(name: str, heads: Sequence[str], rows: Iterable[Sequence[Cell]], texts: Sequence[int] = ()) -> str:
    def cell(at: int, text: str, value: float | None) -> str:
        kind = ' class="text"' if at in texts else ""
        data = "" if value is None else f' data-value="{value:.9g}"'
        return f"<td{kind}{data}>{escape(text)}</td>"

    top = "".join(f"<th{' class=text' if at in texts else ''}>{escape(head)}</th>" for at, head in enumerate(heads))
    body = "\n".join(f"<tr>{''.join(cell(at, *c) for at, c in enumerate(row))}</tr>" for row in rows)
    return (
        f'<div class="wide"><table id="{name}"><thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"
