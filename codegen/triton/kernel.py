"""A generated kernel: its texts, what it reads, and how it is launched.

    prepared = kernel.prepare(tensors)                 # once a weight
    (y,) = kernel(x, prepared, extras, Config())

Sizes of weights are literals in the source; only the number of tokens M is an argument.

A config fits the fused kernel; where there is none (`rule`, or a table says so), `apart` does the same by other means:
library products, with the epilogue as a kernel behind them.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fxcompress.codegen.ops.fused import evaluate
from fxcompress.codegen.spec import Call, Constant, Spec, is_product
from fxcompress.codegen.triton.build import load_source
from fxcompress.codegen.triton.epilogue import Epilogue
from fxcompress.codegen.triton.loaders.base import TYPES, Loader

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
# spec, x, its constants, extras, dtypes of the outputs -> outputs
Compute = Callable[[Spec, Tensor, Sequence[Tensor], Sequence[Tensor], Sequence[torch.dtype]], list[Tensor]]


@dataclass(frozen=True)
class Launch:
    """One function of a call: its name, Triton's types of the arguments that are no constexprs, and its constexprs.

    multiplies: on tensor cores; the others unpack, round, or work on whole rows.
    """

    form: str
    signature: Mapping[str, str]
    constants: Mapping[str, int]
    multiplies: bool = True


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

    @abstractmethod
    def rule(self, tokens: int, multiprocessors: int) -> Config | None:
        """The config where no table has one; None where `apart` is the better guess."""

    def apart(
        self, x: Tensor, prepared: Sequence[Tensor], tensors: Sequence[Tensor], extras: Sequence[Tensor],
        dtypes: Sequence[torch.dtype], compute: Compute,
    ) -> list[Tensor]:  # fmt: skip
        """The same without the fused kernel; `compute` runs another program by its own best means."""
        return evaluate(self.spec, x, tensors, extras)

    def workspace(self, x: Tensor, config: Config) -> dict[str, Tensor]:
        """What it needs besides its arguments."""
        return {}

    def before(  # noqa: B027
        self, x: Tensor, prepared: Sequence[Tensor], workspace: Mapping[str, Tensor], config: Config
    ) -> None:
        """Launch what must have run before; x is (M, K)."""

    def launches(self, config: Config) -> list[Launch]:
        """The products of a call, in order."""
        return [Launch(self.form(config), self.signature(config), self.constants(config))]

    @property
    def aside(self) -> list[Launch]:
        """What else there is to compile, whatever the config."""
        return []

    @property
    def least_arch(self) -> int:
        """The first card that has what it takes, 80 for sm_80."""
        return 80

    @functools.cached_property
    def first(self) -> int:
        """Which step is the product; those before it are a norm."""
        return next((i for i, call in enumerate(self.spec.steps) if is_product(call)), 0)

    @property
    def product(self) -> Call:
        return self.spec.steps[self.first]

    @property
    def stored(self) -> tuple[int, ...]:
        """The outputs, counted from the product."""
        return tuple(i - self.first for i in self.spec.outputs)

    @property
    def rows(self) -> int:
        """N: features of an output."""
        return self.loaders[-1][1].rows

    @property
    def columns(self) -> int:
        """K: features of x."""
        return self.loaders[0][1].columns

    @property
    def flops(self) -> int:
        """Of the product, a token."""
        return 2 * sum(loader.rows * loader.columns for _, loader in self.loaders)

    @functools.cached_property
    def label(self) -> str:
        """What it is, sizes apart: tables of launch configs go by it."""
        kept = ", ".join(loader.label for _, loader in self.loaders)
        return f"{self.product.name}[{kept}] {str(self.dtype).removeprefix('torch.')}"

    @functools.cached_property
    def source(self) -> str:
        """All forms, behind a header that says what they compute, and what it costs."""
        return "\n\n".join([f'"""{self.header()}"""\n\n{IMPORTS}', *self.forms.values()])

    def header(self) -> str:
        dtype, dense = str(self.dtype).removeprefix("torch."), self.rows * self.columns
        stored = sum(math.prod(c.shape) * c.dtype.itemsize for c in self.spec.constants)
        return f"""{self.spec}

    x (M, {self.columns}) {dtype}  ->  y (M, {self.rows})

             flops                 bytes of constants
    here     {f"M {self.flops:,}":<20}  {stored:,}
    dense    {f"M {2 * dense:,}":<20}  {dense * self.dtype.itemsize:,}

