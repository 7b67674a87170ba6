"""A compressed graph as plain calls: fused nodes become their steps, each structured product what it is made of.

    %y = fxcompress.fused(%x, [v, u, bias], [], "low_rank_linear(x, ...) | gelu(_)")
    ->
    %z = aten.linear(%x, v);  %p = aten.linear(%z, u, bias);  %y = aten.gelu(%p)

The graph is traced again with Python functions in the place of its ops. `KEPT` stay calls: what they read are codes,
and fxcompress.codegen.onnx.products looks at the codes themselves. Where an op's body chooses by its data, or by the
number of tokens, another of the same meaning stands here; a train is always rebuilt to its matrix, which a runtime does
once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._ops import OpOverload

from fxcompress.codegen.onnx.decode import unpacked
from fxcompress.codegen.ops import (
    OPS,
    block_low_rank_linear,
    dequantize,
    dequantize_float8,
    float8_dynamic_linear,
    float8_embedding,
    fused,
    int8_dynamic_linear,
    linformer_attention,
    low_rank_linear,
    monarch_linear,
    quantized_embedding,
    quantized_rows_embedding,
    quaternion_linear,
    tensor_train_embedding,
    tensor_train_linear,
    unmask,
    unmask_2_4,
)
from fxcompress.codegen.ops.tensor_train import rebuild
from fxcompress.codegen.spec import Call, op_of, parse
from fxcompress.core.capture import export, unlift
from fxcompress.core.modes import switch
from fxcompress.core.signature import SignedModule

_FUSED = (fused.fused._opoverload, fused.fused_parallel._opoverload)
KEPT = frozenset(
    op._opoverload
    for op in (
        dequantize.dequantize,
        quantized_embedding.quantized_embedding,
        quantized_rows_embedding.quantized_rows_embedding,
    )
)
REFUSED: Mapping[OpOverload, str] = {
    tensor_train_embedding.tensor_train_embedding._opoverload: "it multiplies other cores for every id, which ONNX "
    "can only say with slices for all of them",
}


def plain(gm: SignedModule) -> SignedModule:
    """A graph over the same tensors whose calls are of ATen and of `KEPT`; the ops of `REFUSED` must not be in it."""
    twin = gm.copy()
    switch(twin.graph, training=False)
    for node in twin.graph.nodes:
        if node.target in (*_FUSED, *BODIES):
            node.target = {_FUSED[0]: _one, _FUSED[1]: _several, **BODIES}[node.target]
    made = unlift(export(fx.GraphModule(twin, twin.graph), *gm.example()))
    made.meta["signature"] = gm.signature
    return made


def ops_of(node: fx.Node) -> list[OpOverload]:
    """The ops of fxcompress that a node calls, inside a fused one too."""
    if node.target in _FUSED:
        return [op_of(call.name) for step in parse(str(node.args[3])).steps for call in _calls(step) if _is_own(call)]
    return [node.target] if node.target in _OWN else []


_OWN = frozenset(op._opoverload for op in OPS)


def _is_own(call: Call) -> bool:
    return call.name != "unrows" and op_of(call.name) in _OWN


def _calls(call: Call) -> list[Call]:
    nested = [a for value in call.arguments for a in (value if isinstance(value, tuple) else (value,))]
    return [call, *(inner for a in nested if isinstance(a, Call) for inner in _calls(a))]


def _several(
    x: Tensor, tensors: Sequence[Tensor], extras: Sequence[Tensor] | None, spec: str, name: str = ""
) -> list[Tensor]:
    program = parse(spec)
    made = fused.run(program, x, tensors, extras or [], _call)
    return [made[i] for i in program.outputs]


def _one(x: Tensor, tensors: Sequence[Tensor], extras: Sequence[Tensor] | None, spec: str, name: str = "") -> Tensor:
    (output,) = _several(x, tensors, extras, spec)
    return output


def _call(op: OpOverload, *args: Any, **kwargs: Any) -> Tensor:
    made: Tensor = BODIES.get(op, op)(*args, **kwargs)
    return made


def _train(x: Tensor, cores: Sequence[Tensor], n: Sequence[int], m: Sequence[int], rows: int, bias: Any) -> Tensor:
    return F.linear(x, rebuild(cores, n, m)[:rows], bias)


def _unmask(mask: Tensor, values: Tensor, columns: int, tile: int) -> Tensor:
    """A column reads the value whose number is that of the kept ones before it."""
    keep = unpacked(mask, 1, columns // tile)
    if tile > 1:
        keep = keep.repeat_interleave(tile, -1)
    place = (keep.cumsum(-1).to(torch.int64) - 1).clamp_min(0)
    return torch.where(keep > 0, values.gather(-1, place), 0)


def _unmask_2_4(patterns: Tensor, values: Tensor) -> Tensor:
    """Column i of a group reads its first value, its second, or none, as a table of pairs says."""
    groups = values.shape[-1] // 2
    reads = torch.tensor(_READS)[unpacked(patterns, unmask_2_4.BITS, groups).long()]  # (..., groups, 4)
    pairs = torch.unflatten(values, -1, (groups, 2))
    return torch.where(reads >= 0, pairs.gather(-1, reads.clamp_min(0)), 0).flatten(-2)


_READS = [[pair.index(i) if i in pair else -1 for i in range(4)] for pair in unmask_2_4.PAIRS]


def _float8(codes: Tensor) -> Tensor:
    """The numbers of all 256 codes, looked up."""
    return _E4M3[codes.long()]


_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def _dequantize_float8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return (_float8(codes).to(scales.dtype) * scales).to(dtype)


def _float8_embedding(ids: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return _dequantize_float8(F.embedding(ids, codes), F.embedding(ids, scales), dtype)


def _float8_dynamic(x: Tensor, codes: Tensor, scales: Tensor, smooth: Tensor, bias: Tensor | None = None) -> Tensor:
    q, step = float8_dynamic_linear.rounded_tokens(x, smooth)
    y = torch.matmul(q, _float8(codes).to(step.dtype).T) * step * scales.to(step.dtype)
    return (y if bias is None else y + bias.to(step.dtype)).to(x.dtype)


def _int8_dynamic(x: Tensor, codes: Tensor, scales: Tensor, smooth: Tensor, bias: Tensor | None = None) -> Tensor:
    """As the op, with the stretches that are exact in float32 added up in float64, exact below 2^53."""
    q, step = int8_dynamic_linear.rounded_tokens(x, smooth)
    stretches = zip(*(torch.split(t.float(), int8_dynamic_linear._STRETCH, -1) for t in (q, codes)))
    total = sum(torch.matmul(part, mine.T).double() for part, mine in stretches).to(step.dtype)  # type: ignore[union-attr]
    y = total * step * scales.to(step.dtype)
    return (y if bias is None else y + bias.to(step.dtype)).to(x.dtype)


BODIES: Mapping[Any, Callable[..., Any]] = {
    low_rank_linear.low_rank_linear._opoverload: low_rank_linear.low_rank_linear._init_fn,
    block_low_rank_linear.block_low_rank_linear._opoverload: block_low_rank_linear.block_low_rank_linear._init_fn,
    monarch_linear.monarch_linear._opoverload: monarch_linear.monarch_linear._init_fn,
    quaternion_linear.quaternion_linear._opoverload: quaternion_linear.quaternion_linear._init_fn,
    linformer_attention.linformer_attention._opoverload: linformer_attention._attend,
    tensor_train_linear.tensor_train_linear._opoverload: _train,
    int8_dynamic_linear.int8_dynamic_linear._opoverload: _int8_dynamic,
    float8_dynamic_linear.float8_dynamic_linear._opoverload: _float8_dynamic,
    dequantize_float8.dequantize_float8._opoverload: _dequantize_float8,
    float8_embedding.float8_embedding._opoverload: _float8_embedding,
    unmask.unmask._opoverload: _unmask,
    unmask_2_4.unmask_2_4._opoverload: _unmask_2_4,
}
