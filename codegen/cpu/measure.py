"""Seconds of the kernels a lowered graph calls, on this machine: what fxcompress.cost_model.device interpolates.

    products     every kernel of rules.py, its weight in the cache and streamed from memory
    passes       rounding, scaling, norms, GELU ... over (rows, columns): alone in eager, compiled by Inductor
    attention    PyTorch's, and the two bf16 products of pointwise.py
    overheads    a call, a node, a kernel; what fusing saves

Cached: copies of the weight, more than the second-level cache holds and less than the third, used in turn. Streamed:
after a read of twice the third-level cache. Every call is timed by itself and the median kept; all of it happens in
ROUNDS far apart and the least is kept, so that what else ran on the machine for a while is not in the table.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.codegen.cpu import pointwise, products
from fxcompress.codegen.cpu.module import OPTIONS, LoweredModule
from fxcompress.core.capture import capture
from fxcompress.cost_model.device import Grid, Target

ROUNDS = 2
CACHED = 8 << 20  # bytes of copies
SAMPLES, LEAST = 5, 2e-3  # calls, and seconds of calls, at least
KEPT = 64  # columns of an int4 scale
Run = Callable[[], Any]


@dataclass(frozen=True)
class Sizes:
    """What is measured. limit: seconds of a call beyond which larger sizes are extrapolated."""

    tokens: tuple[int, ...] = (1, 2, 4, 8, 32, 128, 512, 2048)
    features: tuple[int, ...] = (64, 256, 1024, 4096)
    rows: tuple[int, ...] = (1, 16, 128, 1024, 8192)
    columns: tuple[int, ...] = (64, 512, 3072)
    heads: tuple[int, ...] = (4, 32, 256)
    positions: tuple[int, ...] = (1, 16, 128, 512)
    head: tuple[int, ...] = (16, 64)
    limit: float = 0.02


def cache_bytes() -> int:
    """Of the last-level cache; 32 MB where the system does not say."""
    found = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()
        if text[:-1].isdigit() and text[-1] in "KM":
            found.append(int(text[:-1]) << (10 if text[-1] == "K" else 20))
    return max(found, default=32 << 20)


def seconds_of_calls(runs: Sequence[Run], before: Run | None = None) -> float:
    """The median of calls, `runs` in turn; `before` empties the caches."""
    if before is None:
        for run in runs:
            run()
    found: list[float] = []
    begun = time.perf_counter()
    while len(found) < SAMPLES or time.perf_counter() - begun < LEAST:
        if before is not None:
            before()
        for run in runs:
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
        if before is not None and len(found) >= 3:
            break
    return statistics.median(found)


# Products: weight (rows, columns) in float32 -> its packed form; what to call with x, and with x made ready.


def _int8(x: Tensor, codes: Tensor) -> Tensor:
    return torch._int_mm(x, codes.t())


def _int8_weight(x: Tensor, codes: Tensor, ones: Tensor) -> Tensor:
    return torch._weight_int8pack_mm(x, codes, ones)


def _int4_weight(x: Tensor, packed: Tensor, scales_and_zeros: Tensor) -> Tensor:
    return torch._weight_int4pack_mm_for_cpu(x, packed, KEPT, scales_and_zeros)


def _packed(x: Tensor, weight: Tensor) -> Tensor:
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [None], "")
    return made


def _codes(w: Tensor) -> tuple[Tensor, ...]:
    return ((w * 40).clamp(-127, 127).to(torch.int8),)


def _fours(w: Tensor) -> tuple[Tensor, ...]:
    groups = torch.ones(len(w), w.shape[1] // KEPT)
    return products.packed_fours((w * 4 + 8).clamp(0, 15), groups, groups * 8)


def _reordered(w: Tensor) -> tuple[Tensor, ...]:
    return (torch.ops.mkldnn._reorder_linear_weight(w.to(torch.bfloat16), None),)


KERNELS: Mapping[str, tuple[torch.dtype, Callable[[Tensor], tuple[Tensor, ...]], Callable[..., Tensor]]] = {
    "float": (torch.float32, lambda w: (w.clone(), torch.zeros(len(w))), F.linear),
    "bf16": (torch.bfloat16, lambda w: (w.to(torch.bfloat16),), F.linear),
    "bf16_packed": (torch.bfloat16, _reordered, _packed),
    "int8": (torch.int8, _codes, _int8),
    "int8_weight": (torch.bfloat16, lambda w: (*_codes(w), torch.ones(len(w), dtype=torch.bfloat16)), _int8_weight),
    "int4_weight": (torch.bfloat16, _fours, _int4_weight),
}
_BYTES = {"float": 4.0, "bf16": 2.0, "bf16_packed": 2.0, "int8": 1.0, "int8_weight": 1.0, "int4_weight": 0.5}
Needs = {"int8": torch.cpu._is_vnni_supported, "bf16_packed": torch.cpu._is_avx512_bf16_supported}


def kernels() -> list[str]:
    """Those of this processor."""
    return [name for name in KERNELS if Needs.get(name, lambda: True)()]


def product_grids(name: str, sizes: Sizes, flush: Run) -> tuple[Grid, Grid]:
    """(cached, streamed) of one kernel."""
    axes = (sizes.tokens, sizes.features, sizes.features)
    found: dict[tuple[int, ...], tuple[float, float]] = {}
    for rows, columns in itertools.product(sizes.features, sizes.features):
        for tokens, pair in _one_weight(name, rows, columns, sizes.tokens, flush, sizes.limit):
            found[tokens, rows, columns] = pair
    order = list(itertools.product(*axes))
    cached, streamed = ([found[at][which] if at in found else None for at in order] for which in (0, 1))
    return Grid(axes, tuple(cached)), Grid(axes, tuple(streamed))


def _one_weight(
    name: str, rows: int, columns: int, tokens: Iterable[int], flush: Run, limit: float
) -> Iterator[tuple[int, tuple[float, float]]]:
    """Seconds for growing numbers of tokens, until they are too many."""
    dtype, pack, call = KERNELS[name]
    bytes_of = _BYTES[name] * rows * columns
    copies = [pack(torch.randn(rows, columns)) for _ in range(int(min(max(CACHED / bytes_of, 1), 12)))]
    last, before = 0.0, 1
    for m in tokens:
        if last * m / before > limit:
            return
        x = torch.randn(m, columns)
        x = (x * 40).to(torch.int8) if dtype == torch.int8 else x.to(dtype)
        runs = [partial(call, x, *w) for w in copies]
        cached = seconds_of_calls(runs)
        yield m, (cached, max(seconds_of_calls(runs[:4], flush), cached))
        last, before = cached, m


def product_seconds(name: str, tokens: int, rows: int, columns: int) -> float:
    """Of one size, its weight in the cache."""
    ((_, (cached, _)),) = _one_weight(name, rows, columns, (tokens,), lambda: None, float("inf"))
    return cached


def flusher() -> Run:
    """A read of twice the last-level cache."""
    return partial(torch.sum, torch.ones(2 * cache_bytes() // 4))


# Passes: a function of (rows, columns) tensors, and what it is given.


def _scale(total: Tensor, step: Tensor, offset: Tensor, r: Tensor, s: Tensor, b: Tensor) -> Tensor:
    return (total.float() * step + offset * r) * s + b


def _norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), w, b)


def _softmax(scores: Tensor) -> Tensor:
    wide = scores.float()
    shares = (wide - wide.amax(-1, keepdim=True).clamp_min(-1e30)).exp()
    return (shares / shares.sum(-1, keepdim=True).clamp_min(1e-30)).to(scores.dtype)


def _copy(x: Tensor) -> Tensor:
    """Heads change places: (rows, heads, 32) -> (heads, rows, 32)."""
    return torch.unflatten(x, 1, (-1, 32)).transpose(0, 1).contiguous()


def _embedding(ids: Tensor, table: Tensor) -> Tensor:
    return F.embedding(ids, table)


def _gather(ids: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return products.gather(ids, codes, scales, torch.float32)


def _float(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns)


def _total(rows: int, columns: int) -> tuple[Tensor, ...]:
    parts = (torch.randn(rows, 1), torch.randn(rows, 1), torch.randn(columns), torch.randn(columns))
    return torch.randint(-1000, 1000, (rows, columns), dtype=torch.int32), *parts, torch.randn(columns)


def _table(rows: int, columns: int) -> tuple[Tensor, ...]:
    return torch.randint(0, 4096, (rows,)), torch.randn(4096, columns)


def _coded(rows: int, columns: int) -> tuple[Tensor, ...]:
    table = torch.randn(4096, columns)
    return torch.randint(0, 4096, (rows,)), *products.packed_table(table)


Pass = tuple[Callable[..., Any], Callable[[int, int], tuple[Tensor, ...]]]
PASSES: Mapping[str, Pass] = {
    "add": (torch.add, lambda r, c: (_float(r, c), _float(r, c))),
    "mul": (lambda x: x * 1.5, lambda r, c: (_float(r, c),)),
    "tanh": (torch.tanh, lambda r, c: (_float(r, c),)),
    "gelu": (F.gelu, lambda r, c: (_float(r, c),)),
    "cast": (lambda x: x.to(torch.bfloat16), lambda r, c: (_float(r, c),)),
    "copy": (_copy, lambda r, c: (_float(r, c),)),
    "norm": (_norm, lambda r, c: (_float(r, c), torch.randn(c), torch.randn(c))),
    "softmax": (lambda x: torch.softmax(x, -1), lambda r, c: (_float(r, c),)),
    "round": (products.rounded_tokens, lambda r, c: (_float(r, c),)),
    "scale": (_scale, _total),
    "embedding": (_embedding, _table),
    "gather": (_gather, _coded),
}
COMPILED: Mapping[str, Pass] = {  # those that a graph for Inductor has in another form
    **PASSES,
    "quick_gelu": (pointwise.gelu, PASSES["gelu"][1]),
    "softmax": (_softmax, lambda r, c: (_float(r, c).to(torch.bfloat16),)),
}


def _scaled_and_quick(*args: Tensor) -> Any:
    return products.rounded_tokens(pointwise.gelu(_scale(*args)))


def _scaled_and_normed(*args: Tensor) -> Any:
    *total, residual, w, b = args
    x = _norm(_scale(*total) + residual, w, b)
    return (*products.rounded_tokens(x), x)


FUSED: tuple[tuple[Callable[..., Any], tuple[str, ...], Callable[[int, int], tuple[Tensor, ...]]], ...] = (
    (_scaled_and_quick, ("scale", "quick_gelu", "round"), _total),
    (
        _scaled_and_normed,
        ("scale", "add", "norm", "round"),
        lambda r, c: (*_total(r, c), _float(r, c), torch.randn(c), torch.randn(c)),
    ),
)


def pass_grid(run: Callable[..., Any], given: Callable[[int, int], tuple[Tensor, ...]], sizes: Sizes,
              less: float = 0.0) -> Grid:  # fmt: skip
    """Seconds beyond `less`, those of a call that does nothing."""
    axes = (sizes.rows, sizes.columns)
    found = []
    for rows, columns in itertools.product(*axes):
        tensors = given(rows, columns)
        # below a tenth of a nanosecond an element nothing is known: the difference of two clocks
        beyond = seconds_of_calls([partial(run, *tensors)]) - less
        found.append(max(beyond, 1e-11 * rows * columns, 1e-8))
    return Grid(axes, tuple(found))


def compiled(run: Callable[..., Any]) -> Callable[..., Any]:
    """As a lowered module is compiled."""
    options = {k: v for k, v in OPTIONS.items() if k != "guard_filter_fn"}
    made: Callable[..., Any] = torch.compile(run, dynamic=True, options=options)
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


def attention_grid(name: str, sizes: Sizes) -> Grid:
    """Of one kind of attention."""
    axes = (sizes.heads, sizes.positions, sizes.head)
    found: list[float | None] = []
    for heads, positions, size in itertools.product(*axes):
        large = heads * positions * positions * size > 1 << 31  # seconds that larger sizes are known by
        found.append(None if large else seconds_of_calls([ATTENTION[name](heads, positions, size)]))
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


def _small_products(x: Tensor, w: Tensor, between: bool) -> Tensor:
    for _ in range(20):
        x = torch.mm(x, w)
        x = x.tanh() if between else x
    return x


def overheads() -> dict[str, float]:
    """Seconds of a call, of a node that only views, and of a compiled loop between two library calls."""
    x, w = torch.randn(4, 2, 8), torch.randn(8, 8)
    y = x.flatten(0, 1)
    found = {}
    for target in get_args(Target):
        found[f"{target}.call"] = seconds_of_calls([partial(LoweredModule(capture(_Nothing(0), (x,)), target), x)])
    few, many = (seconds_of_calls([partial(LoweredModule(capture(_Nothing(n), (x,)), "eager"), x)]) for n in (2, 42))
    found["eager.view"] = (many - few) / 40
    found["inductor.alone"] = seconds_of_calls([partial(compiled(torch.add), y, y)])
    plain, between = (
        seconds_of_calls([partial(compiled(partial(_small_products, between=b)), y, w)]) for b in (False, True)
    )
    found["inductor.kernel"] = (between - plain) / 20
    return {name: max(value, 1e-7) for name, value in found.items()}
