"""Sites that must be decided together.

    by "spec"     linear weights that read one input (Q, K, V; gate and up): one rewrite for all of them, so that they
                  can become one kernel (fxcompress.passes.fuse)
    by "units"    the two sides of a hidden layer: they must agree on how many of its units are kept

A tied weight (embedding and head) needs no tie: it is one site.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fxcompress.core.site import Site

By = Literal["spec", "units"]
UNITS = "hidden_units"


@dataclass(frozen=True)
class Tie:
    """The sites' choices must have equal labels (`label_of`)."""

    by: By
    sites: tuple[str, ...]


def label_of(by: By, spec: str) -> str:
    """What tied choices have in common: the whole spec, or how many hidden units it keeps ("" where it keeps all)."""
    if by == "spec":
        return spec
    structure = spec.split("|")[0].strip()
    return structure if structure.startswith(UNITS) else ""


def parallel(sites: Sequence[Site]) -> list[Tie]:
    """Linear sites that read one input, in graph order."""
    readers: dict[str, list[str]] = {}
    for site in sites:
        if site.kind == "linear" and len(site.uses) == 1:
            readers.setdefault(site.uses[0].x.name, []).append(site.name)
    return [Tie("spec", tuple(names)) for names in readers.values() if len(names) > 1]
