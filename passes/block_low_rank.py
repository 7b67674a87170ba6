"""Block-wise low rank:  a grid of contiguous blocks, each of rank `rank`

    W = [[U_11 V_11  U_12 V_12 ...], [U_21 V_21 ...], ...]        blocks x blocks of (out/blocks, in/blocks)

At equal storage a global SVD is better wherever the spectrum decays as a whole; blocks win where structure is local.
How the factors are made, and what they cost: fxcompress.passes.blocks.

Papers: Gupta et al., An Empirical Investigation of Matrix Factorization Methods for Pre-trained Transformers, 2024
(arXiv 2406.11307), which sets low rank, block-wise low rank and Monarch against each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fxcompress.codegen.ops.block_low_rank_linear import stacked, unstacked
from fxcompress.passes.blocks import BlockGrid


@dataclass(frozen=True)
class BlockLowRank(BlockGrid):
    """A grid of `blocks` x `blocks` contiguous blocks of rank `rank`; `blocks` divides both sides of the weight."""

    name: ClassVar[str] = "block_low_rank"
    paper: ClassVar[str] = "arXiv 2406.11307"
    op: ClassVar[Any] = torch.ops.fxcompress.block_low_rank_linear.default

    split = staticmethod(stacked)
    join = staticmethod(unstacked)
