"""Two of every four:  W (rows, columns)  ->  two kept weights of each group of four columns, and which two

    y = x W^T + b     stays     y = x W'^T + b        W' = unmask_2_4(patterns, values)

The pattern of sparse tensor cores. The kept weights are one matrix (rows, columns / 2) that any storage can keep; which
of the six pairs they are takes 3 bits a group (fxcompress.codegen.ops.unmask_2_4). fxcompress.passes.masks says which
stay.

            flops               stored bits a weight
    dense   2 tokens out in     b
    here    2 tokens out in     3/4 + b / 2

Papers: Frantar & Alistarh, SparseGPT, ICML 2023 (arXiv 2301.00774); Sun et al., Wanda, ICLR 2024 (arXiv 2306.11695).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch._ops import OpOverload

from fxcompress.codegen.ops import unmask_2_4
from fxcompress.core.errors import SpecError
from fxcompress.core.site import Site
from fxcompress.passes.masks import Pattern
from fxcompress.passes.pruning import Pruning

PATTERN = Pattern(kept=2, group=4)


@dataclass(frozen=True)
class Prune24(Pruning):
    """Two of every four neighbours in a row, chosen `by` one of masks.CRITERIA."""

    name: ClassVar[str] = "prune_2_4"
    keeps: ClassVar[tuple[str, ...]] = ("patterns",)
    op: ClassVar[OpOverload] = torch.ops.fxcompress.unmask_2_4.default

    by: str = "sparsegpt"

    def check(self, site: Site) -> None:
        if site.columns % PATTERN.group:
            raise SpecError(
                f"{self} at {site.name}: the weight is {site.rows} x {site.columns}, and columns must be a multiple "
                f"of {PATTERN.group}."
            )

    @classmethod
    def refuses(cls, site: Site) -> str | None:
        if why := cls.unserved(site):
            return why
        if site.columns % PATTERN.group:
            return f"a row of {site.columns} weights does not divide into groups of {PATTERN.group}"
        return None

    @classmethod
    def space(cls, site: Site) -> Iterator[Self]:
        yield cls()

    def matrices(self, site: Site) -> dict[str, tuple[int, int]]:
        return {"values": (site.rows, site.columns // 2)}

    def kept_bytes(self, site: Site) -> int:
        return site.rows * unmask_2_4.pattern_bytes(site.columns)

    def pattern(self, site: Site) -> Pattern:
        return PATTERN

    def packed(self, keep: Tensor) -> Tensor:
        return unmask_2_4.patterns_of(keep)

    def constants(self, columns: int) -> tuple[int, ...]:
        return ()
