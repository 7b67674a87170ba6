"""Linformer: `length` landmarks in place of the n keys of an attention that is not causal

    softmax(s Q K^T) V     becomes     softmax(s Q (E K)^T) (F V)         E, F (length, max_length)

One E and one F for all heads of a layer, the paper's headwise sharing. Shorter sequences use their first n columns;
fxcompress.codegen.ops.linformer_attention says what becomes of padding.

            flops                             tensors                   wins below
    exact   2 n m (d + d_v) heads             none
    here    2 (n + m) length (d + d_v) heads  2 length max_length       length < n m / (n + m)

Where E and F come from:

    1  E averages: either neighbours, landmark i the i-th of `length` stretches of positions (`segments`), or positions
       i, i + length, i + 2 length, ... (`strided`: exact up to n = length, worse than segments at n = max_length).
    2  F starts as E. With E fixed, F V is linear in F, so the F which is best for the calibration sequences is a
       least-squares problem: conjugate gradients from F = E, stopped where held-out sequences are served best.
    3  The pair that serves held-out sequences best is taken. Without data: segments.

Measured on MiniLM at n = max_length = 256, fitted to 32 sequences of SST-2 sentences: ||y - y'|| / ||y|| of the
attention outputs on 24 fresh ones, layers 1 to 6:

                length 128                      length 64
    random      1.6 2.3 2.6 2.7 2.3 2.1         2.5 3.8 4.0 4.0 4.1 3.8
    strided     .67 .82 .77 .63 .59 .64         .71 .86 .82 .73 .71 .78
    segments    .50 .57 .52 .45 .50 .58         .63 .70 .63 .54 .61 .71
    fitted      .50 .55 .46 .36 .39 .55         .62 .68 .57 .46 .51 .68

NB: the principal directions of K along the positions, which keep 76 to 93 % of its energy, gave 0.71 to 0.88 at layers
1, 3 and 6 even with the best F: a softmax over mixtures of keys is no mixture of softmaxes, so averages of few keys
come first. NB: these errors are large. A Linformer is trained, as the paper has it; this is where training starts.

Refuses causal attention, where a landmark would show a query the positions after it.

Papers: Wang et al., Linformer, 2020 (arXiv 2006.04768); Cahyawijaya, Greenformers, 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, fx

import fxcompress.codegen.ops.linformer_attention as op
from fxcompress.core.attention import AttentionRewrite, AttentionSample, AttentionSite
from fxcompress.core.cost import Cost
from fxcompress.core.errors import SpecError
from fxcompress.core.site import Site

STEPS = 16  # of conjugate gradients; held-out error was lowest after 1 to 12 of 30
HELD_OUT_SHARE = 4  # one sequence in four
E_NAME, F_NAME = "linformer_e", "linformer_f"  # names of the tensors at the owner


@dataclass(frozen=True)
class Linformer(AttentionRewrite):
    """max_length None is the longest sequence the graph takes (its position table), where it has such a limit."""

    name: ClassVar[str] = "linformer"
    paper: ClassVar[str] = "arXiv 2006.04768"

    length: int
    max_length: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.length, int) or self.length < 1:
            raise SpecError(f"linformer length={self.length!r} must be a whole number of at least 1.")
        if self.max_length is not None and (not isinstance(self.max_length, int) or self.max_length < 1):
            raise SpecError(f"linformer max_length={self.max_length!r} must be a whole number of at least 1.")

    def at(self, site: Site | AttentionSite) -> Self:
        """With max_length settled."""
        self.check(site)
        return replace(self, max_length=self._longest(site)) if isinstance(site, AttentionSite) else self

    def check(self, site: Site | AttentionSite) -> None:
        if not isinstance(site, AttentionSite):
            return
        longest, fixed = self._longest(site), site.shape("k")[-2]
        if longest is None:
            raise SpecError(
                f"{self} at {site.name}: the graph sets no limit to the sequence; give one, the longest it will see: "
                f"linformer{{length={self.length}, max_length=...}}."
            )
        if isinstance(fixed, int) and longest < fixed:
            raise SpecError(f"{self} at {site.name}: every sequence has {fixed} keys, so max_length must be {fixed}.")
        if self.length > longest:
            raise SpecError(
                f"{self} at {site.name}: the longest sequence has {longest} keys, so length must be 1 to {longest}."
            )

    def _longest(self, site: AttentionSite) -> int | None:
        return site.max_keys if self.max_length is None else self.max_length

    @classmethod
    def refuses(cls, site: Site | AttentionSite) -> str | None:
        if not isinstance(site, AttentionSite):
            return "it acts on attention, not on weights"
        if site.causal:
            return "its attention is causal: a landmark would show a query the positions after it"
        if site.mask_kind == "queries":
            return "its mask differs between queries (a window, a bias by distance); all queries share the landmarks"
        if site.dropout:
            return f"it drops attention weights at random (p={site.dropout:g})"
        q, k = site.shape("q"), site.shape("k")
        if len(q) != len(k) or (len(q) > 2 and q[-3] != k[-3]):
            return f"its keys {tuple(k)} are shared by groups of the heads of its queries {tuple(q)}"
        if site.max_keys == 1:
            return "a sequence of one key has no length to lose"
        return None

    @classmethod
    def space(cls, site: Site | AttentionSite) -> Iterator[Self]:
        """1/16, 1/8 and 1/4 of the longest sequence; at half of it the flops are those of exact attention."""
        if isinstance(site, AttentionSite) and site.max_keys is not None:
            yield from (cls(site.max_keys // share) for share in (16, 8, 4) if site.max_keys >= share)

    def factor(self, site: AttentionSite, samples: Sequence[AttentionSample] = ()) -> dict[str, Tensor]:
        """e, f (length, max_length) in the dtype of the keys; fitted to `samples` where there are some."""
        settled = self.at(site)
        length, longest = settled.length, settled.max_length
        assert longest is not None
        seen = max((s.k.shape[-2] for s in samples), default=0)
        if seen > longest:
            raise SpecError(
                f"{self} at {site.name}: the calibration holds a sequence of {seen} keys, so max_length must be "
                f"{seen} at least."
            )
        fit, check = _split(samples)
        best = _Fit(segments(length, longest), segments(length, longest), float("inf"))
        for start in (segments, strided) if fit else ():
            best = min(best, fitted(start(length, longest), fit, check), key=lambda found: found.error)
        dtype = site.k.meta["val"].dtype
        return {E_NAME: best.e.to(dtype), F_NAME: best.f.to(dtype)}

    def draw(self, site: AttentionSite, generator: torch.Generator) -> dict[str, Tensor]:
        """Independent normal entries of variance 1 / length, the random projection of the paper's proof."""
        settled = self.at(site)
        assert settled.max_length is not None
        shape, dtype = (settled.length, settled.max_length), site.k.meta["val"].dtype
        return {key: (torch.randn(shape, generator=generator) / self.length**0.5).to(dtype) for key in (E_NAME, F_NAME)}

    def emit(self, graph: fx.Graph, site: AttentionSite, operands: Mapping[str, fx.Node]) -> fx.Node:
        mask = site.mask
        if mask is not None and mask.meta["val"].dim() > 1:  # (..., m, n), all rows the same
            mask = graph.call_function(torch.ops.aten.select.int, (mask, -2, 0))
        args = (site.q, site.k, site.v, operands[E_NAME], operands[F_NAME], mask, site.scale)
        return graph.call_function(torch.ops.fxcompress.linformer_attention.default, args)

    def cost(self, site: AttentionSite) -> Cost:
        settled = self.at(site)
        assert settled.max_length is not None
        itemsize = site.k.meta["val"].dtype.itemsize
        return op.cost(
            site.batch, site.heads, site.size("q", -2), site.size("k", -2), site.head_dim, int(site.shape("v")[-1]),
            self.length, 2 * self.length * settled.max_length * itemsize, itemsize,
        )  # fmt: skip


