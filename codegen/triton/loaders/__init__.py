"""How weights get onto the chip, one way of keeping them a file."""

from __future__ import annotations

from typing import Any

import torch

from fxcompress.codegen.spec import Argument, Call, Constant
from fxcompress.codegen.triton.loaders.base import Loader
from fxcompress.codegen.triton.loaders.dense import Dense
from fxcompress.codegen.triton.loaders.float8 import Float8
from fxcompress.codegen.triton.loaders.masked import Masked
from fxcompress.codegen.triton.loaders.quantized import Quantized
from fxcompress.codegen.triton.loaders.tiles import Tiles
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
        case Call("unmask", (mask, values), named):
            given = dict(named)
            return _masked(mask, values, given["columns"], given["tile"])
        case Call(name):
            raise SpecError(f"there is no loader for {name}.")
    raise SpecError(f"there is no loader for {weight}.")


def _masked(mask: Argument, values: Argument, columns: int, unit: int) -> Loader:
    """A row of the mask may stand for several of the weight, repeated: tiles, if they are square and large enough."""
    repeats = 1
    match mask:
        case Call("repeat_interleave", (Constant(),), (("repeats", int(repeats)), ("dim", 0))):
            pass
        case Call(name):
            raise SpecError(f"there is no loader for a mask made by {name}.")
    if repeats == unit and unit in (16, 32, 64, 128):
        kept = loader_of(values)
        return Tiles(kept.rows, columns, kept, unit)
    match values:
        case Constant(dtype, (rows, kept_values)):
            return Masked(rows, columns, dtype, kept_values, unit, repeats)
        case Call(name):
            raise SpecError(
                f"there is no loader for unmask of {name}: only tiles of 16, 32, 64 or 128 keep packed values."
            )
    raise SpecError(f"there is no loader for unmask of {values}.")
