"""Block low rank and Monarch:  z_ij = V_ij x_j,  then  y_i = sum_j U_ij z_ij = U_i z_i.

    first     copy j of all rows of V with the columns of block j:   row i rank + r is element r of z_ij
    second    copy i of the rows of U that block i owns with z_i:    z_i lies together, its blocks j in order

    z (tokens, blocks i, blocks j, rank)      U's rows of block i:   i out/blocks + own   (block low rank)
                                                                     own blocks + i       (Monarch)

So the exchange between the products of fxcompress.codegen.ops.block_low_rank_linear is an address, and nothing is
copied. z takes 2 tokens blocks^2 rank elements of memory traffic, beside tokens (in + out) of x and y: as much again
where the weights keep half of the parameters in four blocks. In exchange V's tiles are full whatever the rank: kept on
the chip, z_ij would have `rank` rows of the 64 that tensor cores take.

V is walked by chunks of in/blocks columns, which must be whole steps where it is kept in words; U by all its columns.
"""

from __future__ import annotations

import functools

from fxcompress.codegen.spec import Call, given
from fxcompress.codegen.triton.gemm import Span
from fxcompress.codegen.triton.loaders import loader_of
from fxcompress.codegen.triton.loaders.base import Loader
from fxcompress.codegen.triton.two_launches import Stage, TwoLaunches
from fxcompress.core.errors import SpecError

V, U = "v_", "u_"


class BlockLowRankProduct(TwoLaunches):
    """Outputs of a block are neighbours."""

    @classmethod
    def read(cls, product: Call) -> tuple[tuple[str, Loader], ...]:
        v, u = (loader_of(weight) for weight in product.args[1:3])
        for loader in (v, u):
            if loader.together:
                raise SpecError(f"blocks cannot be read as {loader.label}: their rows meet other columns.")
        return ((V, v.in_chunks(v.columns // _blocks(product))), (U, u))

    def row(self, blocks: int) -> str:
        """The row of U, and the feature of y, of result `own` of block `copy`."""
        return f"copy * {self.rows // blocks} + own"

    @functools.cached_property
    def stages(self) -> tuple[Stage, Stage]:
        (_, v), (_, u) = self.loaders
        blocks = _blocks(self.spec.steps[0])
        chunk, rank = v.columns // blocks, v.rows // blocks
        token = f"z + rm.to(tl.int64)[None, :] * {self.between}"
        return (
            Stage(
                "fused_blocks_inner", V, v, blocks, v.rows,
                Span(chunk, f"copy * {chunk}", f"copy * {chunk} + {chunk}"), "own",
                f"{token} + (own // {rank} * {v.rows} + copy * {rank} + own % {rank})[:, None]",
            ),
            Stage(
                "fused_blocks_outer", U, u, blocks, u.rows // blocks,
                Span(u.columns, x=f"{token} + (copy * {u.columns} + column)[:, None]"), self.row(blocks),
            ),
        )  # fmt: skip

    @functools.cached_property
    def between(self) -> int:
        return self.loaders[0][1].rows * _blocks(self.spec.steps[0])


class MonarchProduct(BlockLowRankProduct):
    """Outputs of a block are `blocks` apart."""

    def row(self, blocks: int) -> str:
        return f"own * {blocks} + copy"


def _blocks(product: Call) -> int:
    blocks = given(product)["blocks"]
    assert isinstance(blocks, int)
    return blocks
