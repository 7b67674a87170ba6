"""Seconds of calls, and what happens between two of them: a kernel in a model is not alone.

`nothing`    what a loop reads was written just now
`Between`    a layer's weights pass through the caches: 16 tokens by 384 x 384 in int8 take 14 us in a tight loop, 20 to
             24 us so, and 29 us in company (2 threads of a Zen 4 EPYC, 2026-11-21)
`Company`    other kernels too, whose code takes the place of its own: a view takes 1.2 us in a tight loop, and 4.9 so

Every call is timed by itself and the lower quartile kept: of what an undisturbed machine takes, and not the luck of a
single call, since a model is many of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.codegen.cpu import products

LAYER = 2 << 20  # bytes of weights between two calls of a kernel: more than a second-level cache
SAMPLES = 7
LONG, ENOUGH = 0.01, 5  # seconds of a call of which so many samples do
Run = Callable[[], Any]


def cache_bytes() -> tuple[int, int]:
    """Of the second-level caches of all threads, and of the last-level cache; 1 and 32 MB where nothing says so."""
    found = {}
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        size, level = ((path / name).read_text(encoding="utf-8").strip() for name in ("size", "level"))
        if size[:-1].isdigit() and size[-1] in "KM":
            found[int(level)] = int(size[:-1]) << (10 if size[-1] == "K" else 20)
    second = found.get(2, 1 << 20) * torch.get_num_threads()
    return second, max([*found.values(), second], default=32 << 20) if found else 32 << 20


def nothing() -> None:
    """What a compiled model does between two loops."""


class Between:
    """What a compiled model does between two calls of the same product."""

    def __init__(self, bytes_read: int = LAYER) -> None:
        self.layer = torch.ones(bytes_read // 4)

    def __call__(self) -> None:
        self.layer.sum()


class Company(Between):
    """What a graph run in eager does between two calls of the same kernel."""

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


class Memory:
    """Bytes that no cache holds, handed out in turn: three times the last-level cache, a kernel's weight after the
    other, as a large model's lie in memory. Read as floats, bf16 or codes they are ordinary numbers.

    NB: emptying the caches before every call is something else: 16 tokens by 3072 x 768 in int8 take 303 us so, 250 us
    in turn, and 247 in a BERT-base, where x and the code stay near (2 threads of a Zen 4 EPYC, 2026-11-21).
    """

    def __init__(self, near: int = 8 << 20) -> None:
        self.bytes = torch.randint(0x3C, 0x40, (near + 3 * cache_bytes()[1],), dtype=torch.uint8)
        self.near, self.place = near, near

    def cached(self, like: Tensor, copies: int) -> list[Tensor]:
        """Copies that lie in the last-level cache once read."""
        size = _paged(like)
        return [self._at(i * size, like) for i in range(max(1, min(copies, self.near // size)))]

    def streamed(self, like: Tensor) -> Tensor:
        """One that was not read for long."""
        size = _paged(like)
        if self.place + size > len(self.bytes):
            self.place = self.near
        self.place += size
        return self._at(self.place - size, like)

    def _at(self, place: int, like: Tensor) -> Tensor:
        return self.bytes[place : place + like.numel() * like.element_size()].view(like.dtype).view(like.shape)


def _paged(like: Tensor) -> int:
    return -(-like.numel() * like.element_size() // 4096) * 4096


def seconds_of_calls(runs: Sequence[Run], between: Run, samples: int = SAMPLES) -> float:
    """Of a call: the lower quartile of several, `runs` in turn, each with `between` before it."""
    runs[0]()
    return timed([runs[at % len(runs)] for at in range(samples)], between)


def timed(runs: Sequence[Run], between: Run) -> float:
    """Of each of `runs` once: the lower quartile."""
    found = []
    for run in runs:
        between()
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return sorted(found)[len(found) // 4]


def seconds_beyond(run: Run, floor: Run, samples: int = 15) -> float:
    """Of `run` above those of `floor`, the same call of next to nothing: measured in turn, since a machine drifts."""
    floor()
    run()
    found: tuple[list[float], list[float]] = ([], [])
    for at in range(samples):
        for each, seconds in zip((floor, run), found):
            start = time.perf_counter()
            each()
            seconds.append(time.perf_counter() - start)
        if at >= ENOUGH - 1 and found[1][-1] > LONG:
            break
    low, high = (sorted(seconds)[len(seconds) // 4] for seconds in found)
    return high - low
