"""Low rank in one kernel:  y^T = U t,  t = V x^T,  and t (rank, BLOCK_M) never leaves the chip.

    grid (tokens / BLOCK_M, SHARE)    a program makes t of its tokens, then every SHARE-th tile of the outputs

t is made a slice of rows at a time, as many as a plane of U has columns, so that each plane of U meets its own slice;
the slices are written out one by one in the text. t is rounded to the type of x, as the op's body does.

V is read once a program, so SHARE multiplies its traffic: this is for many tokens. For few, past a rank of MOST (what
the chip holds), and where the planes of U meet no neighbouring rows of V x^T (2:4), two products one after the other do
it (fxcompress.codegen.triton.gemm).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from fxcompress.codegen.spec import Call, Input, Spec
from fxcompress.codegen.triton.epilogue import Epilogue
from fxcompress.codegen.triton.gemm import Span, indent, scale_all, step, store, walk
from fxcompress.codegen.triton.kernel import Compute, Config, Kernel
from fxcompress.codegen.triton.loaders import loader_of
from fxcompress.codegen.triton.loaders.base import Loader

V, U = "v_", "u_"
MOST = 256
_OWN = re.compile(r"\b(acc|total|part|x_tile|column|rn|n_in|k)\b")


def low_rank(name: str, v: Loader, u: Loader, epilogue: Epilogue, outputs: Sequence[int]) -> str:
    """The text of the kernel. Arguments: x, one y an output, V's, U's, the epilogue's, M; BLOCK_M, BLOCK_N and SHARE
    are constexprs."""
    arguments: list[str] = ["x", *(f"y{i}" for i in range(len(outputs)))]
    arguments += [*(V + p for p in v.pointers), *(U + p for p in u.pointers)]
    arguments += [f"p_{o.name}" for o in epilogue.operands]
    slices = -(-u.columns // u.step) * u.planes
    made: list[str] = []
    for i in range(slices):
        rows = [f"rn = {i * u.plane} + tl.arange(0, {u.plane})", f"n_in = rn < {u.columns}"]
        made_of = walk(v, V, str(u.plane), Span(v.columns))
        slice_ = [*rows, *made_of, f"t{i} = tl.where(n_in[:, None], acc, 0.0).to(FLOAT)"]
        made += [_OWN.sub(r"\1_v", line) for line in slice_]  # Triton lets no variable change its shape in a loop
    used = ["acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)", *u.once(U)]
    used += ["total = tl.zeros((BLOCK_M,), tl.float32)"] if u.needs_total and not u.runs() else []
    for first in range(0, slices, u.planes):
        used.append(f"k = {first * u.plane}")
        used += step(u, U, [[f"x_tile = t{first + plane}"] for plane in range(u.planes)])
    used += [*scale_all(u, U), *epilogue.lines, *store(epilogue, outputs)]
    return f"""@triton.jit
def {name}({", ".join(arguments)}, M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHARE: tl.constexpr):
    N: tl.constexpr = {u.rows}
    K: tl.constexpr = {v.columns}
    FLOAT: tl.constexpr = x.dtype.element_ty
    rm = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_in = rm < M
{indent(made, 4)}
    for start in range(tl.program_id(1) * BLOCK_N, N, BLOCK_N * SHARE):
        rn = start + tl.arange(0, BLOCK_N)
        n_in = rn < N
        inside = n_in[:, None] & m_in[None, :]
{indent(used, 8)}
"""


class LowRankProduct(Kernel):
    """Two weights, the small result between them on the chip; `split` is among how many programs the outputs of a
    block of tokens are shared out."""

    @classmethod
    def read(cls, product: Call) -> tuple[tuple[str, Loader], ...]:
        return ((V, loader_of(product.args[1])), (U, loader_of(product.args[2])))

    @functools.cached_property
    def forms(self) -> dict[str, str]:
        (_, v), (_, u) = self.loaders
        if u.columns > MOST or not u.in_order or v.together:
            return {}
        return {"fused_low_rank": low_rank("fused_low_rank", v, u, self.epilogue, self.spec.outputs)}

    def form(self, config: Config) -> str:
        return "fused_low_rank"

    def rule(self, tokens: int, multiprocessors: int) -> Config | None:
        """On the chip where blocks of tokens alone fill the card, so that V is read and used once for each."""
        enough = math.ceil(tokens / 64) >= multiprocessors and self.loaders[0][1].rows <= 128
        return Config(64, 128, 1, 8, 2) if enough and self.dtype.itemsize == 2 else None

    def apart(
        self, x: Tensor, prepared: Sequence[Tensor], tensors: Sequence[Tensor], extras: Sequence[Tensor],
        dtypes: Sequence[torch.dtype], compute: Compute,
    ) -> list[Tensor]:  # fmt: skip
        """V x^T to memory, then U; each as one product, by its own best means."""
        product, *steps = self.spec.steps
        v, u, *bias = product.args[1:]
        taken = self.loaders[0][1].constants
        first = Spec((Call("linear", (Input(), v)),), (0,))
        second = Spec((Call("linear", (Input(), u, *bias)), *steps), self.spec.outputs)
        (t,) = compute(first, x, tensors[:taken], [], [x.dtype])
        return compute(second, t, tensors[taken:], extras, dtypes)

    def constants(self, config: Config) -> dict[str, int]:
        return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "SHARE": config.split}

    def grid(self, tokens: int, config: Config) -> tuple[int, ...]:
        return math.ceil(tokens / config.block_m), config.split
