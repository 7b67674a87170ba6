"""A front of plans as an SVG: size to the right, error upwards, both as logarithms, seconds as colour.

An error of 0 (the model as it is) has no logarithm: it lies on the bottom line, marked 0. Every point tells its numbers
when pointed at; the plan that was chosen has a ring.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from fxcompress.core.units import format_bytes, format_seconds
from fxcompress.cost_model.pareto import ParetoPoint

WIDTH, HEIGHT = 860, 400
LEFT, RIGHT, TOP, BOTTOM = 80, 150, 20, 60
STOPS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (240, 220, 40))  # viridis, its end darkened
SAME = "#3b528b"


@dataclass(frozen=True)
class _Axis:
    """Logarithmic, from `low` to `high` (> 0), onto pixels; 0 goes to `zero`."""

    low: float
    high: float
    first: float
    last: float
    zero: float

    def __call__(self, value: float) -> float:
        if value <= 0:
            return self.zero
        return self.first + (self.last - self.first) * math.log(value / self.low) / math.log(self.high / self.low)

    def ticks(self) -> list[float]:
        """1, 2, 5, 10, ... between the ends; the tens alone where those are many."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        fine = [m * 10.0**p for p in powers for m in (1, 2, 5) if self.low <= m * 10.0**p <= self.high]
        tens = [10.0**p for p in powers if self.low <= 10.0**p <= self.high]
        return fine if len(fine) <= 8 or len(tens) < 2 else tens


def plot(points: Sequence[ParetoPoint], chosen: ParetoPoint, error: str) -> str:
    """error: what it is called."""
    every = [*points, chosen]
    x = _axis([p.bytes for p in every], LEFT, WIDTH - RIGHT, LEFT)
    y = _axis([p.error for p in every], HEIGHT - BOTTOM - 24, TOP, HEIGHT - BOTTOM)
    paint = _paint([p.seconds for p in every])
    grid = [_vertical(x(t), format_bytes(t)) for t in x.ticks()]
    grid += [_horizontal(y(t), f"{t:g}") for t in y.ticks()] + [_horizontal(y.zero, "0")]
    dots = [_dot(x(p.bytes), y(p.error), paint(p.seconds), p) for p in points]
    dots += [] if chosen in points else [_dot(x(chosen.bytes), y(chosen.error), paint(chosen.seconds), chosen)]
    ring = f'<circle class="ring" cx="{x(chosen.bytes):.1f}" cy="{y(chosen.error):.1f}" r="10"/>'
    names = (
        f'<text class="name" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}">bytes on disk</text>'
        f'<text class="name" transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)">{escape(error)}</text>'
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="size against error of every plan on the front">'
        f"{''.join(grid)}{names}{''.join(dots)}{ring}{_legend(every)}</svg>"
    )


def _axis(values: Sequence[float], first: float, last: float, zero: float) -> _Axis:
    positive = [v for v in values if v > 0] or [1.0]
    return _Axis(min(positive) / 1.15, max(positive) * 1.15, first, last, zero)


def _paint(seconds: Sequence[float | None]) -> Callable[[float | None], str]:
    known = [s for s in seconds if s is not None]
    if not known:
        return lambda _: SAME
    low, high = min(known), max(known)

    def colour(value: float | None) -> str:
        share = 0.0 if value is None or high <= low else math.log(value / low) / math.log(high / low)
        at = min(max(1 - share, 0.0), 1.0) * (len(STOPS) - 1)  # fast is bright
        i = min(int(at), len(STOPS) - 2)
        mixed = (round(a + (at - i) * (b - a)) for a, b in zip(STOPS[i], STOPS[i + 1]))
        return "#" + "".join(f"{c:02x}" for c in mixed)

    return colour


def _dot(x: float, y: float, colour: str, point: ParetoPoint) -> str:
    took = "" if point.seconds is None else f", {format_seconds(point.seconds)} a call"
    told = escape(f"{format_bytes(point.bytes)}, error {point.error:.4g}{took} ({point.plan.budget})")
    return f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{colour}"><title>{told}</title></circle>'


def _vertical(x: float, text: str) -> str:
    return (
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{escape(text)}</text>'
    )


def _horizontal(y: float, text: str) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>'
    )


def _legend(points: Sequence[ParetoPoint]) -> str:
    x, steps, paint = WIDTH - RIGHT + 40, 24, _paint([p.seconds for p in points])
    known = [p.seconds for p in points if p.seconds is not None]
    ring = (
        f'<circle class="ring" cx="{x + 8}" cy="{HEIGHT - BOTTOM - 20}" r="8"/>'
        f'<text class="tick" x="{x + 22}" y="{HEIGHT - BOTTOM - 16}">this plan</text>'
    )
    if not known:
        return ring
    low, high = min(known), max(known)
    bars = [
        f'<rect x="{x}" y="{TOP + 24 + 6 * i}" width="16" height="6" '
        f'fill="{paint(low * (high / low) ** (i / (steps - 1)))}"/>'
        for i in range(steps)
    ]
    ends = (
        f'<text class="tick" x="{x}" y="{TOP + 10}">a call</text>'
        f'<text class="tick" x="{x + 22}" y="{TOP + 34}">{escape(format_seconds(low))}</text>'
        f'<text class="tick" x="{x + 22}" y="{TOP + 24 + 6 * steps}">{escape(format_seconds(high))}</text>'
    )
    return "".join(bars) + ends + ring
