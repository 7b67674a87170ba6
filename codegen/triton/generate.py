"""A spec -> a kernel.

    kernel = generate(parse("linear(x, dequantize(...), float32[1536]) | gelu(_)"), torch.bfloat16)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from fxcompress.codegen.spec import Call, Constant, Input, Spec
from fxcompress.codegen.triton.epilogue import Kind, print_epilogue
from fxcompress.codegen.triton.gemm import Product
from fxcompress.codegen.triton.int8 import Int8Product, Integers
from fxcompress.codegen.triton.kernel import Kernel
from fxcompress.codegen.triton.loaders import loader_of
from fxcompress.codegen.triton.loaders.base import Loader
from fxcompress.codegen.triton.low_rank import LowRankProduct, U, V
from fxcompress.codegen.triton.quaternion import QuaternionProduct
from fxcompress.core.errors import SpecError

_WEIGHTS = {"linear": 1, "low_rank_linear": 2, "quaternion_linear": 1, "int8_dynamic_linear": 3}  # before the bias


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
        case Call("int8_dynamic_linear", (Input(), Constant(_, (rows, columns)), *_), ()):
            loaders, kind = (("w_", Integers(rows, columns)),), Int8Product
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
