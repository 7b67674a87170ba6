"""Row tiers for embedding tables: rows that are read often are kept at 8, 4 or 3 bits, the long tail at 2.

    e = sum_r p_r e_r(tier_r)        bytes = sum_r bytes(tier_r) + index

p_r is how often row r will be read (fxcompress.core.calibrate.row_probabilities), e_r what rounding at a tier loses
there in the metric of the rest of the model. Language is
Zipf's: of BERT's 30,522 tokens the 2,000 most frequent carry 84 % of SST-2's training text, so most of the table can
stay at 2 bits while the error is that of the widths the frequent rows have.

Rows are ordered by p_r |W_r|^2_M, the loss they stand for; the first `rows8` go to 8 bits, the next `rows4` to 4, and
so on, so the four counts say everything. `space` walks the lower convex hull: for a price lambda a byte each row takes
argmin_t p_r e_r(t) + lambda bytes(t).

Within its tier a row is rounded as fxcompress.passes.quantize does it, on the grid that fits the whole table, so that
what an instance loses is the sum of what its rows lose. Related: Chen et al., GroupReduce, NeurIPS 2018;
Grave et al., adaptive softmax, ICML 2017 (capacity by frequency).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, fx

from fxcompress.codegen.ops.dequantize import stored_bytes
from fxcompress.codegen.ops.quantized_rows_embedding import index_bytes, quantized_rows_embedding
from fxcompress.core.errors import SpecError
from fxcompress.core.metric import Metric, rounding_metric
from fxcompress.core.rewrite import Storage
from fxcompress.core.site import Site
from fxcompress.passes.grid import ROW_CHUNK
from fxcompress.passes.quantize import LARGE_TABLE, Quantize, is_table, row_costs, tried

TIERS = (Quantize(8, 0), Quantize(4, 64), Quantize(3, 128), Quantize(2, 0))
PRICES = 24
STRETCHES = 16


@dataclass(frozen=True)
class QuantizeRows(Storage):
    """How many rows each width gets; the four add up to the table."""

    name: ClassVar[str] = "quantize_rows"
    paper: ClassVar[str] = "Chen et al., GroupReduce, NeurIPS 2018"
    keys: ClassVar[tuple[str, ...]] = (
        "index", *(f"{part}{tier.bits}" for tier in TIERS for part in ("codes", "scales", "zeros", "grid")),
    )  # fmt: skip

    rows8: int
    rows4: int
    rows3: int
    rows2: int

    def __post_init__(self) -> None:
        if not all(isinstance(n, int) and n >= 0 for n in self.counts) or not any(self.counts):
            raise SpecError(f"{self}: row counts must be whole numbers of at least 0, not all 0.")

    @property
    def counts(self) -> tuple[int, ...]:
        return self.rows8, self.rows4, self.rows3, self.rows2

    @classmethod
    def refuses(cls, site: Site) -> str | None:
        if site.kind in ("linear", "convolution"):
            return f"every row of a {site.kind} weight is read equally often"
        if site.statistics.row_weight is None:
            return "only calibration can tell which rows are read"
        if not is_table(site):
            return f"{site.rows} rows are too few for tiers; it takes {LARGE_TABLE}"
        return None

    @classmethod
    def space(cls, site: Site) -> Iterator[Self]:
        """From all rows at 2 bits to most at 8, one instance a price."""
        yield from site.analysis(_priced)  # type: ignore[misc]

    @classmethod
    def for_factors(cls, site: Site) -> tuple[Self, ...]:
        return ()

    @classmethod
    def dense_errors(cls, site: Site) -> dict[Storage, float]:
        """An instance adds up the rows it takes of each tier."""
        order = site.analysis(_dealing)
        sums = site.analysis(_errors)[:, order].cumsum(1)  # in the order rows are dealt to the tiers
        return {q: q._dealt(sums) for q in cls.space(site)}

    def probe_rows(self, site: Site, rows: Tensor) -> Tensor:
        found = torch.empty(len(rows), site.columns)
        for tier, members in zip(TIERS, torch.split(site.analysis(_dealing), list(self.counts))):
            mine = torch.isin(rows, members)
            if bool(mine.any()):
                found[mine] = tier.probe_rows(site, rows[mine])
        return found

    def stored_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        tiers = (stored_bytes(n, columns, t.bits, t.group(columns)) for n, t in zip(self.counts, TIERS))
        return index_bytes(rows) + sum(tiers)

    def encode(self, matrix: Tensor, metric: Metric) -> dict[str, Tensor]:
        """index, then codes, scales, zeros and grid of each tier; rows keep their order within a tier."""
        if sum(self.counts) != len(matrix):
            raise SpecError(f"{self} is for a table of {sum(self.counts)} rows; this one has {len(matrix)}.")
        members = [part.sort().values for part in torch.split(_order(matrix, metric), list(self.counts))]
        place = torch.empty(len(matrix), dtype=torch.int64)
        place[torch.cat(members)] = torch.arange(len(matrix))
        tensors = {"index": place.to(torch.int16 if len(matrix) <= 1 << 16 else torch.int32)}
        for tier, mine in zip(TIERS, members):
            encoded = tier.encode_rows(matrix, metric, mine) if len(mine) else tier.empty(matrix.shape[1])
            tensors.update({f"{part}{tier.bits}": t for part, t in encoded.items()})
        return tensors

    def decode(self, tensors: Mapping[str, Tensor], like: Tensor) -> Tensor:
        matrix: Tensor = quantized_rows_embedding(torch.arange(like.shape[0]), *_arguments(tensors, like))
        return matrix

    def read(self, graph: fx.Graph, tensors: Mapping[str, fx.Node], like: Tensor) -> fx.Node:
        return self.lookup(graph, tensors, like, graph.call_function(torch.ops.aten.arange.default, (like.shape[0],)))

    def lookup(self, graph: fx.Graph, tensors: Mapping[str, fx.Node], like: Tensor, ids: fx.Node) -> fx.Node:
        target = torch.ops.fxcompress.quantized_rows_embedding.default
        return graph.call_function(target, (ids, *_arguments(tensors, like)))

    def _dealt(self, sums: Tensor) -> float:
        """Sum of p_r e_r(tier_r), from running sums (tiers, rows) in dealing order."""
        total, start = 0.0, 0
        for tier, count in enumerate(self.counts):
            if count:
                before = float(sums[tier, start - 1]) if start else 0.0
                total += float(sums[tier, start + count - 1]) - before
                start += count
        return total


def _errors(site: Site) -> Tensor:
    """What each row adds to the site's error at each tier, (tiers, rows) float64: measured at rows that stand for all,
    elsewhere as the ranges of its groups tell, set right by what was measured among its like.

    Its like are the rows of one of STRETCHES in dealing order: on MiniLM rare words lose a quarter more at 2 bits than
    their ranges tell of frequent ones.
    """
    sample, measured = site.analysis(tried)
    stretch = torch.empty(site.rows, dtype=torch.int64)
    stretch[site.analysis(_dealing)] = torch.arange(site.rows) * STRETCHES // site.rows
    mine, weighs, found = stretch[sample.rows], sample.times * sample.draws, []
    for tier in TIERS:
        costs = row_costs(site, tier)
        lost, told = (
            torch.bincount(mine, weighs * each, STRETCHES) for each in (measured[tier], costs[sample.rows])
        )
        whole = float(lost.sum()) / max(float(told.sum()), torch.finfo(torch.float64).tiny)
        errors = costs * torch.where(told > 0, lost / told, whole)[stretch]
        errors[sample.rows] = measured[tier]
        found.append(errors)
    return torch.stack(found)


def _priced(site: Site) -> tuple[QuantizeRows, ...]:
    errors = site.analysis(_errors).float()
    cost = torch.tensor(
        [float(stored_bytes(1, site.columns, t.bits, t.group(site.columns)) - 8) for t in TIERS]
    ).unsqueeze(1)
    scale = float(errors[-1].mean() / cost.mean()) or 1.0
    found = {}
    for price in torch.logspace(-4.5, 2.5, PRICES).flip(0) * scale:
        counts = torch.bincount((errors + price * cost).argmin(0), minlength=len(TIERS)).tolist()
        found[tuple(counts)] = QuantizeRows(*counts)
    return tuple(found.values())


def _dealing(site: Site) -> Tensor:
    """The site's rows in the order they are dealt to the tiers; an analysis of the site."""
    return _order(site.weight, rounding_metric(site))


def _order(matrix: Tensor, metric: Metric) -> Tensor:
    """Row numbers, the ones that matter most first; ties by number, so that the order is the same everywhere."""
    weight = torch.ones(len(matrix)) if metric.rows is None else metric.rows.float()
    return torch.argsort(_row_energies(matrix.float(), metric) * weight, descending=True, stable=True)


def _row_energies(a: Tensor, metric: Metric) -> Tensor:
    """a_r M a_r^T (rows,) float32."""
    if metric.columns is None:
        return a.square().sum(1)
    columns = metric.columns.float()
    return torch.cat([((part @ columns) * part).sum(1) for part in torch.split(a, ROW_CHUNK)])


def _arguments(tensors: Mapping[str, Tensor] | Mapping[str, fx.Node], like: Tensor) -> tuple[Any, ...]:
    lists = [[tensors[f"{part}{t.bits}"] for t in TIERS] for part in ("codes", "scales", "zeros", "grid")]
    return (
        tensors["index"],
        *lists,
        [t.bits for t in TIERS],
        [t.group(like.shape[1]) for t in TIERS],
        like.shape[1],
        like.dtype,
    )
