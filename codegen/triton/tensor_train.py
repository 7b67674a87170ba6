"""A tensor train, contracted in two products:  its cores are multiplied into two factors once, x goes through both.

    W[(i_a, i_b), (j_a, j_b)] = sum_r A[i_a, r, j_a] B[i_b, r, j_b]         A (m_a, R, n_a)    cores 1 .. s
                                                                            B (m_b, R, n_b)    cores s + 1 .. d
    z[i_a, r, j_b] = sum_{j_a} A[i_a, r, j_a] x[j_a, j_b]
    y[i_a, i_b]    = sum_{r, j_b} B[i_b, r, j_b] z[i_a, r, j_b]             or B first and A second, a and b exchanged

    first     A as a matrix (m_a R, n_a); the n_b columns j_b that a token has beside each other are as many tokens
    second    copy i_a of all of B as a matrix (m_b, R n_b), with its run of z

                    multiplications a token     z, elements a token     kept, elements
    A first         R m_a n_b (n_a + m_b)       R m_a n_b               R (m_a n_a + m_b n_b)
    B first         R m_b n_a (n_b + m_a)       R m_b n_a               the same
    dense           m_a m_b n_a n_b             0                       m_a m_b n_a n_b

The split s and which comes first are those of the fewest multiplications: for 4096 x 4096 at rank 16, digits of 4, half
of a dense weight's, and 1/128 of its elements are kept. The digits of x fill the tensor cores even where there is one
token. But z is large, here eight times x and y together. To write and read it takes 61 ns a token at 4.3 TB/s, a dense
product 42 ns at 790 TFLOP/s and rebuilding W 31 us before that: the body of the op, which rebuilds W for many tokens,
should be faster from 1,600 tokens on. That is arithmetic with figures of an H200; nothing of it has been measured.

The factors are made in float32, whatever the cores are kept in, and rounded once to the type of the cores.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxcompress.codegen.ops.fused import evaluate
from fxcompress.codegen.spec import Argument, Call, Constant, Spec, given
from fxcompress.codegen.triton.gemm import Span
from fxcompress.codegen.triton.loaders.base import Loader
from fxcompress.codegen.triton.loaders.dense import Dense
from fxcompress.codegen.triton.two_launches import Stage, TwoLaunches
from fxcompress.core.errors import SpecError

A, B = "a_", "b_"


@dataclass(frozen=True, kw_only=True)
class Factor(Dense):
    """Neighbouring cores as one tensor (m, R, n), kept as a matrix: (m R, n) where it comes first, else (m, R n)."""

    cores: tuple[Argument, ...]
    n: tuple[int, ...]
    m: tuple[int, ...]
    first: bool

    @property
    def digits(self) -> tuple[int, int]:
        """n and m."""
        return math.prod(self.n), math.prod(self.m)

    @property
    def constants(self) -> int:
        return sum(map(_constants, self.cores))

    def prepare(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        own, made = iter(tensors), None  # (R before, n, m, R behind) of the cores so far
        for core, n, m in zip(self.cores, self.n, self.m):
            matrix = _decoded(core, own).float()
            here = matrix.reshape(len(matrix) // n, n, m, matrix.shape[1] // m)
            made = here if made is None else torch.einsum("rnms,spqt->rnpmqt", made, here).flatten(1, 2).flatten(2, 3)
        assert made is not None
        whole = made.permute(2, 0, 3, 1)  # one of the two ranks is 1: the train's end
        return (whole.to(self.dtype).reshape(self.rows, self.columns).contiguous(),)


class TensorTrainProduct(TwoLaunches):
    """Two factors, each the weight of a stage."""

    @classmethod
    def read(cls, product: Call) -> tuple[tuple[str, Loader], ...]:
        named: dict[str, Any] = dict(given(product))
        cores, n, m = (tuple(named[name]) for name in ("cores", "n", "m"))
        if len(cores) < 2:
            raise SpecError("a train of one core is a whole weight: there is nothing to contract.")
        types = [_type(core) for core in cores]
        ranks = [rows // size for (_, (rows, _)), size in zip(types, n)]  # before each core
        ways = [(split, first) for split in range(1, len(cores)) for first in (A, B)]
        split, first = min(ways, key=lambda way: _multiplications(n, m, ranks, *way))
        made = []
        for prefix, part in ((A, slice(split)), (B, slice(split, None))):
            wide, high = math.prod(n[part]), math.prod(m[part])
            rows, columns = (high * ranks[split], wide) if prefix == first else (high, ranks[split] * wide)
            width = min(64, max(16, 1 << (columns - 1).bit_length()))
            factor = Factor(
                rows, columns, types[0][0], width, cores=cores[part], n=n[part], m=m[part], first=prefix == first
            )
            made.append((prefix, factor))
        return tuple(made)

    @property
    def ordered(self) -> list[tuple[str, Factor]]:
        """The factors as they are launched."""
        factors = [(prefix, loader) for prefix, loader in self.loaders if isinstance(loader, Factor)]
        return sorted(factors, key=lambda pair: not pair[1].first)

    @functools.cached_property
    def stages(self) -> tuple[Stage, Stage]:
        (prefix, first), (behind, second) = self.ordered
        n_b, m_b = dict(self.ordered)[B].digits
        (n_2, m_2), (_, m_1) = second.digits, first.digits
        # How far apart neighbouring digits are, among the columns of x and the features of y.
        apart = {A: (n_b, m_b), B: (1, 1)}
        token, beside = f"(rm // {n_2}).to(tl.int64)[None, :]", f"(rm % {n_2})[None, :]"
        x = f"x + {token} * {self.columns} + (column * {apart[prefix][0]})[:, None] + {beside} * {apart[behind][0]}"
        z = f"z + {token} * {self.between} + (own * {n_2})[:, None] + {beside}"
        run = f"z + rm.to(tl.int64)[None, :] * {self.between} + (copy * {second.columns} + column)[:, None]"
        feature = f"copy * {apart[prefix][1]} + own * {apart[behind][1]}"
        return (
            Stage("fused_train_inner", prefix, first, 1, first.rows, Span(first.columns, x=x), "own", z, n_2),
            Stage("fused_train_outer", behind, second, m_1, m_2, Span(second.columns, x=run), "own", feature),
        )

    @property
    def most_tokens(self) -> int:
        return 1_024  # z is what costs, as said above

    @functools.cached_property
    def rows(self) -> int:
        rows = given(self.spec.steps[0])["rows"]
        assert isinstance(rows, int)
        return rows

    @functools.cached_property
    def columns(self) -> int:
        return math.prod(loader.digits[0] for _, loader in self.ordered)

    @functools.cached_property
    def between(self) -> int:
        (_, first), (_, second) = self.ordered
        return first.rows * second.digits[0]


def _multiplications(n: Sequence[int], m: Sequence[int], ranks: Sequence[int], split: int, first: str) -> int:
    """A token, as the table says."""
    (n_a, n_b), (m_a, m_b) = ([math.prod(sizes[:split]), math.prod(sizes[split:])] for sizes in (n, m))
    return ranks[split] * (m_a * n_b * (n_a + m_b) if first == A else m_b * n_a * (n_b + m_a))


def _constants(core: Argument) -> int:
    return len(Spec((core,), (0,)).constants) if isinstance(core, Call) else 1


def _decoded(core: Argument, constants: Iterator[Tensor]) -> Tensor:
    """The core as a matrix, whatever it is kept in."""
    own = [next(constants) for _ in range(_constants(core))]
    if isinstance(core, Constant):
        return own[0]
    assert isinstance(core, Call)
    (matrix,) = evaluate(Spec((core,), (0,)), own[0], own, [])
    return matrix


def _type(core: Argument) -> tuple[torch.dtype, torch.Size]:
    """Of the core as a matrix."""
    leaves = Spec((core,), (0,)).constants if isinstance(core, Call) else (core,)
    empty = (torch.empty(t.shape, dtype=t.dtype, device="meta") for t in leaves if isinstance(t, Constant))
    matrix = _decoded(core, empty)
    return matrix.dtype, matrix.shape
