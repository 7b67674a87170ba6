"""Sites that must be decided together.

    by "spec"     linear weights that read one input (Q, K, V; gate and up): one rewrite for all of them makes them
                  one kernel of one kind (fxcompress.passes.fuse). Kept where the best such choice loses hardly more
                  than the best of all: in a grokked adder Q and K have a third of V's rank, and one rewrite for the
                  three cost 1.6 times the loss
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
    """The sites' choices have equal labels (`label_of`): always, or where that costs next to nothing (by "spec")."""

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
