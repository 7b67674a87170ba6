"""How weights get onto the chip, one way of keeping them a file."""

from __future__ import annotations

from typing import Any

import torch

from fxcompress.codegen.spec import Argument, Call, Constant
from fxcompress.codegen.triton.loaders.base import Loader
from fxcompress.codegen.triton.loaders.dense import Dense
from fxcompress.codegen.triton.loaders.float8 import Float8
from fxcompress.codegen.triton.loaders.quantized import Quantized
from fxcompress.codegen.triton.loaders.two_of_four import TwoOfFour
from fxcompress.core.errors import SpecError


def loader_of(weight: Argument) -> Loader:
    """The loader of a product's weight as a spec writes it. Raises `SpecError`."""
    match weight:
        case Constant(dtype, (rows, columns)) if dtype in (torch.float16, torch.bfloat16, torch.float32):
            return Dense(rows, columns, dtype)
        case Call("dequantize", (Constant(_, (rows, _)), _, zeros, _), named):
            given: dict[str, Any] = dict(named)
            # Eight planes of 16 words take 528 of the 512 columns of tensor memory on sm_100, and spill on sm_89.
            width = 8 if given["bits"] == 2 else 16
            return Quantized(rows, given["columns"], given["bits"], given["group_size"], zeros is not None, width)
        case Call("dequantize_float8", (Constant(_, (rows, columns)), _), _):
            return Float8(rows, columns)
        case Call("unmask_2_4", (Constant(), Constant(dtype, (rows, half))), ()):
            return TwoOfFour(rows, 2 * half, dtype)
        case Call(name):
            raise SpecError(f"there is no loader for {name}.")
    raise SpecError(f"there is no loader for {weight}.")
