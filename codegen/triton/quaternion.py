"""The Hamilton product with a quarter of the weight bytes:  every tile of the components serves four outputs.

    y_a = sum_b SIGNS[a][b] Q_{a xor b} x_b      a, b = 0 .. 3: the chunks of the outputs and the inputs

fxcompress.codegen.ops.quaternion_linear keeps Q as (out/4, in), the components c side by side. A tile of component c is
multiplied with chunk a xor c of the inputs for each a, into four accumulators; so L(Q), four times as large, is never
read, nor made. Four accumulators of BLOCK_N x BLOCK_M are held at once: keep that product at 8,192 or below.

The weights are read once, but the products are as many as those of a dense weight.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from fxcompress.codegen.ops.quaternion_linear import SIGNS
from fxcompress.codegen.spec import Call
from fxcompress.codegen.triton.epilogue import Epilogue
from fxcompress.codegen.triton.gemm import indent, store
from fxcompress.codegen.triton.kernel import Config, Kernel
from fxcompress.codegen.triton.loaders import loader_of
from fxcompress.codegen.triton.loaders.base import Loader
from fxcompress.core.errors import SpecError

PREFIX = "w_"
CHUNKS = range(4)


def quaternion(name: str, loader: Loader, epilogue: Epilogue, outputs: Sequence[int]) -> str:
    """The text of the kernel. Arguments: x, one y an output, the loader's, the epilogue's, M; BLOCK_M and BLOCK_N are
    constexprs, and BLOCK_N counts rows of Q. Raises `SpecError` where no component can be walked from its beginning."""
    chunk = loader.columns // 4
    if loader.together:
        raise SpecError(f"quaternions cannot be read as {type(loader).__name__}: their rows meet other columns of x.")
    loader = loader.in_chunks(chunk)
    arguments = ["x", *(f"y{i}" for i in range(len(outputs))), *(PREFIX + p for p in loader.pointers)]
    arguments += [f"p_{o.name}" for o in epilogue.operands]
    body = loader.once(PREFIX)
    body += [f"acc{a} = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)" for a in CHUNKS]
    if loader.needs_total and not loader.runs():
        body += [f"total{a} = tl.zeros((BLOCK_M,), tl.float32)" for a in CHUNKS]
    for c in CHUNKS:
        body.append(f"for k in range({c * chunk}, {(c + 1) * chunk}, {loader.step}):")
        body += [f"    {line}" for line in _step(loader, c, chunk)]
    finish = body
    for a in CHUNKS:
        finish += [f"acc = acc{a}" if loader.runs() else f"acc = {loader.scaled(PREFIX, f'acc{a}', f'total{a}')}"]
        finish += [f"rn = {a * loader.rows} + rq", "n_in = rq < ROWS", "inside = n_in[:, None] & m_in[None, :]"]
        finish += [*epilogue.lines, *store(epilogue, outputs), "rn, n_in = rq, rq < ROWS"]
    return f"""@triton.jit
def {name}({", ".join(arguments)}, M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    ROWS: tl.constexpr = {loader.rows}
    N: tl.constexpr = {4 * loader.rows}
    K: tl.constexpr = {loader.columns}
    FLOAT: tl.constexpr = x.dtype.element_ty
    rq = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rm = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rn, n_in, m_in = rq, rq < ROWS, rm < M
{indent(finish, 4)}
"""


def _step(loader: Loader, c: int, chunk: int) -> list[str]:
    """One step of component `c`; k runs over the columns of Q, so k - c chunk over those of a chunk of x."""
    lines = loader.load(PREFIX)
    runs = loader.runs()
    inside = "m_in[None, :]" if chunk % loader.step == 0 else f"m_in[None, :] & (column < {chunk})[:, None]"
    for run in runs or [range(loader.planes)]:
        lines += loader.begin(PREFIX, run.start) if runs else []
        into = "part" if runs else "acc"
        for plane in run:
            first = plane == run.start
            lines += [
                f"tile = {loader.tile(PREFIX, plane)}",
                f"column = {loader.column(plane)} - {c * chunk}",
            ]
            for a in CHUNKS:
                b = a ^ c
                sign = "" if SIGNS[a][b] > 0 else "-"
                read = f"x + rm.to(tl.int64)[None, :] * K + {b * chunk} + column[:, None]"
                lines.append(f"x_tile = {sign}tl.load({read}, mask={inside}, other=0.0)")
                if loader.needs_total:
                    total = "tl.sum(x_tile.to(tl.float32), 0)"
                    lines.append(f"total{a} = {total}" if first and runs else f"total{a} += {total}")
                start = "" if into == "part" and first else f", {into}{a}"
                lines.append(f'{into}{a} = tl.dot(tile, x_tile{start}, input_precision="ieee")')
        if runs:
            lines += [f"acc{a} += {loader.scaled(PREFIX, f'part{a}', f'total{a}')}" for a in CHUNKS]
    return lines


class QuaternionProduct(Kernel):
    """A quarter of a weight, used four times; `block_n` counts rows of the components."""

    @classmethod
    def read(cls, product: Call) -> tuple[tuple[str, Loader], ...]:
        return ((PREFIX, loader_of(product.args[1])),)

    @functools.cached_property
    def forms(self) -> dict[str, str]:
        ((_, loader),) = self.loaders
        return {"fused_quaternion": quaternion("fused_quaternion", loader, self.epilogue, self.spec.outputs)}

    def form(self, config: Config) -> str:
        return "fused_quaternion"

    def constants(self, config: Config) -> dict[str, int]:
        return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}

    def grid(self, tokens: int, config: Config) -> tuple[int, ...]:
        return math.ceil(self.rows // 4 / config.block_n), math.ceil(tokens / config.block_m)

    def rule(self, tokens: int, multiprocessors: int) -> Config | None:
        """Past some tokens the products are what takes the time, and a library does those faster."""
        return Config(16, 64, 1, 4, 3) if tokens <= 64 else None

    @property
    def flops(self) -> int:
        return 4 * super().flops

    @property
    def rows(self) -> int:
        return 4 * self.loaders[0][1].rows
