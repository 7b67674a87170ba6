"""The cost of a graph as a table, a line a module, formulas short enough to read.

    module                        flops                      bytes                  weights    launches
    layers.0-5.attention.query    885K s0 s1 384             ...

Numbers have three digits; K, M, G and T are powers of 1000. A factor that all terms have is written once, before them.
A term that never makes a hundredth of another is left out (sizes are 1 or more). JSON has every one, exactly.
Modules whose names differ in one number and which cost the same are one line, and that line is their sum.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import sympy
from tabulate import tabulate

from fxcompress.core.cost import Cost
from fxcompress.core.units import format_bytes
from fxcompress.cost_model.modules import shared
from fxcompress.cost_model.peak_memory import Peak

HEADS = ("module", "flops", "bytes", "weights", "launches")
TOP = "(the model itself)"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")
_STEPS = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "K"))


@dataclass(frozen=True)
class Line:
    """Modules of one cost; numbers: what stands in the place of `#` in the pattern."""

    pattern: str
    numbers: tuple[int, ...]
    total: Cost

    @property
    def label(self) -> str:
        return self.pattern.replace("#", ranges(self.numbers)) or TOP


def text(
    rows: Sequence[tuple[str, Cost]], total: Cost, peak: Peak, inputs: Sequence[str], warnings: Sequence[str]
) -> str:
    """The table, with everything that is said below it."""
    lines = [(line.label, *_cells(line.total)) for line in merged(rows)]
    table = tabulate(
        [*lines, ("total", *_cells(total))],
        headers=HEADS,
        disable_numparse=True,
        colalign=("left", "left", "left", "right", "right"),
    )
    said = [f"sizes: {', '.join(inputs)}"] if inputs and total.flops.free_symbols else []
    said += [f"peak activation memory: {_peak(peak)}", *(f"warning: {clause}" for clause in warnings)]
    return "\n".join([table, "", *said])


def merged(rows: Iterable[tuple[str, Cost]]) -> list[Line]:
    """Modules that differ in the last of the numbers in their names that distinguishes them, as one line."""
    found: dict[tuple[str, Cost], list[int]] = {}
    for module, cost in rows:
        path = brief(module)
        match = _NUMBER.search(path)
        pattern = path if match is None else f"{path[: match.start()]}#{path[match.end() :]}"
        found.setdefault((pattern, cost), []).extend([] if match is None else [int(match[0])])
    return [Line(pattern, tuple(n), _times(cost, max(1, len(n)))) for (pattern, cost), n in found.items()]


def brief(modules: str) -> str:
    """a.b.q, a.b.k -> a.b.{q, k}"""
    paths = modules.split(", ")
    if len(paths) == 1:
        return modules
    before = shared(paths)
    behind = ", ".join(path.removeprefix(f"{before}.") for path in paths)
    return f"{before}.{{{behind}}}" if before else f"{{{behind}}}"


def ranges(numbers: Sequence[int]) -> str:
    """(0, 1, 2, 5) -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def formula(expr: sympy.Expr) -> str:
    """As text, such as s0 s1 (1.18M + 768 s1) + 590K."""
    expr = sympy.expand(sympy.sympify(expr))
    terms: Mapping[sympy.Expr, sympy.Expr] = expr.as_coefficients_dict()
    if expr.has(sympy.Piecewise):  # work that is done in one of two ways, by the size
        cases = {m: c for m, c in terms.items() if m.has(sympy.Piecewise)}
        plain = sympy.Add(*(m * c for m, c in terms.items() if m not in cases))
        texts = [_case(m, c) for m, c in cases.items()] if len(cases) < 3 else [f"({len(cases)} terms of two cases)"]
        return " + ".join([*texts, *([formula(plain)] if plain != 0 else [])])
    terms = {m: c for m, c in terms.items() if c != 0 and not _is_slight(m, c, terms)}
    grow = {m: c for m, c in terms.items() if m.free_symbols}
    rest = [number(terms[sympy.S.One])] if sympy.S.One in terms else []
    if not grow:
        return " ".join(rest) or "0"
    common = functools.reduce(sympy.gcd, grow) if len(grow) > 1 else sympy.S.One
    inner = [_term(m / common, c) for m, c in sorted(grow.items(), key=lambda term: _order(term[0]))]
    texts = [f"{_symbols(common)} ({' + '.join(inner)})"] if common != 1 else inner
    return " + ".join([*texts, *rest]).replace("+ -", "- ")


