"""W as a grid of blocks x blocks blocks, each of rank `rank`; which outputs share a block row is up to the subclass.

    W_ij ~ U_ij V_ij        i, j = 1 .. blocks;  U_ij (p, rank), V_ij (rank, q), p = out / blocks, q = in / blocks

Without calibration every block is on its own, and the truncated SVD of each is the minimiser. With it the metric G of
the inputs couples the block columns (G_jj', which is E[x_j x_j'^T] up to a mean), so the factors are made in two steps:

    V_ij    of the best factors of W_ij in G_jj = S_j S_j^T: the SVD of W_ij S_j, as fxcompress.passes.low_rank has it
    U_i     = W_i G F_i^T (F_i G F_i^T)^-1,    F_i = blockdiag(V_i1, V_i2, ...) (blocks rank, in)

The second is the least-squares answer, exact in the whole of G, to block row i as a linear map of all its features
V_ij x_j: it lets one block make up for another, and for whatever storing did to V. Without coupling it is the SVD's own
U. The first is not optimal for it, so there is no closed form of the error; it is measured on the dense weight.

    v   (blocks rank, in)     row group i is V_i1 | V_i2 | ..., as wide as x
    u   (out, blocks rank)    the rows of block row i are U_i1 | U_i2 | ...

A storage rounds u in the mean over i of F_i G F_i^T. (Each i in its own needs a metric of blocks^2 times the elements;
it was closer by 2 % at most, 4 bits, five weights of MiniLM.) It rounds v in no metric: blockdiag G_jj, and G itself,
left 0.1-3 % more error at 4 bits after the refit, on four weights of MiniLM.

            flops                              weight elements               wins below
    dense   2 tokens out in                    out in
    here    2 tokens blocks rank (out + in)    blocks rank (out + in)        rank < p q / (p + q)
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, fx

from fxcompress.codegen.ops.block_low_rank_linear import cost, cut, join
from fxcompress.core.cost import Cost
from fxcompress.core.errors import SpecError
from fxcompress.core.metric import Metric, rounding_metric, row_errors, stand_ins
from fxcompress.core.rewrite import Operand, Store, Structure
from fxcompress.core.site import Site, Use, tokens_of
from fxcompress.passes.low_rank import DAMPING, damped_image, damped_metric, level_of

BLOCKS = (2, 4)
MOST_STORED = 0.75  # of the dense elements: there is little to gain above
SHARES = (0.5, 1)  # of that: what a number of blocks is offered at; each instance is made and measured
# Weights of a site, above which blocks are decomposed in float32 where a metric refits U: it takes half the time, and
# no grid of MiniLM's weights loses a thousandth more.
EXACT = 2**16
NOISE = {torch.float64: 1e-12, torch.float32: 1e-7}  # of a block's largest s^2: what is uncertain of the others
RIDGE = 1e-9  # of a unit diagonal, so that features which copy each other leave the refit solvable


@dataclass(frozen=True)
class BlockGrid(Structure):
    """`blocks` x `blocks` blocks of rank `rank`; the site keeps its bias."""

    op: ClassVar[Any]  # (x, v, u, blocks, bias) -> y
    errs_as: ClassVar[str] = "factors"

    blocks: int
    rank: int | float  # a share of each block's break-even rank where it is below 1

    @staticmethod
    @abstractmethod
    def split(matrix: Tensor, blocks: int) -> Tensor:
        """(out, n) -> (blocks, out/blocks, n), the outputs of each block row; a view."""

    @staticmethod
    @abstractmethod
    def join(parts: Tensor) -> Tensor:
        """(blocks, out/blocks, n) -> (out, n), the inverse of `split`."""

    def __post_init__(self) -> None:
        if not (isinstance(self.blocks, int) and self.blocks >= 1):
            raise SpecError(f"{self.name} blocks={self.blocks!r} must be a whole number of at least 1.")
        whole = isinstance(self.rank, int) and self.rank >= 1
        if not whole and not (isinstance(self.rank, float) and 0 < self.rank < 1):
            raise SpecError(
                f"{self.name} rank={self.rank!r} must be a whole number of at least 1, or a share of the break-even "
                "rank between 0 and 1."
            )

    def at(self, site: Site) -> Self:
        """A share becomes floor(share p q / (p + q)), at least 1: greenformer's rule (arXiv 2109.06762) for a block."""
        self.check(site)
        if isinstance(self.rank, int):
            return self
        p, q = self._sides(site)
        return type(self)(self.blocks, max(1, int(self.rank * (p * q // (p + q)))))

    def check(self, site: Site) -> None:
        where, allowed = f"{self} at {site.name}: the weight is {site.rows} x {site.columns}", block_counts(site)
        if self.blocks not in allowed:
            raise SpecError(f"{where}, so blocks must be {' or '.join(map(str, allowed))}.")
        p, q = self._sides(site)
        if self.rank > min(p, q):
            raise SpecError(f"{where}, its blocks {p} x {q}, so rank must be 1 to {min(p, q)}.")

    @classmethod
    def refuses(cls, site: Site) -> str | None:
        if why := cls.unserved(site):
            return why
        several = block_counts(site)[1:]
        if not several:
            return f"no number of blocks divides both sides of a {site.rows} x {site.columns} weight"
        if several[0] * (site.rows + site.columns) > MOST_STORED * site.weight.numel():
            return f"a {site.rows} x {site.columns} weight is too small to be cut into blocks"
        return None

    @classmethod
    def space(cls, site: Site) -> Iterator[Self]:
        """The usual numbers of blocks (the smallest where none of them divides), a few ranks of each."""
        several, size = block_counts(site)[1:], site.weight.numel()
        counts = [b for b in BLOCKS if b in several] or several[: len(BLOCKS)]
        stored = {b: b * (site.rows + site.columns) for b in counts}  # elements a rank
        tried = {(b, int(share * MOST_STORED * size) // stored[b]) for b in counts for share in SHARES}
        yield from (cls(b, rank) for b, rank in sorted(tried, key=lambda t: (stored[t[0]] * t[1], t)) if rank >= 1)

    def matrices(self, site: Site) -> dict[str, tuple[int, int]]:
        inner = self.blocks * int(self.rank)
        return {"v": (inner, site.columns), "u": (site.rows, inner)}

    def error_bound(self, site: Site) -> float:
        """Exact without calibration; with it 0: whatever a block misses, another may know by correlation."""
        if rounding_metric(site).columns is not None:
            return 0.0
        squares = torch.stack([site.analysis(_Best(type(self), self.blocks, i)).squares for i in range(self.blocks)])
        total = float(squares.sum())
        return float(squares[..., self.rank :].sum()) / total if total > 0 else 0.0

    def series(self) -> Hashable:
        return self.blocks

    def bound_from(self, site: Site, larger: BlockGrid, lost: float) -> float:
        """On the line from `larger` to full rank, which loses nothing: what truncation loses is convex in the rank.
        (On MiniLM half the rank loses at least 1.28 times as much as that, the metric's coupling included.)"""
        full = min(self._sides(site))
        return lost * (full - int(self.rank)) / (full - int(larger.rank)) if larger.rank < full else lost

    def unstored_rows(self, site: Site, rows: Tensor) -> Tensor:
        self.check(site)
        found = torch.empty(len(rows), site.columns)
        for i in range(self.blocks):
            at = self.places(site, i, rows)
            found[at] = self.refitted(site, i, rows[at])
        return found

    def rising_errors(self, site: Site) -> Iterator[float]:
        """Block row by block row: what some of them lose is less than what all lose."""
        bound, lost = self.error_bound(site), 0.0
        yield bound
        for i in range(self.blocks):
            lost += site.analysis(_Lost(self, i))
            yield max(lost, bound)

    def places(self, site: Site, i: int, rows: Tensor) -> Tensor:
        """Which of `rows` (n,) are of block row i, (n,) bool."""
        return torch.isin(rows, self.split(torch.arange(site.rows).unsqueeze(1), self.blocks)[i, :, 0])

    def refitted(self, site: Site, i: int, rows: Tensor) -> Tensor:
        """`unstored` of some rows of block row i, (n, in) float32, but for the weight's dtype."""
        best, rank = site.analysis(_Best(type(self), self.blocks, i)), int(self.rank)
        v, energies = best.v[:, :rank].double(), best.energies[:, :rank]  # (j, rank, q), (j, rank)
        right = torch.bmm(cut(damped_image(site, rows), self.blocks), v.mT)  # (j, n, rank)
        u = _least_squares(_gram(v, energies, rounding_metric(site).columns), join(right))
        return join(torch.bmm(cut(u, self.blocks), v)).float()

    def factor(self, site: Site, store: Store) -> None:
        self.check(site)
        blocks, metric = self.blocks, site.analysis(damped_metric)
        v = store("v", torch.cat([self._right(site, i) for i in range(blocks)])).double()
        rows = zip(self.split(site.weight.double(), blocks), v.chunk(blocks))
        u, grams = zip(*(_refit(w, mine, metric, blocks) for w, mine in rows))
        store("u", self.join(torch.stack(u)).to(site.weight.dtype), Metric(torch.stack(grams).mean(0)))

    def dense(self, factors: Mapping[str, Tensor], site: Site) -> Tensor:
        b, rank = self.blocks, int(self.rank)
        u = torch.unflatten(self.split(factors["u"].double(), b), 2, (b, rank))  # (i, p, j, rank)
        v = factors["v"].double().reshape(b, rank, b, -1)  # (i, rank, j, q)
        return self.join(torch.einsum("ipjr,irjq->ipjq", u, v).flatten(2))

    def emit(self, graph: fx.Graph, use: Use, operands: Mapping[str, Operand], bias: fx.Node | None) -> fx.Node:
        args = (use.x, operands["v"].read(), operands["u"].read(), self.blocks)
        return graph.call_function(self.op, (*args, bias) if bias is not None else args)

    def cost(self, use: Use, rows: int, columns: int, weight_bytes: int, itemsize: int) -> Cost:
        return cost(tokens_of(use), rows, columns, self.blocks, int(self.rank), weight_bytes, itemsize)

    def _right(self, site: Site, i: int) -> Tensor:
        """V_i1 | V_i2 | ... (rank, in), in the weight's dtype."""
        v = site.analysis(_Best(type(self), self.blocks, i)).v[:, : int(self.rank)]  # (j, rank, q)
        return v.transpose(0, 1).reshape(-1, site.columns).to(site.weight.dtype)

    def _sides(self, site: Site) -> tuple[int, int]:
        """(p, q), the sides of one block."""
        return site.rows // self.blocks, site.columns // self.blocks


def block_counts(site: Site) -> list[int]:
    """The numbers of blocks that divide both sides, 1 first."""
    common = math.gcd(site.rows, site.columns)
    return [n for n in range(1, common + 1) if common % n == 0]


class _Factors(NamedTuple):
    """The best right factors of the blocks of one block row, of every rank: V_ij[:rank]."""

    v: Tensor  # (j, k, q), k = min(p, q); rows carry the root of their singular value, so that U can too
    squares: Tensor  # (j, k) descending: s^2
    energies: Tensor  # (j, k) float64: the diagonal of V_ij G_jj V_ij^T, which has nothing else


@dataclass(frozen=True)
class _Best:
    """An analysis of a site: what the blocks of row i of one grid are made of, whatever their rank."""

    grid: type[BlockGrid]
    blocks: int
    i: int

    def __call__(self, site: Site) -> _Factors:
        """From the eigenvectors of the smaller Gram matrix of each block, all blocks at once (as `best_factors`)."""
        unit, roots, image = site.analysis(_Image(self.blocks))
        w, image = self._row(site.weight).to(image.dtype), self._row(image)
        if roots is None:
            squares, p = torch.linalg.eigh(image @ w.mT)
            noise = NOISE[image.dtype] * squares[:, -1:]
            v, u_norm, energies = p.mT @ w, torch.ones_like(squares), squares.maximum(noise)
        else:
            squares, q = torch.linalg.eigh(image.mT @ image)
            v = torch.linalg.solve_triangular(roots, q.mT, upper=False, left=False)
            u_norm, energies = squares.clamp_min(0).sqrt(), torch.ones_like(squares)
        # Split the scale evenly, so that neither factor leaves the range of float16.
        share = u_norm / v.norm(dim=-1).clamp_min(1e-30)
        v = v * share.sqrt().unsqueeze(-1)
        return _Factors(v.flip(1), squares.clamp_min(0).flip(1), (energies * share).double().flip(1) * unit)

    def _row(self, matrix: Tensor) -> Tensor:
        """The blocks of row i of a matrix (out, in): (j, p, q)."""
        return cut(self.grid.split(matrix, self.blocks)[self.i], self.blocks)


class _Seen(NamedTuple):
    """A weight and what its inputs make of it, block column by block column, in units of G."""

    unit: Tensor  # what G is divided by, a scalar
    roots: Tensor | None  # all S_j (j, q, q), where blocks are higher than wide
    image: Tensor  # W blockdiag(S_j) (out, in), else W blockdiag(G_jj)


@dataclass(frozen=True)
class _Image:
    """An analysis of a site, the same for every grid of as many blocks. Its dtype is that of all that is made of it."""

    blocks: int

    def __call__(self, site: Site) -> _Seen:
        own = _own(site, self.blocks)  # (j, q, q)
        unit = own.diagonal(dim1=1, dim2=2).mean()  # inputs may be too faint for float32
        refitted = rounding_metric(site).columns is not None
        kind = torch.float32 if refitted and site.weight.numel() > EXACT else torch.float64
        roots = torch.linalg.cholesky(own / unit).to(kind) if site.rows > site.columns else None
        right = (own / unit).to(kind) if roots is None else roots
        return _Seen(unit, roots, join(torch.bmm(cut(site.weight.to(kind), self.blocks), right)))


@dataclass(frozen=True)
class _Lost:
    """An analysis of a site: what one block row adds to the error, told from the rows of it that stand for all."""

    structure: BlockGrid
    i: int

    def __call__(self, site: Site) -> float:
        sample = site.analysis(stand_ins)
        at = self.structure.places(site, self.i, sample.rows)
        lost = torch.zeros(len(sample.rows), dtype=torch.float64)
        lost[at] = row_errors(site, sample.rows[at], self.structure.refitted(site, self.i, sample.rows[at]))
        return sample.total(lost)


def _own(site: Site, blocks: int) -> Tensor:
    """G_jj of every block column j, damped as `damped_metric` is: (blocks, q, q)."""
    metric, side = rounding_metric(site).columns, site.columns // blocks
    if metric is None:
        return (1 + DAMPING) * torch.eye(side, dtype=torch.float64).expand(blocks, -1, -1)
    own = metric.reshape(blocks, side, blocks, side).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()
    own.diagonal(dim1=1, dim2=2).add_(level_of(metric))
    return own


def _refit(w: Tensor, v: Tensor, metric: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """W_i (p, in) and V_i1 | V_i2 | ... (rank, in) as stored -> U_i (p, blocks rank), F_i G F_i^T."""
    parts = cut(v, blocks)  # (j, rank, q)
    image = torch.bmm(parts, metric.reshape(blocks, -1, len(metric))).flatten(0, 1)  # F_i G (blocks rank, in)
    gram = join(torch.bmm(cut(image, blocks), parts.mT))
    return _least_squares(gram, w @ image.T), gram


def _gram(v: Tensor, energies: Tensor, metric: Tensor | None) -> Tensor:
    """F_i G F_i^T of V_i as `_Best` has it, before it is stored: only where two block columns meet is there anything to
    multiply."""
    blocks, rank, side = v.shape
    gram = torch.diag(energies.flatten())
    if metric is not None:
        coupled, met = metric.reshape(blocks, side, blocks, side), gram.reshape(blocks, rank, blocks, rank)
        for a, b in itertools.combinations(range(blocks), 2):
            met[a, :, b] = v[a] @ coupled[a, :, b] @ v[b].T
            met[b, :, a] = met[a, :, b].T
    return gram


def _least_squares(gram: Tensor, right: Tensor) -> Tensor:
    """U_i (p, n) of F_i G F_i^T (n, n) and W_i G F_i^T (p, n)."""
    scale = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).rsqrt().unsqueeze(1)
    unit = scale * gram * scale.T + RIDGE * torch.eye(len(gram), dtype=gram.dtype)
    found: Tensor = (scale * torch.linalg.solve(unit, scale * right.T)).T
    return found
