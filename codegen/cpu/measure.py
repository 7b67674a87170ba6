"""Seconds of the kernels a lowered graph calls, on this machine: what fxcompress.cost_model.device interpolates.

    products     every kernel of rules.py, its weight in the cache and streamed from memory
    passes       rounding, scaling, norms, GELU ... over (rows, columns): alone in eager, compiled by Inductor
    attention    PyTorch's, and the two bf16 products of pointwise.py
    overheads    a call, a node, a kernel; what fusing saves

Cached: copies of the weight, more than the second-level cache holds and less than the third, used in turn. Streamed:
after a read of twice the third-level cache. Every call is timed by itself, with others before it (`Between`,
`Company`, `nothing`), and the least but one kept; it happens in ROUNDS far apart and the least is kept: what else ran
on the machine for a while is not in the table.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.codegen.cpu import products
from fxcompress.codegen.cpu.between import PASSES, Given
from fxcompress.codegen.cpu.module import OPTIONS, LoweredModule
from fxcompress.core.capture import capture
from fxcompress.cost_model.device import Grid, Target

ROUNDS = 2
CACHED = 8 << 20  # bytes of copies
LAYER = 2 << 20  # bytes of weights between two calls of a kernel: more than a second-level cache
SAMPLES = 7
KEPT = 64  # columns of an int4 scale
Run = Callable[[], Any]


@dataclass(frozen=True)
class Sizes:
    """What is measured. limit: seconds of a call beyond which larger sizes are extrapolated."""

    tokens: tuple[int, ...] = (1, 2, 4, 16, 64, 256, 1024)
    features: tuple[int, ...] = (64, 256, 1024, 4096)
    rows: tuple[int, ...] = (1, 16, 128, 512, 2048, 8192)
    columns: tuple[int, ...] = (64, 512, 3072)
    looped: tuple[int, ...] = (16, 128, 1024, 4096)  # rows of compiled passes
    heads: tuple[int, ...] = (4, 32, 256)
    positions: tuple[int, ...] = (1, 16, 128, 512)
    head: tuple[int, ...] = (16, 64)
    limit: float = 0.012


def cache_bytes() -> int:
    """Of the last-level cache; 32 MB where the system does not say."""
    found = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()
        if text[:-1].isdigit() and text[-1] in "KM":
            found.append(int(text[:-1]) << (10 if text[-1] == "K" else 20))
    return max(found, default=32 << 20)


class Between:
    """What a compiled model does between two calls of the same kernel: a layer's weights pass through the caches.

    16 tokens by 384 x 384 in int8 take 14 us in a tight loop, 20 to 24 us so, and 29 us in company (2 threads of a
    Zen 4 EPYC, 2026-11-21).
    """

    def __init__(self) -> None:
        self.layer = torch.ones(LAYER // 4)
        self.large = torch.ones(2 * cache_bytes() // 4)

    def __call__(self) -> None:
        self.layer.sum()

    def empty_caches(self) -> None:
        """Of data, all of it."""
        self.large.sum()


def nothing() -> None:
    """What a compiled model does between two loops, or before attention: what they read was written just now."""


class Company(Between):
    """What a graph run in eager does there: other kernels, too, whose code takes the place of its own. A view takes
    1.2 us in a tight loop, and 4.9 us so."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.w, self.q = torch.randn(16, 384), torch.randn(384, 384), torch.randn(1, 12, 16, 32)
        self.ids, self.table = torch.arange(16), torch.randn(100, 384)

    def __call__(self) -> None:
        super().__call__()
        x = torch.softmax(F.gelu(F.layer_norm(F.linear(self.x, self.w), (384,))), -1) + self.x
        products.rounded_tokens(x)
        F.embedding(self.ids, self.table)
        F.scaled_dot_product_attention(self.q, self.q, self.q).to(torch.bfloat16)


def seconds_of_calls(runs: Sequence[Run], between: Run, samples: int = SAMPLES) -> float:
    """Of an undisturbed call: the least but one of several, `runs` in turn, each with `between` before it."""
    runs[0]()
    found: list[float] = []
    for at in range(max(samples, min(len(runs), samples + 3))):
        between()
        start = time.perf_counter()
        runs[at % len(runs)]()
        found.append(time.perf_counter() - start)
    return sorted(found)[min(1, len(found) - 1)]


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
_BYTES = {"float": 4.0, "bf16": 2.0, "int8": 1.0, "int8_weight": 1.0, "int4_weight": 0.5}
_NEEDS = {"int8": torch.cpu._is_vnni_supported}


def kernels() -> list[str]:
    """Those of this processor."""
    return [name for name in KERNELS if _NEEDS.get(name, lambda: True)()]


