"""Low-rank factorization:  W (out, in)  ->  U (out, rank) V (rank, in)

    y = x W^T + b     becomes     y = (x V^T) U^T + b

Only the products x W^T that the model really forms have to survive, so W is factored in the metric of its inputs. With
G = S S^T (Cholesky; fxcompress.core.metric says what G is) and W S = P diag(s) Q^T (SVD), the rank-r minimiser of
tr((W - U V) G (W - U V)^T) is

    U = P_r diag(s_r)      V = Q_r^T S^-1      with error exactly   s_{r+1}^2 + ... + s_k^2

(Eckart-Young, applied to W S). Without calibration G = I and this is the plain truncated SVD. For an embedding the rows
are weighted by their probability p as well: sqrt(p) W S is factored, and U is divided by sqrt(p) again. `best_factors`
gets there by eigenvectors.

V is stored first. Whatever storing did to it, U is then the least-squares answer to the stored V':
U = W G V'^T (V' G V'^T)^-1, so a quantized V costs less than its own rounding error.

A convolution becomes one of the same kernel, stride, padding and dilation to `rank` channels, and a 1 x 1 one from
there: the same two products with patches in place of x (fxcompress.core.convolution), so the same V and U.

            flops                     weight elements      wins below
    dense   2 tokens out in           out in
    here    2 tokens rank (out+in)    rank (out + in)      rank < out in / (out + in)

Papers: Wang et al., SVD-LLM, ICLR 2025 (arXiv 2403.07378), truncation-aware whitening; Chen et al., DRONE,
NeurIPS 2021, the same minimiser; Cahyawijaya, Greenformers, 2021, low rank for transformers, and its toolkit
(arXiv 2109.06762), for convolutions too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor, fx

import fxcompress.codegen.ops.low_rank_linear as op
from fxcompress.core.convolution import convolve, mix
from fxcompress.core.cost import Cost, linear_cost
from fxcompress.core.errors import SpecError
from fxcompress.core.metric import Metric, image, judge_of, rounding_metric
from fxcompress.core.rewrite import Operand, Store, Structure
from fxcompress.core.site import Site, Use, tokens_of, use_cost

RANK_STEPS = 8  # instances a site is offered, evenly spaced up to the largest useful rank
ROW_CHUNK = 4096
DAMPING = 1e-4  # of mean(diag G), so that directions never seen in calibration keep a metric


class Factors(NamedTuple):
    """The best factors of every rank: U[:, :r] V[:r] for rank r."""

    u: Tensor  # (rows, k)
    v: Tensor  # (k, columns)
    squares: Tensor  # (k,): s^2, what each direction adds to the squared output


def best_factors(site: Site) -> Factors:
    """From the eigenvectors of the smaller Gram matrix, in float64; the singular vectors themselves are never needed.

    rows <= columns:  W G W^T = P diag(s^2) P^T,  U = P,  V = P^T W   (U V projects W's outputs; not even S is needed)
                      P of the damped G: the 96 [CLS] inputs of MiniLM's pooler have no energy in most of its 384
                      directions, an undamped G leaves their order to chance, and plain SVD was better at high ranks
    otherwise:        S^T (W^T p W) S = Q diag(s^2) Q^T,  U = W S Q,  V = Q^T S^-1
    """
    metric, row_weight = rounding_metric(site).columns, site.statistics.row_weight
    if _by_outputs(site):
        w = site.weight.double()
        squares, p = torch.linalg.eigh(damped_image(site) @ w.T)
        p, v = p.flip(1), p.flip(1).T @ w
        return Factors(p, v, (squares.flip(0) - level_of(metric) * v.square().sum(1)).clamp_min(0))
    identity = torch.eye(site.columns, dtype=torch.float64)
    chol = identity if metric is None else torch.linalg.cholesky(damped(metric, DAMPING))
    weights = torch.ones(site.rows, dtype=torch.float64) if row_weight is None else row_weight
    gram = torch.zeros_like(chol)
    for part, p in zip(torch.split(site.weight, ROW_CHUNK), torch.split(weights, ROW_CHUNK)):
        w = part.double()
        gram.addmm_(w.T, w * p.unsqueeze(1))
    squares, q = torch.linalg.eigh(chol.T @ gram @ chol)
    q = q.flip(1)
    v = torch.linalg.solve_triangular(chol, q.T, upper=False, left=False)
    directions = chol @ q
    return Factors(_by_parts(site.weight, lambda part: part @ directions), v, squares.clamp_min(0).flip(0))


def absorbed(site: Site) -> float:
    """What a bias takes over of the squared output, |W mu|^2: no metric of a correctable site counts it, the output
    does; an analysis of the site."""
    mean = site.statistics.mean
    return float((site.weight.double() @ mean).square().sum()) if site.correctable and mean is not None else 0.0


def judged_squares(site: Site) -> Tensor | None:
    """What leaving out each direction adds to `local_error`, (k,); the error of rank r is the sum of the others.

    With G_h what the site is judged by, and W - U V = P_> P_>^T W or W S Q_> Q_>^T S^-1 (`best_factors`):

        rows <= columns    (P^T W G_h W^T P)_ii          otherwise    s_i^2 (V G_h V^T)_ii

    None for a tied weight, which is judged by the mean of two.
    """
    judge, best = site.analysis(judge_of), site.analysis(best_factors)
    if site.kind == "tied":
        return None
    judged = judge.rows or judge.inputs
    assert judged is not None
    energies = judged.gram.energies(best.v)
    return (energies if _by_outputs(site) else energies * best.squares) / judged.signal


def _by_outputs(site: Site) -> bool:
    """True where the left Gram matrix is the smaller, and decides."""
    return site.statistics.row_weight is None and site.rows <= site.columns


def _input_metric(site: Site) -> Metric:
    """V reads the site's inputs, but its rows are nobody's vocabulary.

    NB: V stored without a metric, for U to make good, loses up to 8 % less at 4 bits and 3/4 of full rank on MiniLM,
    and 64 % more at a tenth of full rank on a grokked network, where inputs have few directions.
    """
    whole = rounding_metric(site)
    return whole if whole.rows is None else Metric(whole.columns)  # the same one is factored once


def damped_metric(site: Site) -> Tensor:
    """G (in, in) float64 by DAMPING, I where there is none; an analysis of the site, which other structures read."""
    metric = rounding_metric(site).columns
    return damped(torch.eye(site.columns, dtype=torch.float64) if metric is None else metric, DAMPING)


def damped_image(site: Site, rows: Tensor | slice = slice(None)) -> Tensor:
    """Some rows of W G (n, in) float64, with the G of `damped_metric`."""
    level = level_of(rounding_metric(site).columns)
    return site.analysis(image)[rows] + level * site.weight[rows].double()


def level_of(metric: Tensor | None) -> Tensor | float:
    """What `damped_metric` adds to the diagonal."""
    return DAMPING if metric is None else damping(metric, DAMPING)


def damped(metric: Tensor, share: float) -> Tensor:
    """metric + share mean(diag) I; positive definite even where every input was zero."""
    found = metric.clone()
    found.diagonal().add_(damping(metric, share))
    return found


def damping(metric: Tensor, share: float) -> Tensor:
    """share mean(diag), a scalar, never 0."""
    level: Tensor = share * metric.diagonal().mean() + torch.finfo(metric.dtype).tiny**0.5
    return level


@dataclass(frozen=True)
class LowRank(Structure):
    """U V of rank `rank`; the site keeps its bias."""

    name: ClassVar[str] = "low_rank"
    paper: ClassVar[str] = "arXiv 2403.07378"
    errs_as: ClassVar[str] = "factors"

    kinds: ClassVar[tuple[str, ...]] = ("linear", "embedding", "tied", "convolution")

    rank: int | float  # a share of the break-even rank where it is below 1

    def __post_init__(self) -> None:
        whole = isinstance(self.rank, int) and self.rank >= 1
        if not whole and not (isinstance(self.rank, float) and 0 < self.rank < 1):
            raise SpecError(
                f"low_rank rank={self.rank!r} must be a whole number of at least 1, or a share of the break-even rank "
                "between 0 and 1."
            )

    def at(self, site: Site) -> Self:
        """A share becomes floor(share r_max), r_max = floor(out in / (out + in)), `in` the channels of a convolution,
        whatever its kernel (greenformer, arXiv 2109.06762).
        """
        rank = self.rank
        if isinstance(rank, float):
            window = site.uses[0].window
            fan_in = site.columns if window is None else window.channels
            rank = max(1, int(rank * (site.rows * fan_in // (site.rows + fan_in))))
        resolved = type(self)(rank)
        resolved.check(site)
        return resolved

    def check(self, site: Site) -> None:
        most = min(site.rows, site.columns)
        if self.rank > most:
            raise SpecError(
                f"low_rank{{rank={self.rank}}} at {site.name}: the weight is {site.rows} x {site.columns}, "
                f"so rank must be 1 to {most}."
            )

    @classmethod
    def refuses(cls, site: Site) -> str | None:
        if why := cls.unserved(site):
            return why
        if min(site.rows, site.columns) < 2:
            return f"a {site.rows} x {site.columns} weight has no rank to lose"
        return None

    @classmethod
    def space(cls, site: Site) -> Iterator[Self]:
        """Ranks in even steps up to 3/4 of full: above break-even they still pay once the factors are quantized."""
        top = max(1, min(site.rows, site.columns) * 3 // 4)
        yield from (cls(rank) for rank in sorted({max(1, top * i // RANK_STEPS) for i in range(1, RANK_STEPS + 1)}))

    def matrices(self, site: Site) -> dict[str, tuple[int, int]]:
        return {"v": (int(self.rank), site.columns), "u": (site.rows, int(self.rank))}

    def error_bound(self, site: Site) -> float:
        squares = site.analysis(best_factors).squares
        total = float(squares.sum()) + site.analysis(absorbed)
        return float(squares[self.rank :].sum()) / total if total > 0 else 0.0

    def unstored(self, site: Site) -> Tensor:
        best = site.analysis(best_factors)
        return best.u[:, : self.rank] @ best.v[: self.rank].to(best.u.dtype)

    def unstored_rows(self, site: Site, rows: Tensor) -> Tensor:
        best = site.analysis(best_factors)
        return best.u[rows, : self.rank] @ best.v[: self.rank].to(best.u.dtype)

    def unstored_error(self, site: Site) -> float:
        lost = site.analysis(judged_squares)
        return super().unstored_error(site) if lost is None else float(lost[self.rank :].sum())

    def factor(self, site: Site, store: Store) -> None:
        self.check(site)
        best, metric = site.analysis(best_factors), rounding_metric(site)
        u, v = best.u[:, : self.rank], best.v[: self.rank]
        # Split the scale evenly, so that neither factor leaves the range of float16.
        balance = (u.norm(dim=0).clamp_min(1e-30) / v.norm(dim=1).clamp_min(1e-30)).sqrt()
        stored_v = store("v", (v * balance.unsqueeze(1)).to(site.weight.dtype), site.analysis(_input_metric)).double()
        image = stored_v if metric.columns is None else stored_v @ metric.columns
        refitted = _refit(site.weight, stored_v, image, metric.columns)
        u = u / balance if refitted is None else refitted
        store("u", u.to(site.weight.dtype), Metric(image @ stored_v.T, metric.rows))

    def dense(self, factors: Mapping[str, Tensor], site: Site) -> Tensor:
        v = factors["v"].double()
        return _by_parts(factors["u"], lambda part: part @ v)

    def emit(self, graph: fx.Graph, use: Use, operands: Mapping[str, Operand], bias: fx.Node | None) -> fx.Node:
        if use.kind == "embedding":
            rows = operands["u"].lookup(use.x)
            transposed = graph.call_function(torch.ops.aten.t.default, (operands["v"].read(),))
            return graph.call_function(torch.ops.aten.linear.default, (rows, transposed))
        if use.window is not None:
            inner = convolve(graph, use.node, use.window, operands["v"].read(), None)
            return mix(graph, inner, use.window, operands["u"].read(), int(self.rank), bias)
        args = (use.x, operands["v"].read(), operands["u"].read())
        return graph.call_function(
            torch.ops.fxcompress.low_rank_linear.default, (*args, bias) if bias is not None else args
        )

    def cost(self, use: Use, rows: int, columns: int, weight_bytes: int, itemsize: int) -> Cost:
        tokens, rank = tokens_of(use), int(self.rank)
        if use.window is not None:
            return use_cost(use, rank, columns, weight_bytes, itemsize) + linear_cost(tokens, rows, rank, 0, itemsize)
        return op.cost(tokens, rows, columns, rank, weight_bytes, itemsize)


def _refit(w: Tensor, v: Tensor, image: Tensor, metric: Tensor | None) -> Tensor | None:
    """U = W G V^T (V G V^T)^-1, the least-squares factor for the V that was stored; image: V G before G is damped.
    None where that is no number."""
    vg = image if metric is None else image + damping(metric, DAMPING) * v
    gram = damped(vg @ v.T, 1e-9)
    u = _by_parts(w, lambda part: torch.linalg.solve(gram, vg @ part.T).T)
    return u if bool(torch.isfinite(u).all()) else None


def _by_parts(matrix: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
    """`work` on rows in float64; of a vocabulary, for which that is too much at once, the results are kept at least in
    float32."""
    parts = torch.split(matrix, ROW_CHUNK)
    kept = torch.float64 if len(parts) == 1 else torch.promote_types(matrix.dtype, torch.float32)
    return torch.cat([work(part.double()).to(kept) for part in parts])
