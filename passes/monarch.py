"""Monarch:  M = P L P^T R        R, L block-diagonal, P the permutation that strides

    M[s blocks + j, k q + i] = sum_r L[j][s, k, r] R[k][j, r, i]        j, k = 1 .. blocks;  q = in / blocks

Row j, j + blocks, j + 2 blocks, ... of M against the contiguous inputs of block k make a block of rank `rank`, so the
nearest Monarch matrix is the truncated SVD of every such block, and a Monarch matrix is its own projection. It is a
block-wise low rank of W with its outputs strided: fxcompress.passes.blocks makes the factors, with R in v and L in u.

`rank` is the number of values that each input block hands to each output block:

    rank = 1, blocks = sqrt(n)             the Monarch matrices of the paper, n x n: 2 n^1.5 elements of n^2
    rank = min(in, out) / blocks^2         MonarchLinear(nblocks=blocks), which is as wide inside as its narrower side:
                                           blocks min(in, out) (in + out) / blocks^2 elements
                                           blocks = 4: 50 % of a square weight, 31.25 % of 768 -> 3072 (rank 48)

Papers: Dao et al., Monarch, ICML 2022 (arXiv 2204.00595), the projection of section 3; Gupta et al., 2024
(arXiv 2406.11307), Monarch against low rank on pretrained transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fxcompress.codegen.ops.monarch_linear import strided, unstrided
from fxcompress.passes.blocks import BlockGrid


@dataclass(frozen=True)
class Monarch(BlockGrid):
    """`blocks` blocks of R and of L, which share `rank` values pair by pair; `blocks` divides both sides."""

    name: ClassVar[str] = "monarch"
    paper: ClassVar[str] = "arXiv 2204.00595"
    op: ClassVar[Any] = torch.ops.fxcompress.monarch_linear.default

    rank: int | float = 1

    split = staticmethod(strided)
    join = staticmethod(unstrided)