What it means: torch.ops.fxcompress.fused(x, tensors, extras, spec), the spec being the first line.
"""
    @property
    def results(self) -> list[torch.dtype]:
        """Of the outputs, where every extra is of the dtype of x."""
        return [self.epilogue.types[i] for i in self.stored]


    def function(self, config: Config) -> Any:
        """The @triton.jit function."""
        return getattr(self.module, self.form(config))

    @functools.cached_property
    def module(self) -> ModuleType:
        """All forms, imported."""
        return load_source(self.source)

    def signature(self, config: Config) -> dict[str, str]:
        """Triton's types of the arguments that are no constexprs, in order."""
        types = {"x": "*" + TYPES[self.dtype], **self.result_types}
        types |= {prefix + name: "*" + kind for prefix, of in self.loaders for name, kind in of.pointers.items()}
        types |= self.operand_types
        empty = torch.empty(1, self.columns, dtype=self.dtype, device="meta")
        types |= {name: "*" + TYPES[t.dtype] for name, t in self.workspace(empty, config).items()}
        return {**types, "M": "i32"}

    @property
    def result_types(self) -> dict[str, str]:
        return {f"y{i}": "*" + TYPES[t] for i, t in enumerate(self.results)}

    @property
    def operand_types(self) -> dict[str, str]:
        read = {o.name: o.source for o in self.epilogue.operands}
        dtypes = {name: of.dtype if isinstance(of, Constant) else self.dtype for name, of in read.items()}
        return {f"p_{name}": "*" + TYPES[dtype] for name, dtype in dtypes.items()}

    def prepare(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The node's constants as the kernel reads them: the weights', then the epilogue's."""
        rest, made = list(tensors), list[Tensor]()
        for _, loader in self.loaders:
            made += loader.prepare(rest[: loader.constants])
            rest = rest[loader.constants :]
        return (*made, *(t.contiguous() for t in rest))

    def empty(self, x: Tensor, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """The outputs, yet to be written."""
        return [x.new_empty(*x.shape[:-1], self.rows, dtype=dtype) for dtype in dtypes]

    def operands(self, prepared: Sequence[Tensor], extras: Sequence[Tensor]) -> list[Tensor]:
        """What the epilogue reads, in its order."""
        own = sum(len(loader.pointers) for _, loader in self.loaders)
        constants = iter(prepared[own:])
        return [
            next(constants) if isinstance(o.source, Constant) else extras[o.number].contiguous()
            for o in self.epilogue.operands
        ]

    def __call__(
        self,
        x: Tensor,
        prepared: Sequence[Tensor],
        extras: Sequence[Tensor],
        config: Config = DEFAULT,
        dtypes: Sequence[torch.dtype] | None = None,
    ) -> list[Tensor]:
        """x (..., K) of the kernel's dtype -> its outputs (..., N), of `dtypes` (`results`)."""
        rows = x.reshape(-1, self.columns).contiguous()
        outputs = self.empty(x, dtypes or self.results)
        if len(rows) == 0:
            return outputs
        own = sum(len(loader.pointers) for _, loader in self.loaders)
        workspace = self.workspace(rows, config)
        self.before(rows, prepared, workspace, config)
        self.function(config)[self.grid(len(rows), config)](
            rows, *outputs, *prepared[:own], *self.operands(prepared, extras), *workspace.values(), len(rows),
            **self.constants(config), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        return outputs
