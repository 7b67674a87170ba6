"""A spec -> a kernel.

    kernel = generate(parse("linear(x, dequantize(...), float32[1536]) | gelu(_)"), torch.bfloat16)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from fxcompress.codegen.spec import Constant, Spec, behind, given, is_product, is_rowwise
from fxcompress.codegen.triton.block_low_rank import BlockLowRankProduct, MonarchProduct
from fxcompress.codegen.triton.epilogue import Kind, print_epilogue
from fxcompress.codegen.triton.gemm import Product
from fxcompress.codegen.triton.kernel import Kernel
from fxcompress.codegen.triton.low_rank import LowRankProduct
from fxcompress.codegen.triton.norm import norm_of
from fxcompress.codegen.triton.normed import PREFIX as GAIN
from fxcompress.codegen.triton.normed import Gain, NormedProduct
from fxcompress.codegen.triton.quaternion import QuaternionProduct
from fxcompress.codegen.triton.rounded import RoundedProduct
from fxcompress.codegen.triton.rows import whole_rows
from fxcompress.codegen.triton.tensor_train import TensorTrainProduct
from fxcompress.core.errors import SpecError

MAIN_LOOPS: tuple[tuple[str, type[Kernel]], ...] = (
    ("linear", Product),
    ("low_rank_linear", LowRankProduct),
    ("quaternion_linear", QuaternionProduct),
    ("int8_dynamic_linear", RoundedProduct),
    ("float8_dynamic_linear", RoundedProduct),
    ("block_low_rank_linear", BlockLowRankProduct),
    ("monarch_linear", MonarchProduct),
    ("tensor_train_linear", TensorTrainProduct),
)


@functools.lru_cache(maxsize=1024)
def generate(spec: Spec, dtype: torch.dtype, kinds: tuple[Kind, ...] = ()) -> Kernel:
    """kinds: of the extras, as the epilogue reads them (`kind_of`). Raises `SpecError` for what cannot be emitted."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise SpecError(f"there are no kernels for inputs of {dtype}; there are for float16, bfloat16 and float32.")
    first = next((i for i, call in enumerate(spec.steps) if is_product(call)), None)
    if first is None:
        if not any(is_rowwise(call) for call in spec.steps):
            raise SpecError(f"there is no main loop for {spec.steps[0].name}.")
        return whole_rows(spec, dtype, kinds)
    product, before = spec.steps[first], spec.steps[:first]
    kind = dict(MAIN_LOOPS).get(product.name)
    if kind is None:
        raise SpecError(f"there is no main loop for {product.name}.")
    loaders = kind.read(product)
    if before:
        norm = norm_of(before)
        if norm is None or kind is not Product:
            raise SpecError(f"there is no kernel for {product.name} behind {', '.join(call.name for call in before)}.")
        kind, loaders = NormedProduct, ((GAIN, Gain(1, loaders[0][1].columns, norm)), *loaders)
    taken, bias = sum(loader.constants for _, loader in loaders), given(product).get("bias")
    steps = behind(spec, first).steps[1:]
    epilogue = print_epilogue(steps, taken, kinds, bias if isinstance(bias, Constant) else None, dtype)
    kernel = kind(spec, dtype, loaders, epilogue)
    _ = kernel.forms  # what cannot be emitted raises here, not at the first launch
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
