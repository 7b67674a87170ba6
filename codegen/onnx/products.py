"""y = x W^T + b of a quantized W as ONNX's blockwise DequantizeLinear and a MatMul, which runtimes have kernels for.

    w = s (q - z)        z = 2^bits c / 16 - 1/2,   c a whole number of 0 .. 15

DequantizeLinear takes whole zeros only. In 2 and 3 bits the half step is inside of 4-bit codes, in 4 and 8 bits it is
a product of its own, of the sums of x over each group (in / group_size columns):

    bits    codes given (in, out)    zeros       scales      beside it
    2       4 q + 2, uint4           c, uint4    s / 4
    3       2 q + 1, uint4           c, uint4    s / 2
    4       q, uint4                 c, uint4    s           (sums of x) (s / 2)^T
    8       q, uint8                 16 c        s           (sums of x) (s / 2)^T

Codes of 4 and 8 bits are written as they are given, unless a lookup reads them too; 2 and 3 bits stay packed and are
unpacked by the runtime when it loads the file. Scales stay 8-bit codes: s = 2^(grid_0 + grid_1 code). One group a row
is cut into blocks of 128, because runtimes have kernels for blocks.

Everything else that reads a quantized weight (a convolution, another dtype) gets it decoded (decode.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxcompress.codegen.onnx.decode import Grid, decoded, lookup, scales_of, tiered_lookup, unpacked, zero_codes_of
from fxcompress.codegen.onnx.plain import KEPT
from fxcompress.core.signature import SignedModule
from fxcompress.core.surgery import attribute_of, tidy

aten, own = torch.ops.aten, torch.ops.fxcompress
FOURS = "_uint4"  # the end of the name of a tensor whose bytes are codes of 4 bits
ONNX_UINT4 = 21  # TensorProto.UINT4
OPSET = 21  # the first with blocks and 4 bits
BLOCK = 128


def spell_out(gm: SignedModule) -> None:
    """Put what ONNX can say in the place of every call of `KEPT`; tensors that nothing reads any more go."""
    dequantized = gm.graph.find_nodes(op="call_function", target=own.dequantize.default)
    products = [node for node in dequantized if _is_product(node)]
    shared = {str(read.target) for node in gm.graph.nodes if node.target in KEPT and node not in products
              for read in node.all_input_nodes}  # fmt: skip
    for node in products:
        _multiply(gm, node, whole=str(node.args[0].target) not in shared)
    spelled = {
        own.dequantize.default: (decoded, (3,)),
        own.quantized_embedding.default: (lookup, (4,)),
        own.quantized_rows_embedding.default: (tiered_lookup, (5,)),
    }
    for node in gm.graph.nodes:
        if node.target in spelled and node.users:
            node.target, (grid,) = spelled[node.target]
            node.args = (*node.args[:grid], _numbers(node.args[grid]), *node.args[grid + 1 :])
    gm.graph.eliminate_dead_code()
    tidy(gm)


def _is_product(node: fx.Node) -> bool:
    """True for a float32 matrix that only the second argument of `linear` reads."""
    codes, *_, dtype = node.args
    reads = all(n.op == "get_attr" for n in node.all_input_nodes)
    linear = all(u.target is aten.linear.default and u.args[1] is node and u.args[0] is not node for u in node.users)
    return reads and linear and dtype is torch.float32 and attribute_of(codes).dim() == 2  # type: ignore[arg-type]


def _numbers(grid: Any) -> Any:
    """The pair a grid holds; of several grids a list."""
    if isinstance(grid, fx.Node):
        return tuple(attribute_of(grid).tolist())
    return [_numbers(g) for g in grid]


def _multiply(gm: SignedModule, node: fx.Node, whole: bool) -> None:
    """whole: the codes are this product's alone."""
    given: tuple[Any, ...] = node.args[:7]
    codes, scales, zeros, grid, *numbers = given
    wanted: list[tuple[Callable[..., Tensor], tuple[Any, ...]]] = [
        (_codes, (codes, *numbers)), (_scales, (scales,)), (_zeros, (zeros, scales, *numbers)),
    ]  # fmt: skip
    arranged: list[fx.Node] = []
    with gm.graph.inserting_before(node):
        for arrange, read in wanted:
            if whole and not (arrange is _codes and numbers[0] in (2, 3)):
                made, fours = arrange(*fx.map_arg(read, attribute_of)), arrange is not _scales and numbers[0] < 8
                arranged.append(_keep(gm, made, f"{codes}{arrange.__name__}{FOURS if fours else ''}"))
            else:
                arranged.append(gm.graph.call_function(arrange, read))
    for user in list(node.users):
        x, _, *bias = user.args
        user.target = product
        user.args = (x, *arranged, _numbers(grid), *numbers, bias[0] if bias else None)
        user.kwargs = {}


def _keep(gm: SignedModule, tensor: Tensor, name: str) -> fx.Node:
    gm.register_buffer(name, tensor.to(torch.uint8).contiguous())
    return gm.graph.get_attr(name)


def _codes(codes: Tensor, bits: int, group_size: int, columns: int) -> Tensor:
    """Packed codes -> the codes given to DequantizeLinear, float32 (columns, rows)."""
    steps = 1 if bits == 8 else 16 >> bits
    given = unpacked(codes, bits, columns).T
    return given if bits in (4, 8) else given * steps + steps // 2


def _scales(scales: Tensor) -> Tensor:
    """Scale codes, uint8 (groups, rows)."""
    return scales.T


def _zeros(zeros: Tensor | None, scales: Tensor, bits: int, group_size: int, columns: int) -> Tensor:
    """Zeros given to DequantizeLinear, float32 (blocks, rows)."""
    codes = zero_codes_of(zeros, scales).T
    return _in_blocks(codes * 16 if bits == 8 else codes, group_size, columns)


def _in_blocks(groups: Tensor, group_size: int, columns: int) -> Tensor:
    """(groups, rows) -> (blocks, rows)."""
    return groups if group_size else groups.expand(-(-columns // BLOCK), groups.shape[1])


def product(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, grid: Grid, bits: int, group_size: int, columns: int,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """x (..., columns) float32 -> (..., rows), by the table above; codes, scales, zeros as `_codes`, `_scales` and
    `_zeros` arrange them."""
    scale = scales_of(scales, grid)
    given = scale if bits in (4, 8) else scale * (2.0**bits / 16)
    weight = torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (_typed(codes, bits), _in_blocks(given, group_size, columns), _typed(zeros, bits)),
        {"axis": 0, "block_size": group_size or BLOCK},
        dtype=torch.float32, shape=codes.shape, version=OPSET,
    )  # fmt: skip
    y = torch.matmul(x, weight)
    if bits in (4, 8):
        y = y + torch.matmul(_sums(x, len(scales), group_size, columns), scale * 0.5)
    return y if bias is None else y + bias


def _sums(x: Tensor, groups: int, group_size: int, columns: int) -> Tensor:
    """x (..., columns) -> (..., groups)."""
    if groups == 1:
        return x.sum(-1, keepdim=True)
    if columns % group_size:
        x = F.pad(x, (0, groups * group_size - columns))
    return torch.unflatten(x, -1, (groups, group_size)).sum(-1)


def _typed(codes: Tensor, bits: int) -> Tensor:
    """As the type DequantizeLinear shall read; what is written as uint8 gets its type in the file."""
    if codes.dtype == torch.uint8:
        return codes
    if bits == 8:
        return codes.to(torch.uint8)
    return torch.onnx.ops.symbolic(
        "Cast", (codes,), {"to": ONNX_UINT4}, dtype=torch.uint8, shape=codes.shape, version=OPSET
    )
