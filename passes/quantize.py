"""Blockwise quantization:  W  ->  codes of 8, 4, 3 or 2 bits, a scale and a zero for `group_size` weights of a row.

    w' = s (q - z)        stored: bits + 12 / group_size bits a weight (fxcompress.codegen.ops.dequantize)

    symmetric       z is the middle of the codes and not stored: bits + 8 / group_size bits a weight
    power_of_two    s is 2^integer, so that a multiply is a shift; the same bytes

The rounding minimises the error in the metric of the site's inputs (fxcompress.passes.rounding): error feedback where
calibration gave a metric, MSE-optimal scales and zeros where it did not. Rows never interact, so a few of them tell
what each setting loses (`tried`); all are rounded once one is chosen.

Papers: Frantar et al., GPTQ, ICLR 2023 (arXiv 2210.17323); Badri & Shaji, HQQ, 2023 (zeros and scales by optimisation,
no data); Behdin et al., QuantEase (arXiv 2309.01885); blockwise scales, powers of two, for every tensor: BCT
(arXiv 2304.01483).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor, fx
from torch.fx.node import Argument

from fxcompress.codegen.ops.dequantize import dequantize, stored_bytes, zero_bytes
from fxcompress.codegen.packing import BITS, pack, packed_bytes
from fxcompress.core.errors import SpecError
from fxcompress.core.held import Gram
from fxcompress.core.metric import Metric, judge_of, rounding_metric, row_errors
from fxcompress.core.rewrite import Storage
from fxcompress.core.sample import Sample, draw, enough
from fxcompress.core.site import Site
from fxcompress.passes import rounding
from fxcompress.passes.grid import LOGARITHMIC, MIDDLE, POWERS_OF_TWO, ROW_CHUNK, SIXTEENTHS, Lattice, Rounded, cut

GROUP_SIZES = (0, 32, 64, 128)  # 0: the whole row
TRIED = ((2, 0), (2, 64), (2, 32), (3, 128), (3, 64), (3, 32), (4, 128), (4, 64), (4, 32), (8, 0))
TRIED_ON_TABLES = ((2, 0), (2, 64), (3, 128), (4, 64), (8, 0))  # a large table takes long; row tiers fill the gaps
LARGE_TABLE = 2048
DRAWS, TABLE_DRAWS = 128, LARGE_TABLE  # rows that are rounded at every setting to tell what it loses
MIN_WEIGHTS = 64  # below it, scales and names cost more than the codes save


@dataclass(frozen=True)
class Quantize(Storage):
    """`bits` a code, one scale and zero for every `group_size` weights of a row (0: one a row)."""

    name: ClassVar[str] = "quantize"
    paper: ClassVar[str] = "arXiv 2210.17323"
    keys: ClassVar[tuple[str, ...]] = ("codes", "scales", "zeros", "grid")

    bits: int
    group_size: int
    symmetric: bool = False
    power_of_two: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise SpecError(f"quantize bits={self.bits!r}: allowed are {', '.join(map(str, BITS))}.")
        if self.group_size not in GROUP_SIZES:
            raise SpecError(
                f"quantize group_size={self.group_size!r}: allowed are 32, 64, 128, and 0 for the whole row."
            )
        for name in ("symmetric", "power_of_two"):
            if not isinstance(value := getattr(self, name), bool):
                raise SpecError(f"quantize {name}={value!r}: allowed are True and False.")
        if self.symmetric:
            object.__setattr__(self, "keys", tuple(key for key in self.keys if key != "zeros"))

    @property
    def lattice(self) -> Lattice:
        """What its scales and zeros may be."""
        return Lattice(POWERS_OF_TWO if self.power_of_two else LOGARITHMIC, MIDDLE if self.symmetric else SIXTEENTHS)

    @classmethod
    def refuses(cls, site: Site) -> str | None:
        if site.weight.numel() < MIN_WEIGHTS:
            return f"{site.weight.numel()} weights are too few for a grid of their own"
        return None

    @classmethod
    def space(cls, site: Site) -> Iterator[Self]:
        """Cheapest first; a group as long as the row is offered once, as the whole row."""
        tried = TRIED_ON_TABLES if is_table(site) else TRIED
        fits = [cls(bits, group) for bits, group in tried if group < site.columns]
        yield from sorted(fits, key=lambda q: (q.stored_bytes(site.rows, site.columns, 0), q.bits))

    @classmethod
    def for_factors(cls, site: Site) -> tuple[Self, ...]:
        return cls(4, 64), cls(8, 0)

    @classmethod
    def dense_errors(cls, site: Site) -> dict[Storage, float]:
        """All settings are rounded in one pass, on rows that stand for all."""
        lost = site.analysis(tried)
        return {q: lost.sample.total(lost.errors[q]) for q in cls.space(site)}

    def probe_rows(self, site: Site, rows: Tensor) -> Tensor:
        """MiniLM minds these errors as it minds those of `encode`: kappa .997 times as large, with a spread of 4 % from
        weight to weight."""
        some = rows if len(rows) == site.rows else torch.cat([rows, _extremes(site, self.group_size)])
        x, metric = site.weight[some].float().T.contiguous(), rounding_metric(site)
        group, curve = self.group(site.columns) or site.columns, metric.analysis(rounding.curvature)
        grid = rounding.fit(x, self.bits, group, _importance(metric), self.lattice)
        return Rounded(rounding.roughly(x, grid, self.bits, group, curve), grid, group).read()[: len(rows)]

    def stored_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        return stored_bytes(rows, columns, self.bits, self.group(columns), self.symmetric)

    def encode(self, matrix: Tensor, metric: Metric) -> dict[str, Tensor]:
        """codes (rows, packed), scales (rows, groups), zeros (rows, groups / 2) uint8, grid (2,) float32."""
        return self.encode_rows(matrix, metric, torch.arange(len(matrix)))

    def encode_rows(self, matrix: Tensor, metric: Metric, rows: Tensor) -> dict[str, Tensor]:
        """`encode` of some rows, to the same bits: the grid is that of the whole matrix."""
        ((codes, grid, _),) = _round(matrix.float().T.contiguous(), metric, [self], rows)
        tensors = {"codes": pack(codes.T.contiguous(), self.bits), "scales": grid.scale_codes.T.contiguous()}
        if grid.zero_codes is not None:
            zeros = pack(grid.zero_codes.T.contiguous(), 4)
            tensors["zeros"] = zeros[:, : zero_bytes(len(grid.scale))].contiguous()
        return {**tensors, "grid": torch.tensor([grid.base, grid.step], dtype=torch.float32)}

    def empty(self, columns: int) -> dict[str, Tensor]:
        """What `encode` makes of no rows."""
        groups = -(-columns // (self.group(columns) or columns))
        widths = {"codes": packed_bytes(columns, self.bits), "scales": groups, "zeros": zero_bytes(groups)}
        made = {key: torch.empty(0, width, dtype=torch.uint8) for key, width in widths.items() if key in self.keys}
        return {**made, "grid": torch.zeros(2)}

    def decode(self, tensors: Mapping[str, Tensor], like: Tensor) -> Tensor:
        matrix: Tensor = dequantize(*(tensors.get(k) for k in Quantize.keys), *self.constants(like))
        return matrix

    def read(self, graph: fx.Graph, tensors: Mapping[str, fx.Node], like: Tensor) -> fx.Node:
        args: tuple[Argument, ...] = (*(tensors.get(k) for k in Quantize.keys), *self.constants(like))
        return graph.call_function(torch.ops.fxcompress.dequantize.default, args)

    def lookup(self, graph: fx.Graph, tensors: Mapping[str, fx.Node], like: Tensor, ids: fx.Node) -> fx.Node:
        args: tuple[Argument, ...] = (ids, *(tensors.get(k) for k in Quantize.keys), *self.constants(like))
        return graph.call_function(torch.ops.fxcompress.quantized_embedding.default, args)

    def constants(self, like: Tensor) -> tuple[int, int, int, torch.dtype]:
        """The ops' trailing arguments: bits, group_size, columns, dtype."""
        return self.bits, self.group(like.shape[1]), like.shape[1], like.dtype

    def group(self, columns: int) -> int:
        """The group size on a row of `columns`: 0 also where a group would span the row (a low rank's thin factors)."""
        return 0 if self.group_size >= columns else self.group_size


