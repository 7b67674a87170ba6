"""Seconds of what Inductor compiles: loops over (rows, columns) without their launch, what fusing saves, attention.

    seconds of a loop = those of its call - those of the same call on two rows      both by turns, as one machine drifts

A loop runs on all threads if it was worth it when it was compiled: all are compiled for as many elements as a layer
has (a first call of 8 x 64 would give one thread, and twice the seconds).
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from fxcompress.codegen.cpu import pointwise
from fxcompress.codegen.cpu.between import Given
from fxcompress.codegen.cpu.clock import seconds_beyond
from fxcompress.codegen.cpu.measure import Sizes
from fxcompress.codegen.cpu.module import OPTIONS
from fxcompress.codegen.cpu.rules import SHORT
from fxcompress.cost_model.device import Grid

FIRST, FLOOR = 128, 2  # rows
Loop = Callable[..., Any]


def compiled(run: Any, dynamic: bool = True) -> Loop:
    """As a lowered module is compiled; every time anew, since Dynamo keeps what it compiled by the function's code."""
    options = {k: v for k, v in OPTIONS.items() if k != "guard_filter_fn"}
    own = FunctionType(run.__code__.replace(), run.__globals__, run.__name__, run.__defaults__, run.__closure__)
    made: Loop = torch.compile(own, dynamic=dynamic, fullgraph=True, options=options)
    return made


def compiled_pass(run: Any, given: Given, columns: int) -> Loop:
    """Compiled for any number of rows, but for these columns: a model knows its widths. A norm of 1024 x 512 takes 476
    us compiled for any width on one thread, and 66 so (2 threads of a Zen 4 EPYC, 2026-11-21)."""
    loop, tensors = compiled(run, dynamic=False), given(FIRST, columns)
    for tensor in tensors:
        if len(tensor) == FIRST:
            torch._dynamo.mark_dynamic(tensor, 0)
    loop(*tensors)
    return loop


def compiled_passes(run: Any, given: Given, sizes: Sizes) -> dict[int, Loop]:
    """By columns."""
    return {columns: compiled_pass(run, given, columns) for columns in sizes.widths}


def loop_grid(passes: Mapping[int, Loop], given: Given, sizes: Sizes) -> Grid:
    """Of one loop. NB: all in the caches, and larger ones by rate: in a model most of what a loop makes is read by the
    next one step on, and what fuses is not written."""
    axes = (sizes.looped, sizes.widths)
    return Grid(axes, tuple(_seconds(passes[c], given, r, c) for r, c in itertools.product(*axes)))


def _seconds(loop: Loop, given: Given, rows: int, columns: int) -> float:
    # below a hundredth of a nanosecond an element nothing is known: the difference of two clocks
    beyond = seconds_beyond(partial(loop, *given(rows, columns)), partial(loop, *given(FLOOR, columns)))
    return max(beyond, 1e-11 * rows * columns, 1e-8)


def fused_grid(
    loops: Sequence[tuple[Loop, Sequence[str], Given]], alone: Mapping[str, Grid], sizes: Sizes
) -> Grid:
    """Seconds of passes in one loop over those of the same passes alone, by elements: the mean of groups.

    NB: it may be more than 1: a loop of several reductions keeps what it made between them."""
    columns, found = sizes.widths[-1], []
    for rows in sizes.looped:
        shares = []
        for loop, names, given in loops:
            apart = sum(alone[f"inductor.{name}"].at(rows, columns) for name in names)
            shares.append(_seconds(loop, given, rows, columns) / apart)
        found.append(min(max(statistics.mean(shares), 0.1), 4.0))
    return Grid((tuple(rows * columns for rows in sizes.looped),), tuple(found))


# Attention as fxcompress.codegen.cpu.pointwise has it, with its loops: (batch x heads, positions, size).

HEADS = 4


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return pointwise.attention(q, k, v, mask, None)


def _first_numbers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return q[0, 0, 0] + k[0, 0, 0] + v[0, 0, 0] + mask[0, 0, 0, 0]


def attention_grids(sizes: Sizes) -> dict[str, Grid]:
    """"compiled", of a batch; "compiled_short", of one sequence so short that it has a graph of its own."""
    attend, floor = compiled(_attention), compiled(_first_numbers)
    short = tuple(p for p in sizes.positions if p <= SHORT)
    return {
        "compiled": _grid(attend, floor, 2, sizes, sizes.positions),
        "compiled_short": _grid(attend, floor, 1, sizes, short),
    }


def _grid(attend: Loop, floor: Loop, batch: int, sizes: Sizes, positions: tuple[int, ...]) -> Grid:
    axes = (tuple(h for h in sizes.heads if h % batch == 0), positions, sizes.head)
    found: list[float | None] = []
    for heads, seq, size in itertools.product(*axes):
        if heads * seq * seq * size > 1 << 29:
            found.append(None)
            continue
        several = batch if batch == 1 else heads // min(HEADS, heads // 2)
        q, k, v = (torch.randn(several, heads // several, seq, size) for _ in range(3))
        given = q, k, v, torch.zeros(several, 1, seq, seq)
        found.append(max(seconds_beyond(partial(attend, *given), partial(floor, *given)), 1e-6))
    return Grid(axes, tuple(found))