def product_grids(name: str, sizes: Sizes, between: Between) -> tuple[Grid, Grid]:
    """(cached, streamed) of one kernel."""
    axes = (sizes.tokens, sizes.features, sizes.features)
    found: dict[tuple[int, ...], tuple[float, float]] = {}
    for rows, columns in itertools.product(sizes.features, sizes.features):
        for tokens, pair in _one_weight(name, rows, columns, sizes.tokens, between, sizes.limit):
            found[tokens, rows, columns] = pair
    order = list(itertools.product(*axes))
    cached, streamed = ([found[at][which] if at in found else None for at in order] for which in (0, 1))
    return Grid(axes, tuple(cached)), Grid(axes, tuple(streamed))


def _one_weight(
    name: str, rows: int, columns: int, tokens: Iterable[int], between: Between, limit: float
) -> Iterator[tuple[int, tuple[float, float]]]:
    """Seconds for growing numbers of tokens, until they are too many."""
    dtype, pack, call = KERNELS[name]
    bytes_of = _BYTES[name] * rows * columns
    weight = torch.randn(rows, columns)
    copies = [pack(weight) for _ in range(int(min(max(CACHED / bytes_of, 1), 12)))]
    last, before = 0.0, 1
    for m in tokens:
        if last * m / before > limit:
            return
        x = torch.randn(m, columns)
        x = (x * 40).to(torch.int8) if dtype == torch.int8 else x.to(dtype)
        runs = [partial(call, x, *w) for w in copies]
        cached = seconds_of_calls(runs, between)
        yield m, (cached, max(seconds_of_calls(runs, between.empty_caches, 4), cached))
        last, before = cached, m


def product_seconds(name: str, tokens: int, rows: int, columns: int, between: Between) -> float:
    """Of one size, its weight in the cache."""
    ((_, (cached, _)),) = _one_weight(name, rows, columns, (tokens,), between, float("inf"))
    return cached


def pass_grid(run: Callable[..., Any], given: Given, sizes: Sizes, between: Run,
              less: float = 0.0) -> Grid:  # fmt: skip
    """Seconds beyond `less`, those of a call that does nothing."""
    axes = (sizes.rows, sizes.columns)
    found = []
    for rows, columns in itertools.product(*axes):
        tensors = given(rows, columns)
        # below a tenth of a nanosecond an element nothing is known: the difference of two clocks
        beyond = seconds_of_calls([partial(run, *tensors)], between) - less
        found.append(max(beyond, 1e-11 * rows * columns, 1e-8))
    return Grid(axes, tuple(found))


def compiled(run: Any) -> Callable[..., Any]:
    """As a lowered module is compiled; every time anew, since Dynamo keeps what it compiled by the function's code."""
    options = {k: v for k, v in OPTIONS.items() if k != "guard_filter_fn"}
    own = FunctionType(run.__code__.replace(), run.__globals__, run.__name__, run.__defaults__, run.__closure__)
    made: Callable[..., Any] = torch.compile(own, dynamic=True, fullgraph=True, options=options)
    return made


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


# Overheads.


class _Nothing(nn.Module):
    """Views, and one node that computes nothing to speak of."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self.nodes = nodes

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.nodes):
            x = x.transpose(1, 2)
        return x + 1


def _small_products(x: Tensor, w: Tensor, loops: bool) -> Tensor:
    """Eight library calls, and a different loop after each."""
    after = (torch.tanh, torch.sigmoid, torch.relu, lambda x: x * x + 1, lambda x: torch.softmax(x, -1), torch.exp,
             lambda x: F.layer_norm(x, (64,)), lambda x: x - x.amax(-1, keepdim=True))  # fmt: skip
    for loop in after:
        x = torch.mm(x, w)
        x = loop(x) if loops else x
    return x


def overheads(between: Between, company: Company) -> dict[str, float]:
    """Seconds of a call, of a node that only views, of reading a weight, of a compiled loop between library calls."""

    def seconds(run: Run, beside: Run = between) -> float:
        return seconds_of_calls([run], beside, 41)

    x, y, w = torch.randn(4, 2, 8), torch.randn(8, 64), torch.randn(64, 64)
    found = {}
    beside_of: Mapping[Target, Between] = {"eager": company, "inductor": between}
    for target, beside in beside_of.items():
        found[f"{target}.call"] = seconds(partial(LoweredModule(capture(_Nothing(0), (x,)), target), x), beside)
    few, many = (seconds(partial(LoweredModule(capture(_Nothing(n), (x,)), "eager"), x), company) for n in (2, 42))
    found["eager.view"] = (many - few) / 40
    held = nn.Module()
    for i in range(100):
        held.register_buffer(f"packed_{i}", x)
    found["eager.attribute"] = seconds(lambda: [getattr(held, f"packed_{i}") for i in range(100)], company) / 100
    found["inductor.alone"] = seconds(partial(compiled(PASSES["add"][0]), y, y), nothing)
    plain = seconds(partial(compiled(lambda x, w: _small_products(x, w, False)), y, w))
    loops = seconds(partial(compiled(lambda x, w: _small_products(x, w, True)), y, w))
    found["inductor.kernel"] = (loops - plain) / 8
    return {name: max(value, 1e-7) for name, value in found.items()}
