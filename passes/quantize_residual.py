"""A low-rank correction beside a quantized base:  W  ->  Q + U V

    Q = quantize(W)      U V = SVD_r((W - Q) S) S^-1,  S S^T = G      (QERA: the best rank-r answer to what Q lost)

G is the metric of the matrix's inputs, so U V takes the directions in which the error of Q reaches the output. The
minimiser is found as fxcompress.passes.low_rank finds its own: V' is stored first, U is the least-squares answer to
the stored V', U = (W - Q) G V'^T (V' G V'^T)^-1. Both are kept at 8 bits, symmetric, a scale a row.

    stored bits a weight      those of Q  +  8 rank (1 / rows + 1 / columns)

The error left is that of Q less the part U V takes, plus what 8 bits lose of that part (1e-4 of it or less).

Paper: Zhang et al., QERA, ICLR 2025 (arXiv 2410.06040).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self, TypeVar

import torch
from torch import Tensor, fx

from fxcompress.core.budget import Budget
from fxcompress.core.errors import SpecError
from fxcompress.core.metric import Metric, local_error
from fxcompress.core.rewrite import Storage
from fxcompress.core.site import Site
from fxcompress.passes.grid import ROW_CHUNK
from fxcompress.passes.low_rank import DAMPING, damped
from fxcompress.passes.quantize import Quantize

T = TypeVar("T")

FACTORS = Quantize(8, 0, symmetric=True)


@dataclass(frozen=True)
class QuantizeResidual(Storage):
    """`bits` and `group_size` of the base (fxcompress.passes.quantize), and the rank of what is added to it."""

    name: ClassVar[str] = "quantize_residual"
    paper: ClassVar[str] = "arXiv 2410.06040"
    keys: ClassVar[tuple[str, ...]] = (
        *Quantize.keys, *(f"{factor}_{key}" for factor in "uv" for key in FACTORS.keys),
    )  # fmt: skip

    bits: int
    group_size: int
    rank: int

    def __post_init__(self) -> None:
        _ = self.base  # which refuses bits and group sizes that are not offered
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise SpecError(f"quantize_residual rank={self.rank!r} must be a whole number of at least 1.")

    @property
    def base(self) -> Quantize:
        return Quantize(self.bits, self.group_size)

    @classmethod
    def refuses(cls, site: Site) -> str | None:
        if min(site.rows, site.columns) < 2:
            return f"a {site.rows} x {site.columns} weight leaves no room for a correction of lower rank"
        return Quantize.refuses(site)

    @classmethod
    def space(cls, site: Site) -> Iterator[Self]:
        full = min(site.rows, site.columns)
        tried = [cls(bits, 64, rank) for bits in (2, 3, 4) for rank in (8, 32) if rank <= full] or [cls(2, 64, 1)]
        yield from sorted(tried, key=lambda q: q.stored_bytes(site.rows, site.columns, 0))

    @classmethod
    def unasked(cls, site: Site, budget: Budget) -> str | None:
        # On MiniLM smaller groups or one more bit always bought more than the rank.
        return "smaller groups or one more bit buy more than its rank; it is offered by name"

    @classmethod
    def for_factors(cls, site: Site) -> tuple[Self, ...]:
        return ()

    @classmethod
    def dense_errors(cls, site: Site) -> dict[Storage, float]:
        return {q: local_error(site, q.dense_weight(site)) for q in cls.space(site)}

    def check(self, site: Site) -> None:
        most = min(site.rows, site.columns)
        if self.rank > most:
            raise SpecError(
                f"{self} at {site.name}: the weight is {site.rows} x {site.columns}, so rank must be 1 to {most}."
            )

    def stored_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        factors = FACTORS.stored_bytes(rows, self.rank, itemsize) + FACTORS.stored_bytes(self.rank, columns, itemsize)
        return self.base.stored_bytes(rows, columns, itemsize) + factors

    def encode(self, matrix: Tensor, metric: Metric) -> dict[str, Tensor]:
        """The base's tensors, then codes, scales and grid of u (rows, rank) and v (rank, columns)."""
        if self.rank > min(matrix.shape):
            rows, columns = matrix.shape
            raise SpecError(f"{self}: the matrix is {rows} x {columns}, so rank must be 1 to {min(rows, columns)}.")
        base = self.base.encode(matrix, metric)
        whole = torch.empty(matrix.shape, dtype=torch.float32, device="meta")
        lost = matrix.float() - self.base.decode(base, whole)
        v = _directions(lost, metric, self.rank).float()
        encoded_v = FACTORS.encode(v, Metric(metric.columns))
        stored_v = FACTORS.decode(encoded_v, v).double()
        left = stored_v if metric.columns is None else stored_v @ metric.columns
        gram = left @ stored_v.T
        u = _solved(lost, left, gram)
        encoded_u = FACTORS.encode(u, Metric(gram, metric.rows))
        parts = (("", base), ("u_", encoded_u), ("v_", encoded_v))
        return {prefix + key: tensor for prefix, tensors in parts for key, tensor in tensors.items()}

    def decode(self, tensors: Mapping[str, Tensor], like: Tensor) -> Tensor:
        shapes = self._shapes(like)
        base, u, v = (storage.decode(_part(tensors, p), shapes[p]) for p, storage in self._storages.items())
        return torch.addmm(base, u, v).to(like.dtype)

    def read(self, graph: fx.Graph, tensors: Mapping[str, fx.Node], like: Tensor) -> fx.Node:
        shapes = self._shapes(like)
        parts = (storage.read(graph, _part(tensors, p), shapes[p]) for p, storage in self._storages.items())
        whole = graph.call_function(torch.ops.aten.addmm.default, tuple(parts))
        return graph.call_function(torch.ops.aten.to.dtype, (whole, like.dtype))

    def lookup(self, graph: fx.Graph, tensors: Mapping[str, fx.Node], like: Tensor, ids: fx.Node) -> fx.Node:
        shapes = self._shapes(like)
        base, u = (
            storage.lookup(graph, _part(tensors, p), shapes[p], ids)
            for p, storage in (("", self.base), ("u_", FACTORS))
        )
        v = FACTORS.read(graph, _part(tensors, "v_"), shapes["v_"])
        added = graph.call_function(torch.ops.aten.matmul.default, (u, v))
        whole = graph.call_function(torch.ops.aten.add.Tensor, (base, added))
        return graph.call_function(torch.ops.aten.to.dtype, (whole, like.dtype))

    @property
    def _storages(self) -> dict[str, Quantize]:
        return {"": self.base, "u_": FACTORS, "v_": FACTORS}

    def _shapes(self, like: Tensor) -> dict[str, Tensor]:
        """Base and factors are read in float32 and added before the one rounding to the weight's dtype."""
        rows, columns = like.shape
        shapes = {"": (rows, columns), "u_": (rows, self.rank), "v_": (self.rank, columns)}
        return {p: torch.empty(shape, dtype=torch.float32, device="meta") for p, shape in shapes.items()}


