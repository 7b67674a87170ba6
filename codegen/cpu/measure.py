"""Seconds of the kernels a lowered graph calls, on this machine: what fxcompress.cost_model.device interpolates.

    products     every kernel of rules.py, its weight in the second-level caches, in the last one, in memory
    passes       rounding, scaling, norms, GELU ... over (rows, columns), alone, as eager runs them
    attention    PyTorch's, and bare products of heads

Hot: one weight, nothing between. Cached: copies of the weight, more than the second-level caches hold and less than the
third, used in turn, with a layer's weights read before each. Streamed: a piece of memory not read for long. Every
kernel is measured in ROUNDS far apart and the least is kept: what else ran on the machine for a while is not in the
table. Compiled loops are measured in fxcompress.codegen.cpu.loops, calls and launches in overheads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.codegen.cpu import products
from fxcompress.codegen.cpu.between import Given
from fxcompress.codegen.cpu.clock import Memory, Run, nothing, seconds_of_calls, timed
from fxcompress.cost_model.device import Grid

ROUNDS = 2
SAMPLES = 6
KEPT = 64  # columns of an int4 scale


@dataclass(frozen=True)
class Sizes:
    """What is measured. limit: seconds of a call beyond which larger sizes are extrapolated."""

    tokens: tuple[int, ...] = (1, 2, 4, 16, 64, 256, 1024)
    # NB: 4096 is not like its neighbours: oneDNN's int8 meets one set of the cache again and again, 16 tokens by
    # 1024 x 4096 are 740 us and by 768 x 3072 170
    features: tuple[int, ...] = (64, 192, 384, 768, 1536, 3072, 4096)
    rows: tuple[int, ...] = (1, 16, 128, 1024, 4096)
    columns: tuple[int, ...] = (64, 512, 3072)
    looped: tuple[int, ...] = (16, 128, 1024)  # rows of compiled passes
    widths: tuple[int, ...] = (64, 512)  # and their columns: every one is compiled
    heads: tuple[int, ...] = (4, 32, 256)
    positions: tuple[int, ...] = (1, 16, 128, 512)
    head: tuple[int, ...] = (16, 64)
    limit: float = 0.004


# Products: weight (rows, columns) in float32 -> its packed form; what to call with x, and with x made ready.


def _int8(x: Tensor, codes: Tensor) -> Tensor:
    return torch._int_mm(x, codes.t())


def _int8_weight(x: Tensor, codes: Tensor, ones: Tensor) -> Tensor:
    return torch._weight_int8pack_mm(x, codes, ones)


def _int4_weight(x: Tensor, packed: Tensor, scales_and_zeros: Tensor) -> Tensor:
    return torch._weight_int4pack_mm_for_cpu(x, packed, KEPT, scales_and_zeros)


def _codes(w: Tensor) -> tuple[Tensor, ...]:
    return ((w * 40).clamp(-127, 127).to(torch.int8),)


def _fours(w: Tensor) -> tuple[Tensor, ...]:
    groups = torch.ones(len(w), w.shape[1] // KEPT)
    return products.packed_fours((w * 4 + 8).clamp(0, 15), groups, groups * 8)


KERNELS: Mapping[str, tuple[torch.dtype, Callable[[Tensor], tuple[Tensor, ...]], Callable[..., Tensor]]] = {
    "float": (torch.float32, lambda w: (w.clone(), torch.zeros(len(w))), F.linear),
    "bf16": (torch.bfloat16, lambda w: (w.to(torch.bfloat16),), F.linear),
    "int8": (torch.int8, _codes, _int8),
    "int8_weight": (torch.bfloat16, lambda w: (*_codes(w), torch.ones(len(w), dtype=torch.bfloat16)), _int8_weight),
    "int4_weight": (torch.bfloat16, _fours, _int4_weight),
}
_NEEDS = {"int8": torch.cpu._is_vnni_supported}


def kernels() -> list[str]:
    """Those of this processor."""
    return [name for name in KERNELS if _NEEDS.get(name, lambda: True)()]


def product_grids(name: str, sizes: Sizes, between: Run, memory: Memory) -> tuple[Grid, ...]:
    """(hot, cached, streamed) of one kernel."""
    axes = (sizes.tokens, sizes.features, sizes.features)
    found: dict[tuple[int, ...], tuple[float, ...]] = {}
    for rows, columns in itertools.product(sizes.features, sizes.features):
        for tokens, levels in _one_weight(name, rows, columns, sizes.tokens, between, memory, sizes.limit):
            found[tokens, rows, columns] = levels
    order = list(itertools.product(*axes))
    return tuple(Grid(axes, tuple(found[at][level] if at in found else None for at in order)) for level in range(3))


def _one_weight(
    name: str, rows: int, columns: int, tokens: Iterable[int], between: Run, memory: Memory, limit: float
) -> Iterator[tuple[int, tuple[float, float, float]]]:
    """Seconds for growing numbers of tokens, until they are too many."""
    dtype, pack, call = KERNELS[name]
    weight, *rest = pack(torch.randn(rows, columns))
    near = memory.cached(weight, SAMPLES)
    last, before = 0.0, 1
    for m in tokens:
        if last * m / before > limit:
            return
        x = torch.randn(m, columns)
        x = (x * 40).to(torch.int8) if dtype == torch.int8 else x.to(dtype)
        hot = seconds_of_calls([partial(call, x, weight, *rest)], nothing, 5)
        cached = max(seconds_of_calls([partial(call, x, w, *rest) for w in near], between), hot)
        far = timed([partial(call, x, memory.streamed(weight), *rest) for _ in range(SAMPLES)], between)
        yield m, (hot, cached, max(far, cached))
        last, before = cached, m


def product_seconds(name: str, tokens: int, rows: int, columns: int, between: Run, memory: Memory) -> float:
    """Of one size, its weight in the last-level cache."""
    ((_, (_, cached, _)),) = _one_weight(name, rows, columns, (tokens,), between, memory, float("inf"))
    return cached


def pass_grid(run: Callable[..., Any], given: Given, sizes: Sizes, between: Run) -> Grid:
    """Of a pass alone, in eager."""
    axes = (sizes.rows, sizes.columns)
    found = [seconds_of_calls([partial(run, *given(*at))], between) for at in itertools.product(*axes)]
    return Grid(axes, tuple(found))


# Attention: (batch x heads, positions, size).


def _flash(heads: int, positions: int, size: int) -> Run:
    q, k, v = (torch.randn(1, heads, positions, size) for _ in range(3))
    return lambda: F.scaled_dot_product_attention(q, k, v)


def _masked(heads: int, positions: int, size: int) -> Run:
    q, k, v = (torch.randn(1, heads, positions, size) for _ in range(3))
    mask = torch.ones(1, 1, positions, positions, dtype=torch.bool)
    return lambda: F.scaled_dot_product_attention(q, k, v, mask)


def _causal(heads: int, positions: int, size: int) -> Run:
    q, k, v = (torch.randn(1, heads, positions, size) for _ in range(3))
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _products(dtype: torch.dtype) -> Callable[[int, int, int], Run]:
    """q k^T and the sum over values."""

    def made(heads: int, positions: int, size: int) -> Run:
        q, k, v = (torch.randn(heads, positions, size).to(dtype) for _ in range(3))
        scores = torch.randn(heads, positions, positions).to(dtype)

        def run() -> None:
            torch.bmm(q, k.transpose(1, 2))
            torch.bmm(scores, v)

        return run

    return made


ATTENTION: Mapping[str, Callable[[int, int, int], Run]] = {
    "flash": _flash,
    "flash_masked": _masked,
    "flash_causal": _causal,
    "products_float": _products(torch.float32),
    "products_bf16": _products(torch.bfloat16),
}


def attention_grid(name: str, sizes: Sizes, between: Run) -> Grid:
    """Of one kind of attention."""
    axes = (sizes.heads, sizes.positions, sizes.head)
    found: list[float | None] = []
    for heads, positions, size in itertools.product(*axes):
        large = heads * positions * positions * size > 1 << 31  # seconds that larger sizes are known by
        found.append(None if large else seconds_of_calls([ATTENTION[name](heads, positions, size)], between))
    return Grid(axes, tuple(found))
