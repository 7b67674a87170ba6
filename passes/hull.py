"""The lower convex hull of what is known to be possible at one site: (bytes, squared error), ascending in bytes.

The relaxed knapsack picks points of a site's hull at all sites but one (Sinha & Zoltners, 1979), so what lies above the
hull is not worth making.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

FAMILY_SPREAD = 1.25  # a recipe must be able to beat a rival's error times this, or it is not made

Point = tuple[int, float]


@dataclass(frozen=True)
class Hull:
    """Its corners."""

    points: tuple[Point, ...]

    @classmethod
    def of(cls, possible: Iterable[Point]) -> Hull:
        """At least one point must be given."""
        hull: list[Point] = []
        for point in sorted(possible):
            while len(hull) > 1 and _right_of(hull[-2], hull[-1], point):
                hull.pop()
            if not hull or point[1] < hull[-1][1]:
                hull.append(point)
        return cls(tuple(hull))

    def beats(self, stored: int, error: float) -> bool:
        """True if the hull is lower at `stored` bytes, with room for families that the model minds less."""
        if stored < self.points[0][0]:
            return False
        sizes, errors = zip(*self.points)
        return float(np.interp(stored, sizes, errors)) * FAMILY_SPREAD <= error


NOTHING = Hull(((1 << 62, 0.0),))  # beats nobody


def _right_of(a: Point, b: Point, c: Point) -> bool:
    """True if b does not lie below the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