def _part(tensors: Mapping[str, T], prefix: str) -> dict[str, T]:
    """The tensors of one storage by its own keys."""
    return {key: tensors[prefix + key] for key in Quantize.keys if prefix + key in tensors}


def _directions(lost: Tensor, metric: Metric, rank: int) -> Tensor:
    """V (rank, columns): the `rank` leading right singular vectors of P^.5 E S, taken back by S^-1."""
    columns = lost.shape[1]
    chol = torch.eye(columns, dtype=torch.float64)
    if metric.columns is not None:
        chol = torch.linalg.cholesky(damped(metric.columns, DAMPING))
    gram = torch.zeros_like(chol)
    weights = torch.ones(len(lost)) if metric.rows is None else metric.rows
    for part, p in zip(torch.split(lost, ROW_CHUNK), torch.split(weights, ROW_CHUNK)):
        scaled = part.double()
        gram += scaled.T @ (scaled * p.double().unsqueeze(1))
    _, q = torch.linalg.eigh(chol.T @ gram @ chol)  # ascending
    v: Tensor = torch.linalg.solve_triangular(chol, q[:, -rank:].flip(1).T.contiguous(), upper=False, left=False)
    return v


def _solved(lost: Tensor, left: Tensor, gram: Tensor) -> Tensor:
    """U = E (V G)^T (V G V^T)^-1 (rows, rank) float32, for V as it was stored."""
    right = torch.linalg.solve(damped(gram, 1e-9), left)  # (rank, columns)
    return torch.cat([(part.double() @ right.T).float() for part in torch.split(lost, ROW_CHUNK)])
