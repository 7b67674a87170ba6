"""A spec -> a kernel: its source, what it reads, and how it is launched.

    kernel = generate(parse("linear(x, dequantize(...), float32[1536]) | gelu(_)"), torch.bfloat16)
    prepared = kernel.prepare(tensors)                 # once
    (y,) = kernel(x, prepared, extras, Config())

Sizes of weights are literals in the source; only the number of tokens M is an argument.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxcompress.codegen.spec import Argument, Call, Constant, Input, Spec
from fxcompress.codegen.triton.build import load_source
from fxcompress.codegen.triton.epilogue import Epilogue, Kind, print_epilogue
from fxcompress.codegen.triton.gemm import PREFIX, gemm
from fxcompress.codegen.triton.loaders import TYPES, Loader, loader_of
from fxcompress.core.errors import SpecError

NAME = "fused_linear"
_IMPORTS = "import triton\nimport triton.language as tl\n\nfrom fxcompress.codegen.triton import parts\n"


@dataclass(frozen=True)
class Config:
    """How one launch is divided."""

    block_m: int = 16
    block_n: int = 64
    split: int = 1
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class Kernel:
    """A generated kernel, with and without splitting of the columns."""

    spec: Spec
    dtype: torch.dtype
    loader: Loader
    epilogue: Epilogue

    @functools.cached_property
    def source(self) -> str:
        """Both forms, behind a header that says what they compute."""
        forms = [gemm(NAME + end, self.loader, self.epilogue, self.spec.outputs, bool(end)) for end in ("", "_split")]
        return "\n\n".join([f'"""{self.spec}\n\nx is {TYPES[self.dtype]}.\n"""\n\n{_IMPORTS}', *forms])

    def function(self, split: bool) -> Any:
        """The @triton.jit function."""
        return getattr(load_source(self.source), NAME + ("_split" if split else ""))

    def signature(self, split: bool) -> dict[str, str]:
        """Triton's types of the arguments that are no constexprs, in order."""
        x = "*" + TYPES[self.dtype]
        types = {"x": x, **{f"y{i}": x for i in range(len(self.spec.outputs))}}
        types |= {PREFIX + name: "*" + kind for name, kind in self.loader.pointers.items()}
        for operand in self.epilogue.operands:
            of = operand.source.dtype if isinstance(operand.source, Constant) else self.dtype
            types[f"p_{operand.name}"] = "*" + TYPES[of]
        return {**types, **({"partials": "*fp32", "arrived": "*i32"} if split else {}), "M": "i32"}

    def prepare(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The node's constants as the kernel reads them: the weight's, then the epilogue's."""
        weight = len(tensors) - sum(isinstance(o.source, Constant) for o in self.epilogue.operands)
        return (*self.loader.prepare(tensors[:weight]), *(t.contiguous() for t in tensors[weight:]))

    def __call__(
        self, x: Tensor, prepared: Sequence[Tensor], extras: Sequence[Tensor], config: Config = Config()
    ) -> list[Tensor]:
        """x (..., K) of the kernel's dtype, contiguous -> its outputs (..., N)."""
        rows = x.reshape(-1, self.loader.columns).contiguous()
        tokens, split = len(rows), config.split > 1
        outputs = [x.new_empty(*x.shape[:-1], self.loader.rows) for _ in self.spec.outputs]
        if tokens == 0:
            return outputs
        grid = (math.ceil(self.loader.rows / config.block_n), math.ceil(tokens / config.block_m), config.split)
        own = len(self.loader.pointers)
        constants = iter(prepared[own:])
        operands = [
            next(constants) if isinstance(o.source, Constant) else extras[o.number].contiguous()
            for o in self.epilogue.operands
        ]
        workspace: tuple[Tensor, ...] = ()
        if split:
            partials = x.new_empty(config.split, tokens, self.loader.rows, dtype=torch.float32)
            workspace = (partials, torch.zeros(grid[0] * grid[1], dtype=torch.int32, device=x.device))
        self.function(split)[grid](
            rows, *outputs, *prepared[:own], *operands, *workspace, tokens,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, SPLIT=config.split,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        return outputs


@functools.lru_cache(maxsize=1024)
def generate(spec: Spec, dtype: torch.dtype, kinds: tuple[Kind, ...] = ()) -> Kernel:
    """kinds: of the extras, as the epilogue reads them (`kind_of`). Raises `SpecError` for what cannot be emitted."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise SpecError(f"there are no kernels for inputs of {dtype}; there are for float16, bfloat16 and float32.")
    match spec.steps[0]:
        case Call("linear", (Input(), weight, *rest), ()):
            bias = next((b for b in rest if isinstance(b, Constant)), None)
            loader = loader_of(weight)
            return Kernel(spec, dtype, loader, print_epilogue(spec.steps[1:], _constants([weight]), kinds, bias))
        case Call(name):
            raise SpecError(f"there is no main loop for {name}.")


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


def _constants(arguments: Sequence[Argument]) -> int:
    return sum(
        1 if isinstance(a, Constant) else _constants(a.arguments) if isinstance(a, Call) else 0 for a in arguments
    )
