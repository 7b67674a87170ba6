"""The main loop of one product:  acc (BLOCK_N, BLOCK_M) = W (N, K) x^T (K, M), then the epilogue.

W is the left operand, so the result is transposed: on sm_90 the tensor cores then read the unpacked tile straight from
registers instead of by way of shared memory, and a small batch fills their short side (16 columns) instead of the long
one (64 rows).

SPLIT > 1 divides the columns among as many programs for each tile. Each writes its float32 partial sums, and the last
to arrive adds all of them up in a fixed order, does the epilogue and puts its counter back to zero: the same bits on
every run, and a workspace that is zero once serves every launch after it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import torch
from torch import Tensor

from fxcompress.codegen.spec import Call
from fxcompress.codegen.triton.epilogue import Epilogue
from fxcompress.codegen.triton.kernel import Config, Kernel
from fxcompress.codegen.triton.loaders import loader_of
from fxcompress.codegen.triton.loaders.base import Loader

PREFIX = "w_"


def gemm(name: str, loader: Loader, epilogue: Epilogue, outputs: Sequence[int], split: bool) -> str:
    """The text of the kernel. Arguments: x, one y an output, the loader's, the epilogue's, the workspace where it
    splits, M; BLOCK_M, BLOCK_N and SPLIT are constexprs."""
    finish = [*epilogue.lines, *store(epilogue, outputs)]
    arguments = ["x", *(f"y{i}" for i in range(len(outputs))), *(PREFIX + p for p in loader.pointers)]
    arguments += [f"p_{o.name}" for o in epilogue.operands] + (["partials", "arrived"] if split else [])
    return f"""@triton.jit
def {name}({", ".join(arguments)}, M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr):
    N: tl.constexpr = {loader.rows}
    K: tl.constexpr = {loader.columns}
    FLOAT: tl.constexpr = x.dtype.element_ty
    pn, pm, ps = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rn = pn * BLOCK_N + tl.arange(0, BLOCK_N)
    rm = pm * BLOCK_M + tl.arange(0, BLOCK_M)
    n_in, m_in = rn < N, rm < M
    inside = n_in[:, None] & m_in[None, :]
{indent(walk(loader, PREFIX, "BLOCK_N", "ps", "SPLIT"), 4)}
{indent(_finish_last(finish) if split else finish, 4)}
"""


def walk(loader: Loader, prefix: str, rows: str, first: str = "0", programs: str = "1") -> list[str]:
    """acc (rows, BLOCK_M) = W x^T by a loop over the columns of W, those steps that are this program's."""
    every = f"{loader.step} * {programs}" if programs != "1" else str(loader.step)
    lines = [f"acc = tl.zeros(({rows}, BLOCK_M), tl.float32)", *loader.once(prefix)]
    lines += ["total = tl.zeros((BLOCK_M,), tl.float32)"] if _sums_all(loader) else []
    end = "K" if loader.walked == loader.columns else str(loader.walked)
    lines.append(f"for k in range({first} * {loader.step}, {end}, {every}):")
    body = step(loader, prefix, [_activations(loader, plane) for plane in range(loader.planes)])
    return [*lines, *(f"    {line}" for line in body), *scale_all(loader, prefix)]


def step(loader: Loader, prefix: str, activations: Sequence[Sequence[str]]) -> list[str]:
    """The tiles of one step, each times what `activations` of its plane leave in x_tile, added to acc."""
    lines = loader.load(prefix)
    runs = loader.runs()
    for run in runs or [range(loader.planes)]:
        lines += loader.begin(prefix, run.start) if runs else []
        into = "part" if runs else "acc"
        for plane in run:
            first = plane == run.start
            lines += activations[plane]
            if loader.needs_total:
                total = "tl.sum(x_tile.to(tl.float32), 0)"
                lines.append(f"total = {total}" if first and runs else f"total += {total}")
            start = "" if into == "part" and first else f", {into}"
            lines.append(f'{into} = tl.dot({loader.tile(prefix, plane)}, x_tile{start}, input_precision="ieee")')
        if runs:
            lines.append(f"acc += {loader.scaled(prefix, 'part', 'total')}")
    return lines


def scale_all(loader: Loader, prefix: str) -> list[str]:
    """After the last step, where one scale serves the whole row."""
    if loader.runs():
        return []
    scaled = loader.scaled(prefix, "acc", "total")
    return [] if scaled == "acc" else [f"acc = {scaled}"]


def store(epilogue: Epilogue, outputs: Sequence[int]) -> list[str]:
    """What leaves the kernel, in the dtype of its tensor."""
    return [
        f"tl.store(y{i} + rm.to(tl.int64)[None, :] * N + rn[:, None], "
        f"({epilogue.values[made]}).to(y{i}.dtype.element_ty), mask=inside)"
        for i, made in enumerate(outputs)
    ]


def indent(lines: Sequence[str], by: int) -> str:
    return textwrap.indent("\n".join(lines), " " * by)


def _activations(loader: Loader, plane: int) -> list[str]:
    inside = "m_in[None, :]" if loader.walked % loader.step == 0 else "m_in[None, :] & (column < K)[:, None]"
    return [
        f"column = {loader.column(plane)}",
        f"x_tile = tl.load(x + rm.to(tl.int64)[None, :] * K + column[:, None], mask={inside}, other=0.0)",
    ]


def _sums_all(loader: Loader) -> bool:
    return loader.needs_total and not loader.runs()


def _finish_last(finish: Sequence[str]) -> list[str]:
    return [
        "mine = partials + (ps * M + rm).to(tl.int64)[None, :] * N + rn[:, None]",
        "tl.store(mine, acc, mask=inside)",
        "tl.debug_barrier()  # every thread's part is written before the counter moves",
        "counter = arrived + pm * tl.num_programs(0) + pn",
        'if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLIT - 1:',
        "    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)",
        "    for j in range(SPLIT):",
        "        part_of_j = partials + (j * M + rm).to(tl.int64)[None, :] * N + rn[:, None]",
        '        acc += tl.load(part_of_j, mask=inside, other=0.0, cache_modifier=".cg")',
        *(f"    {line}" for line in finish),
        "    tl.store(counter, 0)",
    ]


class Product(Kernel):
    """One weight."""

    @classmethod
    def read(cls, product: Call) -> tuple[tuple[str, Loader], ...]:
        return ((PREFIX, loader_of(product.args[1])),)

    @property
    def forms(self) -> dict[str, str]:
        ((_, loader),) = self.loaders
        names = {False: "fused_linear", True: "fused_linear_split"}
        return {name: gemm(name, loader, self.epilogue, self.spec.outputs, split) for split, name in names.items()}

    def form(self, config: Config) -> str:
        return "fused_linear_split" if config.split > 1 else "fused_linear"

    def constants(self, config: Config) -> dict[str, int]:
        return {"BLOCK_M": config.block_m, "BLOCK_N": self.block_n(config), "SPLIT": config.split}

    def block_n(self, config: Config) -> int:
        return self.loaders[0][1].together or config.block_n

    def grid(self, tokens: int, config: Config) -> tuple[int, ...]:
        return math.ceil(self.rows / self.block_n(config)), math.ceil(tokens / config.block_m), config.split

    def workspace(self, x: Tensor, config: Config) -> dict[str, Tensor]:
        if config.split == 1:
            return {}
        across, down, _ = self.grid(len(x), config)
        return {
            "partials": x.new_empty(config.split, len(x), self.rows, dtype=torch.float32),
            "arrived": x.new_zeros(across * down, dtype=torch.int32),
        }
