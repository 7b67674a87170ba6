"""What all pruning shares:  W (rows, columns)  ->  which weights stay, and the values of those that do

    W' = op(which, values, *constants)

Every row keeps as many weights as every other, so the values are one matrix (rows, kept) that any storage can keep;
`which` says of each row where they belong and is kept as it is. The dense weight is made where it is read: all of it
for a product, the rows that are asked for in a lookup. fxcompress.passes.masks says which stay and what they become.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

import sympy
from torch import Tensor, fx
from torch._ops import OpOverload

from fxcompress.codegen.ops import unmask
from fxcompress.core.budget import Budget
from fxcompress.core.cost import Cost
from fxcompress.core.errors import SpecError
from fxcompress.core.metric import Metric, rounding_metric
from fxcompress.core.rewrite import Operand, Store, Structure
from fxcompress.core.site import Site, Use, tokens_of, use_cost
from fxcompress.passes import masks
from fxcompress.passes.dense import Dense
from fxcompress.passes.masks import Pattern, Projection
from fxcompress.passes.quantize import is_table


class Pruning(Structure):
    """Weights dropped by a pattern, chosen `by` one of masks.CRITERIA."""

    paper: ClassVar[str] = "arXiv 2301.00774"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "embedding", "tied", "convolution")
    keeps: ClassVar[tuple[str, ...]]  # one: the tensor that says which weights stay
    op: ClassVar[OpOverload]  # (which, values, *constants) -> the dense rows

    by: str

    def __post_init__(self) -> None:
        if self.by not in masks.CRITERIA:
            raise SpecError(f"{self.name} by={self.by}: allowed are {', '.join(masks.CRITERIA)}.")

    @abstractmethod
    def pattern(self, site: Site) -> Pattern:
        """Which weights may stay at a site whose `check` has passed."""

    @abstractmethod
    def packed(self, keep: Tensor) -> Tensor:
        """keep (rows, columns) bool -> `which`."""

    @abstractmethod
    def constants(self, columns: int) -> tuple[int, ...]:
        """The op's trailing arguments."""

    def row_by_row(self, graph: fx.Graph, which: Operand) -> Operand:
        """`which` as the op reads it, one row of it for each of W."""
        return which

    @classmethod
    def unasked(cls, site: Site, budget: Budget) -> str | None:
        # On MiniLM's 30,522 rows no instance came near the tiers, and each took 3 seconds to find that out.
        return "the rows of a table are read one by one, and tiers of bits fit them better" if is_table(site) else None

    def error_bound(self, site: Site) -> float:
        return site.analysis(masks.Bound(self._projection(site)))

    def rising_errors(self, site: Site) -> Iterator[float]:
        """First what is told from a quarter of every row: SparseGPT takes long where there are many columns."""
        yield (told := site.analysis(masks.Told(self._projection(site))))
        yield from (max(told, error) for error in super().rising_errors(site))

    def unstored(self, site: Site) -> Tensor:
        return site.analysis(self._projection(site)).dense()

    def unstored_rows(self, site: Site, rows: Tensor) -> Tensor:
        if len(rows) == site.rows:
            return self.unstored(site)[rows]  # which `factor` wants, too
        return masks.some_pruned(site, self._projection(site), rows)

    def factor(self, site: Site, store: Store) -> None:
        pruned = site.analysis(self._projection(site))
        # A column of values holds weights of many columns of W, so it has no place in G: only rows keep their weight.
        store("values", pruned.values.to(site.weight.dtype), Metric(rows=rounding_metric(site).rows))
        store.keep(self.keeps[0], self.packed(pruned.keep))

    def dense(self, factors: Mapping[str, Tensor], site: Site) -> Tensor:
        weight: Tensor = self.op(factors[self.keeps[0]], factors["values"], *self.constants(site.columns))
        return weight

    def emit(self, graph: fx.Graph, use: Use, operands: Mapping[str, Operand], bias: fx.Node | None) -> fx.Node:
        which, values = self.row_by_row(graph, operands[self.keeps[0]]), operands["values"]

        def dense(which: fx.Node, values: fx.Node) -> fx.Node:
            return graph.call_function(self.op, (which, values, *self.constants(_columns(use))))

        weight = Operand(
            lambda: dense(which.read(), values.read()), lambda ids: dense(which.lookup(ids), values.lookup(ids))
        )
        return Dense().emit(graph, use, {"weight": weight}, bias)

    def cost(self, use: Use, rows: int, columns: int, weight_bytes: int, itemsize: int) -> Cost:
        made = tokens_of(use) if use.kind == "embedding" else sympy.Integer(rows)
        return use_cost(use, rows, columns, weight_bytes, itemsize) + unmask.cost(made, columns, itemsize)

    def _projection(self, site: Site) -> Projection:
        self.check(site)
        return Projection(self.pattern(site), self.by)


def _columns(use: Use) -> int:
    """Columns of the weight that `use` reads: features of a product's input, of a patch, or of a looked-up row."""
    if use.window is not None:
        return use.window.columns
    return int((use.node if use.kind == "embedding" else use.x).meta["val"].shape[-1])
