"""The main loop of one product:  acc (BLOCK_N, BLOCK_M) = W (N, K) x^T (K, M), then the epilogue.

W is the left operand, so the result is transposed: on sm_90 the tensor cores then read the unpacked tile straight from
registers instead of by way of shared memory, and a small batch fills their short side (16 columns) instead of the long
one (64 rows).

SPLIT > 1 divides the columns among as many programs for each tile. Each writes its float32 partial sums, and the last
to arrive adds all of them up in a fixed order, does the epilogue and puts its counter back to zero: the same bits on
every run, and a workspace that is zero once serves every launch after it.
"""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from fxcompress.codegen.spec import Call
from fxcompress.codegen.triton.counters import zeroed
from fxcompress.codegen.triton.epilogue import Epilogue
from fxcompress.codegen.triton.kernel import Compute, Config, Kernel, Launch
from fxcompress.codegen.triton.loaders import loader_of
from fxcompress.codegen.triton.loaders.base import TYPES, Loader
from fxcompress.codegen.triton.loaders.dense import Dense
from fxcompress.codegen.triton.unpack import BLOCK_M, BLOCK_N, FINISH, UNPACK, finish, unpack

PREFIX = "w_"
MOST_TOKENS = 128  # of the fused kernel, where no table says otherwise


@dataclass(frozen=True)
class Prologue:
    """What is done to x on its way into a product.

    arguments: pointers. start: lines before the loop. tile: lines after each x_tile (columns, BLOCK_M) is read. sums:
    names of what they add up, (BLOCK_M,). finish: lines that put acc right at the end.
    """

    arguments: tuple[str, ...] = ()
    start: tuple[str, ...] = ()
    tile: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()
    finish: tuple[str, ...] = ()


