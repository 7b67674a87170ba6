"""What stands between two products, as functions of (rows, columns) tensors: what is timed for a profile.

    PASSES      by themselves, as a graph run in eager calls them
    COMPILED    those that a graph for Inductor has in another form (fxcompress.codegen.cpu.pointwise)
    FUSED       several in one loop, and which: what fusing saves
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.codegen.cpu import pointwise, products

Given = Callable[[int, int], tuple[Tensor, ...]]
Pass = tuple[Callable[..., Any], Given]


def _scale(total: Tensor, step: Tensor, offset: Tensor, r: Tensor, s: Tensor, b: Tensor) -> Tensor:
    return (total.float() * step + offset * r) * s + b


def _norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), w, b)


def _softmax(scores: Tensor) -> Any:
    """As between the two products of fxcompress.codegen.cpu.pointwise.attention: divided by its sum later."""
    wide = scores.float()
    shares = (wide - wide.amax(-1, keepdim=True).clamp_min(-1e30)).exp()
    return shares.to(scores.dtype), shares.sum(-1, keepdim=True).clamp_min(1e-30)


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


PASSES: Mapping[str, Pass] = {
    "add": (lambda x, y: x + y, lambda r, c: (_float(r, c), _float(r, c))),
    "mul": (lambda x: x * 1.5, lambda r, c: (_float(r, c),)),
    "tanh": (lambda x: x.tanh(), lambda r, c: (_float(r, c),)),
    "gelu": (lambda x: F.gelu(x), lambda r, c: (_float(r, c),)),
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


FUSED: tuple[tuple[Callable[..., Any], tuple[str, ...], Given], ...] = (
    (_scaled_and_quick, ("scale", "quick_gelu", "round"), _total),
    (
        _scaled_and_normed,
        ("scale", "add", "norm", "round"),
        lambda r, c: (*_total(r, c), _float(r, c), torch.randn(c), torch.randn(c)),
    ),
)