DRAWN_BY = Quantize(4, 64)


def is_table(site: Site) -> bool:
    """A vocabulary: many rows, read by number."""
    return site.rows >= LARGE_TABLE and site.kind in ("embedding", "tied")


class Tried(NamedTuple):
    """Rows that stand for all of a site's, and what each adds to its error at every setting tried, (n,) float64."""

    sample: Sample
    errors: dict[Quantize, Tensor]


def tried(site: Site) -> Tried:
    """An analysis of the site, which row tiers want, too."""
    qs, costs = [*Quantize.space(site)], row_costs(site, DRAWN_BY)
    count = enough(DRAWS, site.columns)
    if is_table(site):
        qs, count = [Quantize(bits, group) for bits, group in TRIED_ON_TABLES], TABLE_DRAWS
        costs += costs.mean()  # half of them evenly: row tiers ask about rows that are hardly read
    sample = draw(costs, count)
    rows = torch.cat([sample.rows, *(_extremes(site, group) for group in sorted({q.group_size for q in qs}))])
    x, drawn = site.weight[rows].float().T.contiguous(), torch.arange(len(sample.rows))
    made = _round(x, rounding_metric(site), qs, drawn)
    return Tried(sample, {q: row_errors(site, sample.rows, done.read()) for q, done in zip(qs, made)})


