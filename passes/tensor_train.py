"""Tensor train:  W (rows, columns)  ->  d cores G_k (R_{k-1}, n_k, m_k, R_k), columns = n_1 .. n_d, rows = m_1 .. m_d

    W[(i_1 .. i_d), (j_1 .. j_d)] = G_1[1, j_1, i_1, :] G_2[:, j_2, i_2, :] ... G_d[:, j_d, i_d, 1]

stored: sum_k R_{k-1} n_k m_k R_k elements, each core a matrix (R_{k-1} n_k, m_k R_k). What it costs to multiply by it
is in fxcompress.codegen.ops.tensor_train_linear, how the digits are cut in fxcompress.passes.tt_shapes.

Projection (TT-SVD). W's digits are put in the order (j_1, i_1, j_2, i_2, ...). For k = 1 .. d - 1 what is left, a
matrix (R_{k-1} n_k m_k, everything after), is replaced by its R_k leading left singular vectors times the rest. With
tail_k the energy of the singular values of W's k-th unfolding beyond R_k, the error is within

    max_k tail_k   <=   ||W - W'||^2   <=   sum_k tail_k        (the left one holds for any train of these ranks)

Metric. A train cannot follow an arbitrary G = E[x x^T], but it can follow a Kronecker product, because (S_1 (x) ... (x)
S_d) acts on one digit of the column at a time. G_k, the trace of G over all digits but the k-th, is factored into
S_k S_k^T, W (S_1 (x) ... (x) S_d) is projected, and S_k^-1 goes into core k. Exact where G is such a product.
Measured on MiniLM's 37 linears, 128 sentences, 86 instances of `space`: the squared error in G falls by 10 % in the
geometric mean, between 57 % lower and 13 % higher. Low rank of as many elements still loses three times less (3.25 in
the mean, more than a train only once): a train is for training from scratch, as in the paper, or to be healed.

Each core is stored before the next is made, and the rest is then the least-squares answer to the core as stored.

Random start (the paper's): entries N(0, 1) / sqrt(R_{k-1}), then orthogonalised from the left by QR, every triangle
multiplied into the next core. W is then as long as the last core, which is scaled so that W has the spread of the
site's own weight (0.02 in GPT-2, whose weights are drawn so).

Papers: Oseledets, Tensor-Train Decomposition, SIAM J. Sci. Comput. 33, 2011 (TT-SVD and its bounds); Novikov et al.,
Tensorizing Neural Networks, NeurIPS 2015 (arXiv 1509.06569); Chekalina et al., PACLIC 2023 (arXiv 2306.02697).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, fx

import fxcompress.codegen.ops.tensor_train_embedding as embedding_op
import fxcompress.codegen.ops.tensor_train_linear as linear_op
from fxcompress.codegen.ops.tensor_train import rebuild, rows_at, to_digits
from fxcompress.core.cost import Cost
from fxcompress.core.errors import SpecError
from fxcompress.core.metric import rounding_metric
from fxcompress.core.rewrite import Operand, Store, Structure
from fxcompress.core.site import Site, Use, tokens_of
from fxcompress.core.surgery import attribute_of
from fxcompress.passes.low_rank import damped
from fxcompress.passes.quantize import is_table
from fxcompress.passes.tt_shapes import (
    LARGEST_DIGIT,
    Shapes,
    bond_ranks,
    core_elements,
    factor_shapes,
    full_rank,
    padded,
    primes,
    trimmed,
)

MOST_STORED = 3 / 4  # of the dense elements; more saves too little
LEAST_STORED = 1 / 16  # below it, float32 cores take less than 2-bit codes, and little of a trained weight is left
LARGEST_GRAM = 1024  # an eigendecomposition of more takes seconds
DAMPING = 1e-3  # of mean(diag G_k)


@dataclass(frozen=True)
class TensorTrain(Structure):
    """A train whose bonds have rank `rank`, or less where the digits before them cannot fill it.

    `shapes` is ((n_1, m_1), ..., (n_d, m_d)), digits of the column and of the row; None: the paper's rule.
    """

    name: ClassVar[str] = "tensor_train"
    paper: ClassVar[str] = "arXiv 2306.02697"
    errs_as: ClassVar[str] = "factors"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "embedding", "tied")

    rank: int
    shapes: Shapes | None = None

    def __post_init__(self) -> None:
        if not _is_count(self.rank):
            raise SpecError(f"tensor_train rank={self.rank!r} must be a whole number of at least 1.")
        if self.shapes is not None and not _are_pairs(self.shapes):
            raise SpecError(
                f"tensor_train shapes={self.shapes!r} must be one pair (digit of the column, digit of the row) a core, "
                "at least two of them, such as ((8, 8), (12, 48))."
            )

    @classmethod
    def refuses(cls, site: Site) -> str | None:
        if why := cls.unserved(site):
            return why
        columns, rows = primes(site.columns), primes(padded(site.rows))
        if max(columns, default=1) > LARGEST_DIGIT:
            return f"its {site.columns} columns have the prime factor {columns[-1]}, too large for a digit"
        if max(len(columns), len(rows)) < 2:
            return f"neither side of a {site.rows} x {site.columns} weight can be factored"
        return None

    @classmethod
    def space(cls, site: Site) -> Iterator[Self]:
        """Ranks in powers of two that store less than 3/4 of the weight, without a last core that stores zeros.

        None for a vocabulary, which takes a second an instance and 350 MB to find out: MiniLM's loses 37 % of its
        squared entries at half of the elements, 18 % at 72 %.
        """
        if is_table(site):
            return
        found = {}
        for rank in (2**k for k in range(1, math.isqrt(site.weight.numel()).bit_length())):
            shapes = trimmed(factor_shapes(site.columns, site.rows, rank), rank)
            share = core_elements(shapes, rank) / site.weight.numel()
            if rank <= full_rank(shapes) and LEAST_STORED < share < MOST_STORED and _grams(shapes, rank) < LARGEST_GRAM:
                found[share] = cls(rank, shapes)
        yield from (found[share] for share in sorted(found))

    def check(self, site: Site) -> None:
        rows, columns = site.rows, site.columns
        shapes = self._shapes(rows, columns)
        made = math.prod(m for _, m in shapes), math.prod(n for n, _ in shapes)
        if made not in ((rows, columns), (padded(rows), columns)):
            also = f" (or, padded, {padded(rows)})" if padded(rows) != rows else ""
            raise SpecError(
                f"{self} at {site.name}: the digits multiply up to {made[1]} columns and {made[0]} rows, "
                f"but the weight has {columns} columns and {rows}{also} rows."
            )
        if self.rank > (full := full_rank(shapes)):
            below = range(min(self.rank, math.isqrt(math.prod(made))), 0, -1)  # no bond needs more than the root
            most = full if self.shapes else next(r for r in below if r <= full_rank(factor_shapes(columns, rows, r)))
            raise SpecError(
                f"{self} at {site.name}: the weight is {rows} x {columns}, and cut into {shapes} no bond needs more "
                f"than {full}, so rank must be 1 to {most}."
            )

    def matrices(self, site: Site) -> dict[str, tuple[int, int]]:
        shapes = self._shapes(site.rows, site.columns)
        ranks = bond_ranks(shapes, self.rank)
        return {f"core{k}": (ranks[k] * n, m * ranks[k + 1]) for k, (n, m) in enumerate(shapes)}

    def error_bound(self, site: Site) -> float:
        """The largest tail of the unfoldings; in a metric a train may do better than that."""
        if rounding_metric(site).columns is not None or site.statistics.row_weight is not None:
            return 0.0
        shapes = self._shapes(site.rows, site.columns)
        ranks, flat = bond_ranks(shapes, self.rank), _digits(site.weight.double(), shapes)
        total, largest, left = float(flat.square().sum()), 0.0, 1
        for rank, (n, m) in zip(ranks[1:-1], shapes):
            left *= n * m
            if rank < min(left, len(flat) // left) <= LARGEST_GRAM:
                squares = torch.linalg.eigvalsh(_gram(flat.reshape(left, -1)))  # ascending
                largest = max(largest, float(squares[:-rank].clamp_min(0).sum()))
        return largest / total if total > 0 else 0.0

    def series(self) -> Hashable:
        return self.name, self.shapes  # trains of these digits and less rank are among them

    def factor(self, site: Site, store: Store) -> None:
        self.check(site)
        shapes = self._shapes(site.rows, site.columns)
        ranks = bond_ranks(shapes, self.rank)
        roots = [root.float() for root in _roots(rounding_metric(site).columns, [n for n, _ in shapes])]
        rest = _digits(_times(site.weight.float(), roots), shapes)
        level = _level(rest, shapes, ranks)
        for k, ((n, m), root) in enumerate(zip(shapes, roots)):
            rest = rest.reshape(ranks[k] * n * m, -1)
            last = k == len(shapes) - 1
            found = rest if last else _leading(rest, ranks[k + 1]) * (level * math.sqrt(len(rest)))
            # S_k^-1 on the column's digit
            core = torch.linalg.solve_triangular(root.T, found.reshape(ranks[k], n, -1), upper=True)
            read = store(f"core{k}", core.reshape(ranks[k] * n, -1).to(site.weight.dtype)).float()
            if not last:
                basis = (root.T @ read.reshape(ranks[k], n, -1)).reshape(len(rest), -1)
                wide = basis.double()  # stored columns may be nearly parallel
                rest = torch.linalg.solve(damped(wide.T @ wide, 1e-12), wide.T).float() @ rest

    def draw(self, site: Site, generator: torch.Generator, store: Store) -> None:
        """The paper's random start, at the spread of the site's own weight."""
        shapes = self._shapes(site.rows, site.columns)
        ranks = bond_ranks(shapes, self.rank)
        carried, cores = torch.ones(1, 1), []
        for k, (n, m) in enumerate(shapes):
            drawn = torch.randn(ranks[k], n * m * ranks[k + 1], generator=generator) / math.sqrt(ranks[k])
            core = (carried @ drawn).reshape(-1, ranks[k + 1])
            if k < len(shapes) - 1:
                core, carried = torch.linalg.qr(core)
            cores.append(core.reshape(ranks[k] * n, -1))
        elements = math.prod(n * m for n, m in shapes)
        cores[-1] *= float(site.weight.float().std()) * math.sqrt(elements) / cores[-1].norm()
        for k, core in enumerate(cores):
            store(f"core{k}", core.to(site.weight.dtype))

    def unstored_rows(self, site: Site, rows: Tensor) -> Tensor:
        store = Store()
        self.factor(site, store)
        cores = [store.read[f"core{k}"].double() for k in range(len(store.read))]
        return rows_at(rows, cores, *zip(*self._shapes(site.rows, site.columns)))

    def dense(self, factors: Mapping[str, Tensor], site: Site) -> Tensor:
        shapes = self._shapes(site.rows, site.columns)
        cores = [factors[f"core{k}"].double() for k in range(len(shapes))]
        return rebuild(cores, [n for n, _ in shapes], [m for _, m in shapes])[: site.rows]

    def emit(self, graph: fx.Graph, use: Use, operands: Mapping[str, Operand], bias: fx.Node | None) -> fx.Node:
        rows, columns = _size(use)
        n, m = zip(*self._shapes(rows, columns))
        cores = [operands[f"core{k}"].read() for k in range(len(n))]
        args = (use.x, cores, [*n], [*m], rows)
        if use.kind == "embedding":
            return graph.call_function(torch.ops.fxcompress.tensor_train_embedding.default, args)
        return graph.call_function(torch.ops.fxcompress.tensor_train_linear.default, (*args, bias))

    def cost(self, use: Use, rows: int, columns: int, weight_bytes: int, itemsize: int) -> Cost:
        shapes = self._shapes(rows, columns)
        n, m = zip(*shapes)
        cost = embedding_op.cost if use.kind == "embedding" else linear_op.cost
        return cost(tokens_of(use), n, m, bond_ranks(shapes, self.rank), weight_bytes, itemsize)

    def _shapes(self, rows: int, columns: int) -> Shapes:
        return factor_shapes(columns, rows, self.rank) if self.shapes is None else self.shapes


def _is_count(number: object) -> bool:
    return isinstance(number, int) and number >= 1


def _are_pairs(shapes: object) -> bool:
    pairs = isinstance(shapes, tuple) and len(shapes) > 1 and all(isinstance(p, tuple) and len(p) == 2 for p in shapes)
    return pairs and all(_is_count(size) for pair in shapes for size in pair)  # type: ignore[attr-defined]


def _size(use: Use) -> tuple[int, int]:
    """(rows, columns) of the weight a node reads: as a linear or a lookup takes it, or the other way round."""
    seen = use.node.args[0 if use.kind == "embedding" else use.x_at + 1]
    rows, columns = _value(seen).shape
    turned = use.kind == "linear" and use.node.target is not torch.ops.aten.linear.default
    return (columns, rows) if turned else (rows, columns)


def _value(node: Any) -> Tensor:
    """The constant a node gives: an attribute, or a transpose of one."""
    if node.op == "get_attr":
        return attribute_of(node)
    value: Tensor = node.target(_value(node.args[0]), *node.args[1:])
    return value


def _times(w: Tensor, roots: Sequence[Tensor]) -> Tensor:
    """W (S_1 (x) ... (x) S_d), a digit at a time."""
    flat, right = w, w.shape[1]
    for root in roots:
        right //= len(root)
        digit = flat.reshape(-1, len(root), right)
        flat = root.T @ digit if right > 1 else digit.squeeze(2) @ root
    return flat.reshape(w.shape)


def _digits(w: Tensor, shapes: Shapes) -> Tensor:
    """A weight, padded and in the order of its digits, flat."""
    w = F.pad(w, (0, 0, 0, math.prod(m for _, m in shapes) - len(w)))
    return to_digits(w, [n for n, _ in shapes], [m for _, m in shapes])


def _roots(metric: Tensor | None, n: Sequence[int]) -> list[Tensor]:
    """S_k (n_k, n_k) float64, lower triangular; the scale of each is its own."""
    if metric is None:
        return [torch.eye(size, dtype=torch.float64) for size in n]
    roots = []
    for k, size in enumerate(n):
        before, after = math.prod(n[:k]), math.prod(n[k + 1 :])
        trace = torch.einsum("iajibj->ab", metric.reshape(before, size, after, before, size, after))
        level = trace.diagonal().mean().clamp_min(torch.finfo(trace.dtype).tiny)
        roots.append(torch.linalg.cholesky(trace / level + DAMPING * torch.eye(size, dtype=trace.dtype)))
    return roots


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors (rows, rank), from the smaller Gram matrix; zeros where there are no more."""
    rows, columns = matrix.shape
    _, vectors = torch.linalg.eigh(_gram(matrix))  # ascending
    vectors = vectors[:, -rank:].flip(1)
    if rows > columns:  # orthogonalised once more: small ones among W v are nearly parallel
        vectors = torch.linalg.qr(matrix @ vectors).Q
    return F.pad(vectors, (0, rank - vectors.shape[1]))


def _gram(matrix: Tensor) -> Tensor:
    return matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix


def _level(flat: Tensor, shapes: Shapes, ranks: Sequence[int]) -> float:
    """The root mean square every core gets, so that none leaves the range of float16."""
    last = float(flat.norm()) / math.sqrt(ranks[-2] * math.prod(shapes[-1]))
    logs = [math.log(rank * n * m) / -2 for rank, (n, m) in zip(ranks, shapes[:-1])]
    return math.exp((sum(logs) + math.log(last)) / len(shapes)) if last > 0 else 1.0


def _grams(shapes: Shapes, rank: int) -> int:
    """Side of the largest Gram matrix the projection decomposes."""
    ranks, sizes = bond_ranks(shapes, rank), [n * m for n, m in shapes]
    return max(min(ranks[k] * sizes[k], math.prod(sizes[k + 1 :])) for k in range(len(sizes) - 1))
