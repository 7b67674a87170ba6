"""The main loop of one product:  acc (BLOCK_N, BLOCK_M) = W (N, K) x^T (K, M), then the epilogue.

W is the left operand, so the result is transposed: on sm_90 the tensor cores then read the unpacked tile straight from
registers instead of by way of shared memory, and a small batch fills their short side (16 columns) instead of the long
one (64 rows).

SPLIT > 1 divides the columns among as many programs for each tile. Each writes its float32 partial sums, and the last
to arrive adds all of them up in a fixed order, does the epilogue and puts its counter back to zero: the same bits on
every run, no second launch, nothing to clear beforehand.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from fxcompress.codegen.triton.epilogue import Epilogue
from fxcompress.codegen.triton.loaders import Loader

PREFIX = "w_"
_COLUMNS = "k + {first} + tl.arange(0, {plane})"


def gemm(name: str, loader: Loader, epilogue: Epilogue, outputs: Sequence[int], split: bool) -> str:
    """The text of the kernel. Arguments: x, one y an output, the loader's, the epilogue's, the workspace where it
    splits, M; BLOCK_M, BLOCK_N and SPLIT are constexprs."""
    outs = [f"y{i}" for i in range(len(outputs))]
    pointers = ["x", *outs, *(PREFIX + p for p in loader.pointers), *(f"p_{o.name}" for o in epilogue.operands)]
    pointers += ["partials", "arrived"] if split else []
    stores = [
        f"tl.store({y} + rm.to(tl.int64)[None, :] * N + rn[:, None], "
        f"({epilogue.values[step]}).to({y}.dtype.element_ty), mask=inside)"
        for y, step in zip(outs, outputs)
    ]
    finish = [*epilogue.lines, *stores]
    body = _finish_last(finish) if split else finish
    return f"""@triton.jit
def {name}({", ".join(pointers)}, M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr):
    N: tl.constexpr = {loader.rows}
    K: tl.constexpr = {loader.columns}
    FLOAT: tl.constexpr = x.dtype.element_ty
    pn, pm, ps = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rn = pn * BLOCK_N + tl.arange(0, BLOCK_N)
    rm = pm * BLOCK_M + tl.arange(0, BLOCK_M)
    n_in, m_in = rn < N, rm < M
    inside = n_in[:, None] & m_in[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
{_indent(["total = tl.zeros((BLOCK_M,), tl.float32)"] if _sums_all(loader) else [], 4)}
    for k in range(ps * {loader.step}, K, {loader.step} * SPLIT):
{_indent(_step(loader), 8)}
{_indent(_scale_all(loader), 4)}
{_indent(body, 4)}
"""


def _step(loader: Loader) -> list[str]:
    """One step of the loop: the tiles of every run, then what they add up to."""
    lines = loader.load(PREFIX)
    runs = loader.runs()
    for run in runs or [range(loader.planes)]:
        into = "part" if runs else "acc"
        for plane in run:
            first = plane == run.start
            lines += _activations(loader, plane)
            if loader.needs_total:
                total = "tl.sum(x_tile.to(tl.float32), 0)"
                lines.append(f"total = {total}" if first and runs else f"total += {total}")
            start = "" if into == "part" and first else f", {into}"
            lines.append(
                f'{into} = tl.dot({loader.tile(PREFIX, plane)}, x_tile{start}, input_precision="ieee")'
            )
        if runs:
            scaling, added = loader.scaled(PREFIX, run.start, "part", "total")
            lines += [*scaling, f"acc += {added}"]
    return lines


def _activations(loader: Loader, plane: int) -> list[str]:
    columns = _COLUMNS.format(first=plane * loader.plane, plane=loader.plane)
    inside = "m_in[None, :]" if loader.columns % loader.step == 0 else "m_in[None, :] & (column < K)[:, None]"
    return [
        f"column = {columns}",
        f"x_tile = tl.load(x + rm.to(tl.int64)[None, :] * K + column[:, None], mask={inside}, other=0.0)",
    ]


def _sums_all(loader: Loader) -> bool:
    return loader.needs_total and not loader.runs()


def _scale_all(loader: Loader) -> list[str]:
    """After the loop, where one scale serves the whole row."""
    if loader.runs():
        return []
    lines, scaled = loader.scaled(PREFIX, 0, "acc", "total")
    return [*lines, *([] if scaled == "acc" else [f"acc = {scaled}"])]


def _finish_last(finish: Sequence[str]) -> list[str]:
    return [
        "at = rm.to(tl.int64)[None, :] * N + rn[:, None]",
        "tl.store(partials + ps * M.to(tl.int64) * N + at, acc, mask=inside)",
        "tl.debug_barrier()  # every thread's part is written before the counter moves",
        "counter = arrived + pm * tl.num_programs(0) + pn",
        'if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLIT - 1:',
        "    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)",
        "    for j in range(SPLIT):",
        '        acc += tl.load(partials + j * M.to(tl.int64) * N + at, mask=inside, other=0.0, cache_modifier=".cg")',
        *(f"    {line}" for line in finish),
        "    tl.store(counter, 0)",
    ]


def _indent(lines: Sequence[str], by: int) -> str:
    return textwrap.indent("\n".join(lines), " " * by)