def gemm(
    name: str, loader: Loader, epilogue: Epilogue, outputs: Sequence[int], split: bool, prologue: Prologue = Prologue()
) -> str:
    """The text of the kernel. Arguments: x, one y an output, the prologue's, the loader's, the epilogue's, the
    workspace where it splits, M; BLOCK_M, BLOCK_N and SPLIT are constexprs."""
    finish = [*prologue.finish, *epilogue.lines, *store(epilogue, outputs)]
    end = "K" if loader.walked == loader.columns else str(loader.walked)
    span = Span(loader.walked, f"ps * {loader.step}", end, programs="SPLIT")
    arguments = ["x", *(f"y{i}" for i in range(len(outputs))), *prologue.arguments]
    arguments += [*(PREFIX + p for p in loader.pointers), *(f"p_{o.name}" for o in epilogue.operands)]
    arguments += ["partials", *(f"partial_{s}" for s in prologue.sums), "arrived"] if split else []
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
{indent([*prologue.start, *walk(loader, PREFIX, "BLOCK_N", span, prologue.tile)], 4)}
{indent(_finish_last(finish, prologue.sums) if split else finish, 4)}
"""


@dataclass(frozen=True)
class Span:
    """The columns of a weight that a loop walks, and where the activations that meet them lie."""

    columns: int
    first: str = "0"
    last: str = "K"
    programs: str = "1"  # that share them, a step each in turn
    x: str = "x + rm.to(tl.int64)[None, :] * K + column[:, None]"  # of token rm and `column`


def walk(loader: Loader, prefix: str, rows: str, span: Span, tile: Sequence[str] = ()) -> list[str]:
    """acc (rows, BLOCK_M) = W x^T by a loop over the columns of `span`, those steps that are this program's; `tile` is
    done to each x_tile."""
    every = f"{loader.step} * {span.programs}" if span.programs != "1" else str(loader.step)
    lines = [f"acc = tl.zeros(({rows}, BLOCK_M), tl.float32)", *loader.once(prefix)]
    lines += ["total = tl.zeros((BLOCK_M,), tl.float32)"] if _sums_all(loader) else []
    lines.append(f"for k in range({span.first}, {span.last}, {every}):")
    body = step(loader, prefix, [[*_activations(loader, plane, span), *tile] for plane in range(loader.planes)])
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


def _activations(loader: Loader, plane: int, span: Span) -> list[str]:
    whole = span.columns % loader.step == 0
    last = span.last if loader.walked == loader.columns else "K"  # of x, where its columns are looked up
    inside = "m_in[None, :]" if whole else f"m_in[None, :] & (column < {last})[:, None]"
    return [f"column = {loader.column(plane)}", f"x_tile = tl.load({span.x}, mask={inside}, other=0.0)"]


def _sums_all(loader: Loader) -> bool:
    return loader.needs_total and not loader.runs()


def _finish_last(finish: Sequence[str], sums: Sequence[str]) -> list[str]:
    of_tile = "({0} * tl.num_programs(0) + pn) * M + rm"
    return [
        "mine = partials + (ps * M + rm).to(tl.int64)[None, :] * N + rn[:, None]",
        "tl.store(mine, acc, mask=inside)",
        *(f"tl.store(partial_{s} + {of_tile.format('ps')}, {s}, mask=m_in)" for s in sums),
        "tl.debug_barrier()  # every thread's part is written before the counter moves",
        "counter = arrived + pm * tl.num_programs(0) + pn",
        'if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLIT - 1:',
        "    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)",
        *(f"    {s} = tl.zeros((BLOCK_M,), tl.float32)" for s in sums),
        "    for j in range(SPLIT):",
        "        part_of_j = partials + (j * M + rm).to(tl.int64)[None, :] * N + rn[:, None]",
        '        acc += tl.load(part_of_j, mask=inside, other=0.0, cache_modifier=".cg")',
        *(
            f'        {s} += tl.load(partial_{s} + {of_tile.format("j")}, mask=m_in, other=0.0, cache_modifier=".cg")'
            for s in sums
        ),
        *(f"    {line}" for line in finish),
        "    tl.store(counter, 0)",
    ]


class Product(Kernel):
    """One weight."""

    @classmethod
    def read(cls, product: Call) -> tuple[tuple[str, Loader], ...]:
        return ((PREFIX, loader_of(product.args[1])),)

    @functools.cached_property
    def forms(self) -> dict[str, str]:
        loader = self.loaders[-1][1]
        names = {False: "fused_linear", True: "fused_linear_split"}
        fused = {name: gemm(name, loader, self.epilogue, self.spec.outputs, split) for split, name in names.items()}
        stores = store(self.epilogue, self.spec.outputs)
        return {
            **fused,
            UNPACK: unpack(UNPACK, PREFIX, loader),
            FINISH: finish(FINISH, self.rows, self.epilogue, stores),
        }

    @property
    def aside(self) -> list[Launch]:
        loader, dtype = self.loaders[-1][1], "*" + TYPES[self.dtype]
        own = {PREFIX + name: "*" + kind for name, kind in loader.pointers.items()}
        behind = {"z": dtype, **self.result_types, **self.operand_types, "M": "i32"}
        return [
            Launch(UNPACK, {**own, "weight": dtype}, {"BLOCK_N": loader.together or BLOCK_N}, False),
            Launch(FINISH, behind, {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}, False),
        ]

    def form(self, config: Config) -> str:
        return "fused_linear_split" if config.split > 1 else "fused_linear"

    def constants(self, config: Config) -> dict[str, int]:
        return {"BLOCK_M": config.block_m, "BLOCK_N": self.block_n(config), "SPLIT": config.split}

    def block_n(self, config: Config) -> int:
        return self.loaders[-1][1].together or config.block_n

    def grid(self, tokens: int, config: Config) -> tuple[int, ...]:
        return math.ceil(self.rows / self.block_n(config)), math.ceil(tokens / config.block_m), config.split

    def workspace(self, x: Tensor, config: Config) -> dict[str, Tensor]:
        if config.split == 1:
            return {}
        across, down, _ = self.grid(len(x), config)
        return {
            "partials": x.new_empty(config.split, len(x), self.rows, dtype=torch.float32),
            "arrived": zeroed(across * down, x.device),
        }

    def rule(self, tokens: int, multiprocessors: int) -> Config | None:
        """Two programs a multiprocessor, by splitting the columns where there are too few tiles; at most 16 ways, and
        four steps each."""
        loader = self.loaders[-1][1]
        if tokens > (MOST_TOKENS if self.dtype.itemsize == 2 else 16):  # no tensor cores multiply float32 as it is
            return None
        block_m = min(next(size for size in (16, 32, 64) if size >= min(tokens, 64)), loader.most_tokens)
        block_n = min(128, loader.most_rows)
        warps = 8 if block_m * block_n > 4096 else 4
        tiles = math.ceil(self.rows / block_n) * math.ceil(tokens / block_m)
        steps = math.ceil(self.columns / loader.step)
        split = max(1, min(2 * multiprocessors // tiles, steps // 4, 16))
        return Config(block_m, block_n, split, warps, 3)

    def apart(
        self, x: Tensor, prepared: Sequence[Tensor], tensors: Sequence[Tensor], extras: Sequence[Tensor],
        dtypes: Sequence[torch.dtype], compute: Compute,
    ) -> list[Tensor]:  # fmt: skip
        """The weight unpacked once, a library's product, the epilogue behind it."""
        rows, weight = x.reshape(-1, self.columns), self._unpacked(prepared, x)
        if len(self.spec.steps) == 1 and list(dtypes) == [x.dtype]:  # at most a bias, which the library adds
            bias = prepared[-1] if self.epilogue.operands else None
            return [linear(rows, weight, bias).view(*x.shape[:-1], self.rows)]
        z = (rows @ weight.T).contiguous()
        outputs = self.empty(x, dtypes)
        if len(rows):
            grid = math.ceil(self.rows / BLOCK_N), math.ceil(len(rows) / BLOCK_M)
            finishing = getattr(self.module, FINISH)
            finishing[grid](
                z, *outputs, *self.operands(prepared, extras), len(rows), BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=4
            )
        return outputs

    def _unpacked(self, prepared: Sequence[Tensor], x: Tensor) -> Tensor:
        loader = self.loaders[-1][1]
        if isinstance(loader, Dense):
            return prepared[0].to(x.dtype)
        made = x.new_empty if loader.walked == loader.columns else x.new_zeros
        weight, block_n = made(self.rows, self.columns), loader.together or BLOCK_N
        grid = math.ceil(self.rows / block_n), math.ceil(loader.walked / loader.step)
        unpacking = getattr(self.module, UNPACK)
        unpacking[grid](*prepared[: len(loader.pointers)], weight, BLOCK_N=block_n, num_warps=4)
        return weight
