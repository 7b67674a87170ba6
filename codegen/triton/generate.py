"""A spec -> a kernel: its source, what it reads, and how it is launched.

    kernel = generate(parse("linear(x, dequantize(...), float32[1536]) | gelu(_)"), torch.bfloat16)
    prepared = kernel.prepare(tensors)                 # once
    (y,) = kernel(x, prepared, extras, Config())

Sizes of weights are literals in the source; only the number of tokens M is an argument.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxcompress.codegen.spec import Call, Constant, Input, Spec
from fxcompress.codegen.triton.build import load_source
from fxcompress.codegen.triton.epilogue import Epilogue, Kind, print_epilogue
from fxcompress.codegen.triton.gemm import gemm
from fxcompress.codegen.triton.loaders import loader_of
from fxcompress.codegen.triton.loaders.base import TYPES, Loader
from fxcompress.codegen.triton.low_rank import U, V, low_rank
from fxcompress.codegen.triton.quaternion import quaternion
from fxcompress.core.errors import SpecError

_WEIGHTS = {"linear": 1, "low_rank_linear": 2, "quaternion_linear": 1}  # arguments between the input and the bias
_IMPORTS = "import triton\nimport triton.language as tl\n\nfrom fxcompress.codegen.triton import parts\n"


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

    @property
    def rows(self) -> int:
        """N: features of an output."""
        return self.loaders[-1][1].rows

    @property
    def columns(self) -> int:
        """K: features of x."""
        return self.loaders[0][1].columns

    @functools.cached_property
    def source(self) -> str:
        """All forms, behind a header that says what they compute."""
        header = f'"""{self.spec}\n\nx is {TYPES[self.dtype]}.\n"""\n\n{_IMPORTS}'
        return "\n\n".join([header, *self.forms.values()])

    def function(self, config: Config) -> Any:
        """The @triton.jit function."""
        return getattr(load_source(self.source), self.form(config))

    def signature(self, config: Config) -> dict[str, str]:
        """Triton's types of the arguments that are no constexprs, in order."""
        x = "*" + TYPES[self.dtype]
        types = {"x": x, **{f"y{i}": x for i in range(len(self.spec.outputs))}}
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

    def __call__(
        self, x: Tensor, prepared: Sequence[Tensor], extras: Sequence[Tensor], config: Config = DEFAULT
    ) -> list[Tensor]:
        """x (..., K) of the kernel's dtype -> its outputs (..., N)."""
        rows = x.reshape(-1, self.columns).contiguous()
        outputs = [x.new_empty(*x.shape[:-1], self.rows) for _ in self.spec.outputs]
        if len(rows) == 0:
            return outputs
        own = sum(len(loader.pointers) for _, loader in self.loaders)
        constants = iter(prepared[own:])
        operands = [
            next(constants) if isinstance(o.source, Constant) else extras[o.number].contiguous()
            for o in self.epilogue.operands
        ]
        self.function(config)[self.grid(len(rows), config)](
            rows, *outputs, *prepared[:own], *operands, *self.workspace(rows, config).values(), len(rows),
            **self.constants(config), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        return outputs


class Product(Kernel):
    """One weight."""

    @property
    def forms(self) -> dict[str, str]:
        ((_, loader),) = self.loaders
        names = {False: "fused_linear", True: "fused_linear_split"}
        return {name: gemm(name, loader, self.epilogue, self.spec.outputs, split) for split, name in names.items()}

    def form(self, config: Config) -> str:
        return "fused_linear_split" if config.split > 1 else "fused_linear"

    def constants(self, config: Config) -> dict[str, int]:
        return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "SPLIT": config.split}

    def grid(self, tokens: int, config: Config) -> tuple[int, ...]:
        return math.ceil(self.rows / config.block_n), math.ceil(tokens / config.block_m), config.split

    def workspace(self, x: Tensor, config: Config) -> dict[str, Tensor]:
        if config.split == 1:
            return {}
        across, down, _ = self.grid(len(x), config)
        return {
            "partials": x.new_empty(config.split, len(x), self.rows, dtype=torch.float32),
            "arrived": x.new_zeros(across * down, dtype=torch.int32),
        }


class LowRankProduct(Kernel):
    """Two weights, the small result between them on the chip; `split` is among how many programs the outputs of a
    block of tokens are shared out."""

    @property
    def forms(self) -> dict[str, str]:
        (_, v), (_, u) = self.loaders
        return {"fused_low_rank": low_rank("fused_low_rank", v, u, self.epilogue, self.spec.outputs)}

    def form(self, config: Config) -> str:
        return "fused_low_rank"

    def constants(self, config: Config) -> dict[str, int]:
        return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "SHARE": config.split}

    def grid(self, tokens: int, config: Config) -> tuple[int, ...]:
        return math.ceil(tokens / config.block_m), config.split


class QuaternionProduct(Kernel):
    """A quarter of a weight, used four times; `block_n` counts rows of the components."""

    @property
    def forms(self) -> dict[str, str]:
        ((_, loader),) = self.loaders
        return {"fused_quaternion": quaternion("fused_quaternion", loader, self.epilogue, self.spec.outputs)}

    def form(self, config: Config) -> str:
        return "fused_quaternion"

    def constants(self, config: Config) -> dict[str, int]:
        return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}

    def grid(self, tokens: int, config: Config) -> tuple[int, ...]:
        return math.ceil(self.rows // 4 / config.block_n), math.ceil(tokens / config.block_m)

    @property
    def rows(self) -> int:
        return 4 * self.loaders[0][1].rows


@functools.lru_cache(maxsize=1024)
def generate(spec: Spec, dtype: torch.dtype, kinds: tuple[Kind, ...] = ()) -> Kernel:
    """kinds: of the extras, as the epilogue reads them (`kind_of`). Raises `SpecError` for what cannot be emitted."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise SpecError(f"there are no kernels for inputs of {dtype}; there are for float16, bfloat16 and float32.")
    first = spec.steps[0]
    bias = next((a for a in first.args[_WEIGHTS.get(first.name, 0) + 1 :] if isinstance(a, Constant)), None)
    match first:
        case Call("linear", (Input(), weight, *_), ()):
            loaders: tuple[tuple[str, Loader], ...] = (("w_", loader_of(weight)),)
            kind: type[Kernel] = Product
        case Call("low_rank_linear", (Input(), v, u, *_), ()):
            loaders, kind = ((V, loader_of(v)), (U, loader_of(u))), LowRankProduct
        case Call("quaternion_linear", (Input(), components, *_), ()):
            loaders, kind = (("w_", loader_of(components)),), QuaternionProduct
        case Call(name):
            raise SpecError(f"there is no main loop for {name}.")
    taken = sum(loader.constants for _, loader in loaders)
    kernel = kind(spec, dtype, loaders, print_epilogue(spec.steps[1:], taken, kinds, bias))
    assert kernel.forms  # what cannot be emitted raises here, not at the first launch
    return kernel


def kind_of(shape: Sequence[int], rows: Sequence[int]) -> Kind:
    """How an extra of `shape` broadcasts to a result of shape `rows` (..., N). Raises `SpecError`."""
    shape, rows = tuple(shape), tuple(rows)
    if math.prod(shape) == 1:
        return "scalar"
    if shape == rows:
        return "full"
    if shape[-1] == rows[-1] and math.prod(shape[:-1]) == 1:
        return "row"
    if shape[-1] == 1 and shape[:-1] == rows[:-1]:
        return "column"
    raise SpecError(f"there is no epilogue for an operand of shape {list(shape)} beside a result of {list(rows)}.")
