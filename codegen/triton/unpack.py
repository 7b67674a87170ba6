"""For many tokens: the weight unpacked once, a library's product, and the epilogue as a kernel of its own.

    W = unpack(...)  (N, K), in the type of x         z = x W^T  (M, N)         y = epilogue(z)

A fused product unpacks its weight anew for every block of tokens; past some hundred of them that costs more than
writing W once. (From about 180 tokens on, 4-bit weights have nothing left to win on an H200 but memory: the product
itself is what takes the time. `fxcompress.codegen.triton.configs` says from where on this is done.)

How a loader scales is told in terms of a product with activations (fxcompress.codegen.triton.loaders.base); column j
of W is the product with e_j, so that is what is asked of it: each tile as the product, ones as the sums. Where only
kept columns are walked, W starts as zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

from fxcompress.codegen.triton.epilogue import Epilogue
from fxcompress.codegen.triton.loaders.base import Loader

UNPACK, FINISH = "unpack_weight", "finish"
BLOCK_N, BLOCK_M = 64, 16


def unpack(name: str, prefix: str, loader: Loader) -> str:
    """The text of the first kernel: the loader's pointers -> weight (N, K). One program a block of rows and a step."""
    body = [*loader.once(prefix), *loader.load(prefix), f"ones = tl.full(({loader.plane},), 1.0, tl.float32)"]
    for run in loader.runs() or [range(loader.planes)]:
        body += loader.begin(prefix, run.start) if loader.runs() else []
        for plane in run:
            tile = f"{loader.tile(prefix, plane)}.to(tl.float32)"
            body += [f"column = {loader.column(plane)}", f"values = {loader.scaled(prefix, tile, 'ones')}"]
            body.append(
                "tl.store(weight + rn.to(tl.int64)[:, None] * K + column[None, :], values.to(FLOAT), "
                "mask=n_in[:, None] & (column < K)[None, :])"
            )
    lines = "\n".join(f"    {line}" for line in body)
    return f"""@triton.jit
def {name}({", ".join(prefix + p for p in loader.pointers)}, weight, BLOCK_N: tl.constexpr):
    N: tl.constexpr = {loader.rows}
    K: tl.constexpr = {loader.columns}
    FLOAT: tl.constexpr = weight.dtype.element_ty
    pn = tl.program_id(0)
    rn = pn * BLOCK_N + tl.arange(0, BLOCK_N)
    n_in = rn < N
    k = tl.program_id(1) * {loader.step}
{lines}
"""


def finish(name: str, rows: int, epilogue: Epilogue, stores: Sequence[str]) -> str:
    """The text of the second: z (M, N), one y an output, the epilogue's operands, M."""
    arguments = ["z", *(f"y{i}" for i in range(len(stores))), *(f"p_{o.name}" for o in epilogue.operands)]
    lines = "\n".join(f"    {line}" for line in [*epilogue.lines, *stores])
    return f"""@triton.jit
def {name}({", ".join(arguments)}, M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    N: tl.constexpr = {rows}
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rm = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_in, m_in = rn < N, rm < M
    inside = n_in[:, None] & m_in[None, :]
    acc = tl.load(z + rm.to(tl.int64)[None, :] * N + rn[:, None], mask=inside, other=0.0).to(tl.float32)
{lines}
"""
