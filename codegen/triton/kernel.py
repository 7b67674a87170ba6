"""A generated kernel: its texts, what it reads, and how it is launched.

    prepared = kernel.prepare(tensors)                 # once, where the graph is lowered
    (y,) = kernel(x, prepared, extras, Config())

Sizes of weights are literals in the source; only the number of tokens M is an argument.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxcompress.codegen.spec import Call, Constant, Spec
from fxcompress.codegen.triton.build import load_source
from fxcompress.codegen.triton.epilogue import Epilogue
from fxcompress.codegen.triton.loaders.base import TYPES, Loader
from fxcompress.core.errors import SpecError

IMPORTS = "import triton\nimport triton.language as tl\n\nfrom fxcompress.codegen.triton import parts\n"


@dataclass(frozen=True)
class Config:
    """How one launch is divided."""

    block_m: int = 16
    block_n: int = 64
    split: int = 1
    warps: int = 4
    stages: int = 3


DEFAULT = Config()


@dataclass(frozen=True)
class Kernel(ABC):
    """A generated kernel: the texts of its forms, and how each is launched."""

    spec: Spec
    dtype: torch.dtype
    loaders: tuple[tuple[str, Loader], ...]  # by the prefix of their names, in the order of the constants
    epilogue: Epilogue

    @classmethod
    @abstractmethod
    def read(cls, product: Call) -> tuple[tuple[str, Loader], ...]:
        """The loaders of the weights of `product`, by the prefix of their names. Raises `SpecError`."""

    @property
    @abstractmethod
    def forms(self) -> dict[str, str]:
        """Name -> text of each @triton.jit function."""

    @abstractmethod
    def form(self, config: Config) -> str:
        """The name of the form that `config` asks for."""

    @abstractmethod
    def constants(self, config: Config) -> dict[str, int]:
        """Its constexprs."""

    @abstractmethod
    def grid(self, tokens: int, config: Config) -> tuple[int, ...]:
        """Programs of a launch."""

    def workspace(self, x: Tensor, config: Config) -> dict[str, Tensor]:
        """What it needs besides its arguments."""
        return {}

    def before(self, x: Tensor, prepared: Sequence[Tensor], workspace: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Launch what must have run before; x is (M, K)."""

    @property
    def least_arch(self) -> int:
        """The first card that has what it takes, 80 for sm_80."""
        return 80

    @property
    def rows(self) -> int:
        """N: features of an output."""
        return self.loaders[-1][1].rows

    @property
    def columns(self) -> int:
        """K: features of x."""
        return self.loaders[0][1].columns

    @property
    def results(self) -> list[torch.dtype]:
        """Of the outputs."""
        return [self.epilogue.types[i] for i in self.spec.outputs]

    @functools.cached_property
    def source(self) -> str:
        """All forms, behind a header that says what they compute."""
        header = f'"""{self.spec}\n\nx is {TYPES[self.dtype]}.\n"""\n\n{IMPORTS}'
        return "\n\n".join([header, *self.forms.values()])

    def function(self, config: Config) -> Any:
        """The @triton.jit function."""
        return getattr(load_source(self.source), self.form(config))

    def signature(self, config: Config) -> dict[str, str]:
        """Triton's types of the arguments that are no constexprs, in order."""
        x = "*" + TYPES[self.dtype]
        types = {"x": x, **{f"y{i}": "*" + TYPES[t] for i, t in enumerate(self.results)}}
        types |= {prefix + name: "*" + kind for prefix, of in self.loaders for name, kind in of.pointers.items()}
        for operand in self.epilogue.operands:
            read = operand.source.dtype if isinstance(operand.source, Constant) else self.dtype
            types[f"p_{operand.name}"] = "*" + TYPES[read]
        empty = torch.empty(1, self.columns, dtype=self.dtype, device="meta")
        types |= {name: "*" + TYPES[t.dtype] for name, t in self.workspace(empty, config).items()}
        return {**types, "M": "i32"}

    def prepare(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The node's constants as the kernel reads them: the weights', then the epilogue's."""
        rest, made = list(tensors), list[Tensor]()
        for _, loader in self.loaders:
            made += loader.prepare(rest[: loader.constants])
            rest = rest[loader.constants :]
        return (*made, *(t.contiguous() for t in rest))

    def check(self, extras: Sequence[Tensor]) -> None:
        """The outputs' dtypes were told from that of x: an extra may not promote them. Raises `SpecError`."""
        for index, extra in enumerate(extras):
            if extra.dim() > 0 and torch.promote_types(extra.dtype, self.dtype) != self.dtype:
                raise SpecError(f"extras[{index}] is {extra.dtype}; the kernel was made for {self.dtype}.")

    def __call__(
        self, x: Tensor, prepared: Sequence[Tensor], extras: Sequence[Tensor], config: Config = DEFAULT
    ) -> list[Tensor]:
        """x (..., K) of the kernel's dtype -> its outputs (..., N)."""
        self.check(extras)
        rows = x.reshape(-1, self.columns).contiguous()
        outputs = [x.new_empty(*x.shape[:-1], self.rows, dtype=dtype) for dtype in self.results]
        if len(rows) == 0:
            return outputs
        own = sum(len(loader.pointers) for _, loader in self.loaders)
        constants = iter(prepared[own:])
        operands = [
            next(constants) if isinstance(o.source, Constant) else extras[o.number].contiguous()
            for o in self.epilogue.operands
        ]
        workspace = self.workspace(rows, config)
        self.before(rows, prepared, workspace)
        self.function(config)[self.grid(len(rows), config)](
            rows, *outputs, *prepared[:own], *operands, *workspace.values(), len(rows),
            **self.constants(config), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        return outputs