def _extremes(site: Site, group: int) -> Tensor:
    """The rows that hold the largest range of a group and the smallest, (2,): all scales of a matrix are kept on one
    base and step, and a few rows alone would get finer ones."""
    ranges = torch.cat([_squared_ranges(p, group or site.columns) for p in torch.split(site.weight, ROW_CHUNK)])
    return torch.stack([ranges.amax(1).argmax(), ranges.amin(1).argmin()])


def row_costs(site: Site, q: Quantize) -> Tensor:
    """c_r, what rounding each row loses, up to a factor: its groups' ranges, squared, by what their columns weigh where
    the site is judged; (rows,) float64. On MiniLM 128 rows drawn by it tell a setting's error within 1.4 % (rms), 256
    within .8 %."""
    judge, group = site.analysis(judge_of), q.group(site.columns) or site.columns
    ranges = torch.cat([_squared_ranges(part, group) for part in torch.split(site.weight, ROW_CHUNK)]).double()
    costs = torch.zeros(site.rows, dtype=torch.float64)
    if judge.inputs is not None:
        costs += ranges @ _by_group(judge.inputs.gram, group) / judge.inputs.signal
    if judge.rows is not None:
        read = judge.rows.root.double().square().squeeze(1)
        costs += read * (ranges @ _by_group(judge.rows.gram, group)) / judge.rows.signal
    return costs


def _squared_ranges(rows: Tensor, group: int) -> Tensor:
    """Of every group of every row, (rows, groups)."""
    groups = torch.split(rows.float(), group, 1)
    return torch.stack([g.amax(1).clamp_min(0) - g.amin(1).clamp_max(0) for g in groups], 1).square()


def _by_group(gram: Gram, group: int) -> Tensor:
    """What the columns of each group weigh together, (groups,) float64."""
    return torch.stack([part.sum() for part in torch.split(gram.diagonal(), group)])


def _importance(metric: Metric) -> Tensor | None:
    return None if metric.columns is None else metric.columns.diagonal()


def _round(x: Tensor, metric: Metric, settings: list[Quantize], rows: Tensor | None = None) -> list[Rounded]:
    """X (columns, rows) at every setting, in their order; only the columns `rows` of X where given."""
    columns, curve = len(x), metric.analysis(rounding.curvature)
    importance = _importance(metric)
    groups = [q.group(columns) or columns for q in settings]
    grids = [rounding.fit(x, q.bits, g, importance, q.lattice) for q, g in zip(settings, groups)]
    bits = [q.bits for q in settings]
    if rows is not None and len(rows) < x.shape[1]:
        x, grids = x[:, rows], [cut(g, rows) for g in grids]
    if curve is None:
        return [Rounded(rounding.nearest(x, g, b, n), g, n) for g, b, n in zip(grids, bits, groups)]
    return [Rounded(*done, n) for done, n in zip(rounding.round_with(x, grids, bits, groups, curve), groups)]
