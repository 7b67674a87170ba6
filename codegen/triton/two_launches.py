"""Two products, one after the other, a kernel each:  z = A x,  y = epilogue(B z),  with z in memory between them.

A `Stage` is many small products side by side: each of its copies multiplies rows of the weight with columns of what it
reads. Families differ in addresses alone, which are expressions of

    copy (scalar)      own (BLOCK_N,), the results of a copy      rm (BLOCK_M,), tokens      column (plane,)

    grid (tiles of tokens, tiles of the results of a copy, copies)

z is in the type of x, as the ops' bodies round it. Only the second stage has an epilogue, so only there must rm be
tokens and rn features; the first may take `width` results that a token has beside each other as so many tokens.

One kernel that keeps z on the chip would save a launch, about 2 us, but whatever tiles of outputs share a z would each
make it again, from a weight read again, or be made by one program: with few tokens that is too few programs to reach
the memory's speed, or too much to read. Here a tile of tokens meets each weight of a copy once, there are as many
programs as tiles and copies, and any rank will do.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fxcompress.codegen.triton.epilogue import Epilogue
from fxcompress.codegen.triton.gemm import Span, indent, store, walk
from fxcompress.codegen.triton.kernel import Config, Kernel, Launch
from fxcompress.codegen.triton.loaders.base import TYPES, Loader


@dataclass(frozen=True)
class Stage:
    """One of the two products."""

    name: str
    prefix: str
    loader: Loader
    copies: int
    rows: int  # results of a copy
    span: Span  # the columns of a copy
    row: str  # of the weight, for result `own`
    result: str = ""  # first stage: where z lies; second: the feature of y, where it is not the row of the weight
    width: int = 1

    def constants(self, config: Config) -> dict[str, int]:
        """No tile is wider than what there is to fill it, but 16 is the least that tensor cores take."""
        return {"BLOCK_M": config.block_m, "BLOCK_N": min(config.block_n, max(16, 1 << (self.rows - 1).bit_length()))}

    def grid(self, tokens: int, config: Config) -> tuple[int, ...]:
        down = math.ceil(self.rows / self.constants(config)["BLOCK_N"])
        return math.ceil(tokens * self.width / config.block_m), down, self.copies


def first_text(stage: Stage) -> str:
    """Arguments: x, the loader's, z, M."""
    arguments = ["x", *(stage.prefix + p for p in stage.loader.pointers), "z"]
    return _text(stage, arguments, "", [f"tl.store({stage.result}, acc.to(FLOAT), mask=inside)"])


def second_text(
    stage: Stage, features: int, pointers: Sequence[str], epilogue: Epilogue, outputs: Sequence[int]
) -> str:
    """Arguments: x (not read), one y an output, the `pointers` of both loaders, the epilogue's, z, M."""
    arguments = ["x", *(f"y{i}" for i in range(len(outputs))), *pointers]
    arguments += [*(f"p_{o.name}" for o in epilogue.operands), "z"]
    finish = [*epilogue.lines, *store(epilogue, outputs)]
    if stage.result:
        finish = [
            f"rn = {stage.result}",
            "n_in = n_in & (rn < N)",  # there may be padding behind the last feature
            "inside = n_in[:, None] & m_in[None, :]",
            *finish,
        ]
    return _text(stage, arguments, f"N: tl.constexpr = {features}", finish)


def _text(stage: Stage, arguments: Sequence[str], features: str, finish: Sequence[str]) -> str:
    made = [features] if features else []
    made += [
        f"K: tl.constexpr = {stage.loader.columns}",
        "FLOAT: tl.constexpr = x.dtype.element_ty",
        "copy = tl.program_id(2)",
        "own = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)",
        "rm = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)",
        f"n_in, m_in = own < {stage.rows}, rm < M" + (f" * {stage.width}" if stage.width > 1 else ""),
        "inside = n_in[:, None] & m_in[None, :]",
        f"rn = {stage.row}",
        *walk(stage.loader, stage.prefix, "BLOCK_N", stage.span),
        *finish,
    ]
    return f"""@triton.jit
def {stage.name}({", ".join(arguments)}, M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
{indent(made, 4)}
"""


class TwoLaunches(Kernel):
    """Two weights; `split` is not used, as copies already share the work out."""

    @property
    @abstractmethod
    def stages(self) -> tuple[Stage, Stage]:
        """In the order of the launches."""

    @property
    @abstractmethod
    def between(self) -> int:
        """Elements of z, a token."""

    @functools.cached_property
    def forms(self) -> dict[str, str]:
        first, second = self.stages
        pointers = [prefix + name for prefix, loader in self.loaders for name in loader.pointers]
        text = second_text(second, self.rows, pointers, self.epilogue, self.spec.outputs)
        return {first.name: first_text(first), second.name: text}

    def form(self, config: Config) -> str:
        return self.stages[1].name

    def constants(self, config: Config) -> dict[str, int]:
        return self.stages[1].constants(config)

    def grid(self, tokens: int, config: Config) -> tuple[int, ...]:
        return self.stages[1].grid(tokens, config)

    def launches(self, config: Config) -> list[Launch]:
        first, x = self.stages[0], "*" + TYPES[self.dtype]
        own = {first.prefix + name: "*" + kind for name, kind in first.loader.pointers.items()}
        launch = Launch(first.name, {"x": x, **own, "z": x, "M": "i32"}, first.constants(config))
        return [launch, *super().launches(config)]

    def rule(self, tokens: int, multiprocessors: int) -> Config | None:
        """Few tokens: narrow tiles, so that there are programs enough. Many: a library's products."""
        rows = min(loader.most_rows for _, loader in self.loaders)
        if tokens > self.most_tokens or (tokens > 64 and self.dtype.itemsize > 2):
            return None
        return Config(16, min(64, rows), 1, 4, 3) if tokens <= 32 or rows < 128 else Config(64, 128, 1, 8, 3)

    @property
    def most_tokens(self) -> int:
        """Beyond which the body of the op is the better guess."""
        return 256

    def workspace(self, x: Tensor, config: Config) -> dict[str, Tensor]:
        return {"z": x.new_empty(len(x), self.between)}

    def before(self, x: Tensor, prepared: Sequence[Tensor], workspace: Mapping[str, Tensor], config: Config) -> None:
        first, given = self.stages[0], iter(prepared)
        own = {prefix: [next(given) for _ in loader.pointers] for prefix, loader in self.loaders}[first.prefix]
        getattr(self.module, first.name)[first.grid(len(x), config)](
            x, *own, workspace["z"], len(x), **first.constants(config), num_warps=config.warps, num_stages=config.stages
        )