def segments(length: int, longest: int) -> Tensor:
    """(length, longest): landmark i averages the i-th of `length` stretches of neighbours."""
    return _means(torch.arange(longest) * length // longest, length)


def strided(length: int, longest: int) -> Tensor:
    """(length, longest): landmark i averages positions i, i + length, i + 2 length, ..."""
    return _means(torch.arange(longest) % length, length)


def _means(landmark: Tensor, length: int) -> Tensor:
    one_hot = F.one_hot(landmark, length).T.float()  # (length, longest)
    return one_hot / one_hot.sum(1, keepdim=True)


class _Fit(NamedTuple):
    e: Tensor  # (length, longest)
    f: Tensor
    error: float  # squared and relative, on the held-out sequences


def attention_error(samples: Sequence[AttentionSample], e: Tensor, f: Tensor) -> float:
    """sum ||y - y'||^2 / sum ||y||^2 over the queries of `samples` that are not padding."""
    lost = total = 0.0
    for s in samples:
        real = _real_queries(s)
        exact = _exact(s) * real
        got = torch.ops.fxcompress.linformer_attention(s.q, s.k, s.v, e, f, s.mask, s.scale) * real
        lost += float((got - exact).square().sum(dtype=torch.float64))
        total += float(exact.square().sum(dtype=torch.float64))
    return lost / max(total, 1e-200)


def fitted(e: Tensor, fit: Sequence[AttentionSample], check: Sequence[AttentionSample]) -> _Fit:
    """The F, on the way of conjugate gradients from F = E to the least-squares answer, with the lowest error on
    `check`.

    A sequence and head with P the softmax over the landmarks, divided by r, asks that P F (w V) be Y. Its normal
    equations, summed:  sum G F (w V)(w V)^T = sum P^T Y (w V)^T,  G = P^T P. What no sequence reaches stays as it is.
    """
    parts = [_normal_equations(s, e) for s in fit]

    def summed(of: Callable[[_Normal], Tensor]) -> Tensor:
        """sum of (length, d) (n, d)^T, on the columns a sequence has."""
        total = torch.zeros_like(e)
        for part in parts:
            n = part.values.shape[-2]
            total[:, :n] += (op.side_by_side(of(part)) @ op.side_by_side(part.values).mT).reshape(-1, len(e), n).sum(0)
        return total

    def applied(f: Tensor) -> Tensor:
        return summed(lambda part: part.gram @ op.project(f[:, : part.values.shape[-2]], part.values))

    f = e.clone()
    residual = summed(lambda part: part.target) - applied(f)
    direction, energy = residual.clone(), residual.square().sum()
    best, floor = _Fit(e, f, attention_error(check, e, f)), energy * 1e-12
    for _ in range(STEPS):
        if not float(energy) > float(floor):
            break
        along = applied(direction)
        step = energy / (direction * along).sum()
        f, residual = f + step * direction, residual - step * along
        before, energy = energy, residual.square().sum()
        direction = residual + energy / before * direction
        if (error := attention_error(check, e, f)) < best.error:
            best = _Fit(e, f, error)
    return best


class _Normal(NamedTuple):
    gram: Tensor  # P^T P (..., heads, length, length)
    target: Tensor  # P^T Y (..., heads, length, d_v)
    values: Tensor  # w V (..., heads, n, d_v)


def _normal_equations(s: AttentionSample, e: Tensor) -> _Normal:
    e_real, _, share = op.normalised(e, e, s.k.shape[-2], s.mask)
    scale = s.q.shape[-1] ** -0.5 if s.scale is None else s.scale
    scores = s.q @ op.project(e_real, s.k).mT * scale + share.log().unsqueeze(-2)
    real = _real_queries(s)
    share = share.unsqueeze(-2)
    used = (real > 0) & (share.amax(-1, keepdim=True) > 0)  # without a landmark the softmax is NaN
    p = torch.where(used, scores.softmax(-1), 0.0) / torch.where(share > 0, share, 1.0)
    values = s.v if s.mask is None else s.v * op.key_weights(s.mask, s.v.dtype).unsqueeze(-1)
    return _Normal(p.mT @ p, p.mT @ (_exact(s) * real), values)


def _exact(s: AttentionSample) -> Tensor:
    mask = None if s.mask is None else s.mask.unsqueeze(-2)
    return F.scaled_dot_product_attention(s.q, s.k, s.v, mask, scale=s.scale)


def _real_queries(s: AttentionSample) -> Tensor:
    """(..., m, 1): 0 where the query is padding. Keys are masked, so this is known where queries and keys are the same
    positions; where their numbers differ they are not."""
    if s.mask is None or s.q.shape[-2] != s.k.shape[-2]:
        return s.q.new_ones(1, 1)
    return (op.key_weights(s.mask, s.q.dtype) > 0).to(s.q.dtype).unsqueeze(-1)


def _split(samples: Sequence[AttentionSample]) -> tuple[list[AttentionSample], list[AttentionSample]]:
    """-> (to fit, held out): the last quarter of every batch, or every fourth batch where they are smaller. What is one
    sequence altogether cannot be judged, so it is not fitted either."""
    fit: list[AttentionSample] = []
    check: list[AttentionSample] = []
    for index, s in enumerate(samples):
        count = len(s.q)
        if count < HELD_OUT_SHARE:
            (check if index % HELD_OUT_SHARE == HELD_OUT_SHARE - 1 else fit).append(s)
        else:
            cut = count - count // HELD_OUT_SHARE
            fit.append(s.rows(slice(0, cut)))
            check.append(s.rows(slice(cut, count)))
    return (fit, check) if check else ([], [])
