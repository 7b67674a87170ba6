"""Unstructured pruning:  W (rows, columns)  ->  a bit a weight, and the weights that stay

    y = x W^T + b     stays     y = x W'^T + b        W' = unmask(mask, values)

Every row keeps as many weights as every other (Wanda compares within rows as well), so what stays is one matrix
(rows, kept) that any storage can keep, and a lookup gathers a row of it. fxcompress.passes.masks says which stay.

            flops               stored bits a weight
    dense   2 tokens out in     b
    here    2 tokens out in     1 + (1 - sparsity) b

Papers: Frantar & Alistarh, SparseGPT, ICML 2023 (arXiv 2301.00774); Sun et al., Wanda, ICLR 2024 (arXiv 2306.11695).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch._ops import OpOverload

from fxcompress.codegen.ops import unmask
from fxcompress.core.errors import SpecError
from fxcompress.core.site import Site
from fxcompress.passes import masks
from fxcompress.passes.masks import Pattern
from fxcompress.passes.pruning import Pruning


@dataclass(frozen=True)
class Prune(Pruning):
    """The share `sparsity` of every row dropped, chosen `by` one of masks.CRITERIA."""

    name: ClassVar[str] = "prune"
    keeps: ClassVar[tuple[str, ...]] = ("mask",)
    op: ClassVar[OpOverload] = torch.ops.fxcompress.unmask.default

    sparsity: float
    by: str = "sparsegpt"

    def __post_init__(self) -> None:
        masks.check_share(self.name, self.sparsity)
        super().__post_init__()

    def check(self, site: Site) -> None:
        if not 0 < self.kept(site) < site.columns:
            raise SpecError(
                f"{self} at {site.name}: the weight is {site.rows} x {site.columns}, so sparsity must drop 1 to "
                f"{site.columns - 1} of the {site.columns} weights of a row, not {site.columns - self.kept(site)}."
            )

    @classmethod
    def refuses(cls, site: Site) -> str | None:
        if why := cls.unserved(site):
            return why
        return "a row of 1 weight has nothing to drop" if site.columns < 2 else None

    @classmethod
    def space(cls, site: Site) -> Iterator[Self]:
        yield from (cls(sparsity) for sparsity in masks.sparsities(site.weight != 0))

    def kept(self, site: Site) -> int:
        """Weights a row keeps."""
        return masks.kept_of(site.columns, self.sparsity)

    def matrices(self, site: Site) -> dict[str, tuple[int, int]]:
        return {"values": (site.rows, self.kept(site))}

    def kept_bytes(self, site: Site) -> int:
        return site.rows * unmask.mask_bytes(site.columns)

    def pattern(self, site: Site) -> Pattern:
        return Pattern(self.kept(site))

    def packed(self, keep: Tensor) -> Tensor:
        return unmask.bits_of(keep)

    def constants(self, columns: int) -> tuple[int, ...]:
        return columns, 1  # a bit stands for one weight
