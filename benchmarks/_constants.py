"""Random constants for any spec, made where they are used: weights of about one over the root of their columns, so that
results are of order one whatever the size. Never zeros: they hide wrong indices, and run faster than numbers do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fxcompress.codegen.ops.unmask_2_4 import PAIRS
from fxcompress.codegen.packing import pack
from fxcompress.codegen.spec import Argument, Call, Constant, Spec, leaves

Draw = torch.Generator


def constants_of(spec: Spec, device: torch.device | str, seed: int = 0) -> list[Tensor]:
    """`tensors` for a node of `spec`."""
    draw = torch.Generator(device=device).manual_seed(seed)
    return [tensor for call in spec.steps for tensor in _of_call(call, draw)]


def _of_call(call: Call, draw: Draw) -> Iterator[Tensor]:
    own = [leaf for leaf in leaves(call.arguments) if isinstance(leaf, Constant)]
    if call.name in _MAKERS:
        yield from _MAKERS[call.name](call, own, draw)
        return
    for argument in call.arguments:
        yield from _of_argument(argument, draw)


def _of_argument(argument: Argument, draw: Draw) -> Iterator[Tensor]:
    if isinstance(argument, Constant):
        yield plain(argument, draw)
    elif isinstance(argument, Call):
        yield from _of_call(argument, draw)
    elif isinstance(argument, tuple):
        for each in argument:
            yield from _of_argument(each, draw)


def plain(constant: Constant, draw: Draw) -> Tensor:
    """Of a constant nothing is known of but its type."""
    shape, dtype, device = constant.shape, constant.dtype, draw.device
    if dtype.is_floating_point:
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 1.0
        return (torch.randn(shape, generator=draw, device=device) * scale).to(dtype)
    low, high = (-127, 128) if dtype.is_signed else (0, 256)
    return torch.randint(low, high, shape, dtype=dtype, generator=draw, device=device)


def _dequantize(call: Call, own: list[Constant], draw: Draw) -> list[Tensor]:
    """Codes, scales, zeros where there are any, and the grid of the scales: 2^(grid[0] + code grid[1])."""
    named = dict(call.named)
    columns, bits = named["columns"], named["bits"]
    assert isinstance(columns, int)
    assert isinstance(bits, int)
    step = 2 / (2**bits * math.sqrt(columns))
    grid = torch.tensor([math.log2(step) - 1, 1 / 128], device=draw.device)
    return [*(plain(constant, draw) for constant in own[:-1]), grid]


def _float8(call: Call, own: list[Constant], draw: Draw) -> list[Tensor]:
    """Codes of e4m3, none of them NaN, and a scale a row."""
    codes, *rest = own
    values = torch.randn(codes.shape, generator=draw, device=draw.device) * 40
    columns = codes.shape[-1]
    made = [values.to(torch.float8_e4m3fn).view(codes.dtype)]
    for constant in rest:
        factor = 1 / 40 / math.sqrt(columns) if constant is rest[0] else 1.0
        drawn = torch.rand(constant.shape, generator=draw, device=draw.device) * factor + factor
        made.append(drawn.to(constant.dtype))
    return made


def _int8_dynamic(call: Call, own: list[Constant], draw: Draw) -> list[Tensor]:
    """Codes, a scale a row, what x is divided by, and a bias perhaps."""
    codes, scales, smooth, *bias = own
    made = [plain(codes, draw)]
    for constant, factor in ((scales, 1 / 64 / math.sqrt(codes.shape[1])), (smooth, 1.0)):
        made.append(torch.rand(constant.shape, generator=draw, device=draw.device) * factor + factor)
    return [*made, *(plain(constant, draw) for constant in bias)]


def _two_of_four(call: Call, own: list[Constant], draw: Draw) -> list[Tensor]:
    _, values = own
    groups = (*values.shape[:-1], values.shape[-1] // 2)
    codes = torch.randint(0, len(PAIRS), groups, dtype=torch.uint8, generator=draw, device=draw.device)
    return [pack(codes, 3), plain(values, draw)]


def _mask(call: Call, own: list[Constant], draw: Draw) -> list[Tensor]:
    """As many units kept in every row of the mask as there are values for; values may be kept in any way."""
    columns, tile = dict(call.named)["columns"], dict(call.named)["tile"]
    assert isinstance(columns, int)
    assert isinstance(tile, int)
    mask, values = own[0], call.args[1]
    stored = values.shape[-1] if isinstance(values, Constant) else dict(values.named)["columns"]  # type: ignore[union-attr]
    assert isinstance(stored, int)
    order = torch.rand(*mask.shape[:-1], columns // tile, generator=draw, device=draw.device).argsort(-1)
    return [pack((order < stored // tile).to(torch.uint8), 1), *_of_argument(values, draw)]


_MAKERS: dict[str, Callable[[Call, list[Constant], Draw], list[Tensor]]] = {
    "dequantize": _dequantize, "dequantize_float8": _float8, "float8_dynamic_linear": _float8,
    "int8_dynamic_linear": _int8_dynamic, "unmask": _mask, "unmask_2_4": _two_of_four,
}  # fmt: skip
