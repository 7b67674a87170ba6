"""Counters of a split product (fxcompress.codegen.triton.gemm): zero before a launch, and zero again after it.

So they are zeroed once and used for ever, by launches that follow one another. Launches of two streams may overlap, and
a captured CUDA graph may be replayed beside anything: each stream has counters of its own, and each launch that is
being captured gets some that nobody else ever has. All come out of one slab a device, made by its first launch, because
zeroing inside a capture would be one more node in the graph, as long as a small product itself.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from fxcompress.codegen.triton.lasting import lasting

SLAB = 1 << 20  # 4 MB: some 8,000 captured launches of 128 tiles
_STREAM = 1 << 14  # a stream's own

_lock = threading.Lock()
_slabs: dict[torch.device, tuple[Tensor, int]] = {}  # counters, and how many of them are given away
_of_stream: dict[tuple[torch.device, int], Tensor] = {}


def zeroed(count: int, device: torch.device) -> Tensor:
    """int32 (at least count,) of zeros, to be left at zero."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    with _lock:
        if torch.cuda.is_current_stream_capturing():
            return _take(count, device, grow=False)
        key = (device, torch.cuda.current_stream(device).cuda_stream)
        if key not in _of_stream or len(_of_stream[key]) < count:
            _of_stream[key] = _take(max(count, _STREAM), device, grow=True)
        return _of_stream[key]


@contextlib.contextmanager
def lent(device: torch.device) -> Iterator[None]:
    """What is captured inside gives its counters back at the end: for graphs that are gone by then. Nothing else may
    be launched inside but their replays."""
    with _lock:
        before = _slabs.get(device)
    yield
    with _lock:
        if before is not None:
            _slabs[device] = before


def _take(count: int, device: torch.device, grow: bool) -> Tensor:
    slab, given = _slabs.get(device, (torch.empty(0, dtype=torch.int32), 0))
    if given + count > len(slab):
        if not grow:  # inside a capture: zeroed by the graph, at every replay
            return torch.zeros(count, dtype=torch.int32, device=device)
        made = lasting(lambda: torch.zeros(max(count, SLAB), dtype=torch.int32, device=device), device)
        torch.cuda.current_stream(device).synchronize()  # other streams will use it too
        slab, given = made, 0
    _slabs[device] = (slab, given + count)
    return slab[given : given + count]