def number(count: sympy.Expr) -> str:
    """1,179,648 -> "1.18M"; whole numbers below 10,000 as they are."""
    value = float(count)
    if abs(value) < 1e4:
        return f"{value:.4g}"
    size, letter = next((size, letter) for size, letter in _STEPS if abs(value) >= size)
    return f"{value / size:.3g}{letter}" if abs(value) / size < 999.5 else f"{value / size:.0f}{letter}"


def _cells(cost: Cost) -> tuple[str, str, str, str]:
    weights = format_bytes(cost.weight_bytes) if cost.weight_bytes else ""
    return formula(cost.flops), formula(cost.bytes), weights, str(cost.launches)


def _peak(peak: Peak) -> str:
    if len(peak.moments) == 1 and not peak.bytes.free_symbols:
        (node, live) = peak.moments[0]
        return f"{format_bytes(float(live))}, at {node}"
    formulas = list(dict.fromkeys(formula(live) for _, live in peak.moments))
    return formulas[0] if len(formulas) == 1 else f"the largest of {'; '.join(formulas)}" if formulas else "0"


def _times(cost: Cost, times: int) -> Cost:
    return Cost(times * cost.flops, times * cost.bytes, times * cost.weight_bytes, times * cost.launches)


def _term(monomial: sympy.Expr, coefficient: sympy.Expr) -> str:
    if monomial == 1:
        return number(coefficient)
    return _symbols(monomial) if coefficient == 1 else f"{number(coefficient)} {_symbols(monomial)}"


def _is_slight(monomial: sympy.Expr, coefficient: sympy.Expr, terms: Mapping[sympy.Expr, sympy.Expr]) -> bool:
    """True for a term that some other is a hundred times of at all sizes."""
    return any(
        100 * abs(coefficient) <= c and all(power >= 0 for power in (m / monomial).as_powers_dict().values())
        for m, c in terms.items()
    )


def _case(term: sympy.Expr, times: sympy.Expr) -> str:
    """A Piecewise, or what it is part of."""
    folded = sympy.piecewise_fold(times * term)
    if not isinstance(folded, sympy.Piecewise):
        return str(folded)
    (first, condition), (second, _) = folded.args[:2]
    return f"({formula(first)} if {_condition(condition)} else {formula(second)})"


def _condition(relation: sympy.core.relational.Relational) -> str:
    """As a bound on what grows, where one thing does: s0 s1 <= 37."""
    excess = sympy.expand(relation.lhs - relation.rhs).as_coefficients_dict()
    grow = [m for m in excess if m.free_symbols]
    if relation.rel_op == "<=" and len(grow) == 1 and excess[grow[0]] > 0:
        return f"{_symbols(grow[0])} <= {number(sympy.floor(-excess[sympy.S.One] / excess[grow[0]]))}"
    return f"{formula(relation.lhs)} {relation.rel_op} {formula(relation.rhs)}"


def _symbols(monomial: sympy.Expr) -> str:
    """s0**2*s1 -> "s0^2 s1"; what is no power of a symbol in its own parentheses."""
    factors = sympy.Mul.make_args(monomial)
    return " ".join(str(f).replace("**", "^") for f in sorted(factors, key=str))


def _order(monomial: sympy.Expr) -> tuple[int, str]:
    """Of many symbols first."""
    degree = sum(int(power) for power in monomial.as_powers_dict().values() if power.is_Integer)
    return -degree, str(monomial)
