"""Seconds of a call, an input, a node, a buffer, a loop's launch: what stands around kernels. Three times: in a hot
model, and after half of the last-level cache, or three times as much as it holds, took the place of the interpreter's
code and objects.

    input   = (a compiled call of three inputs - of one) / 2
    kernel  = (a compiled stack of products, a loop after each - the same products alone) / loops

A compiled call of one input that computes nothing takes 55 us in a tight loop, 112 us after 16 MB and 365 after 96. A
MiniLM of 2.3 ms spends .27 ms before its first kernel and .17 after its last (2 threads of a Zen 4 EPYC, 2026-11-21).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.codegen.cpu.clock import Between, Company, Run, cache_bytes, nothing, seconds_of_calls
from fxcompress.codegen.cpu.module import LoweredModule
from fxcompress.core.capture import capture
from fxcompress.cost_model.device import Target

LEAST = 1e-7
TARGETS: tuple[Target, ...] = ("eager", "inductor")
VIEWS, BUFFERS = 40, 64
TOKENS, WIDTH = 32, 64  # worth two threads, and nothing else


class _Nothing(nn.Module):
    """Views, and one node that computes nothing to speak of."""

    def __init__(self, views: int, buffers: int = 0) -> None:
        super().__init__()
        self.views, self.several = views, buffers
        for at in range(buffers):
            self.register_buffer(f"packed_{at}", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.views):
            x = x.transpose(1, 2)
        for at in range(self.several):
            x = x + self.get_buffer(f"packed_{at}")
        return x + 1


_AFTER = (torch.tanh, torch.sigmoid, torch.relu, lambda x: x * x + 1, lambda x: torch.softmax(x, -1), torch.exp,
          lambda x: F.layer_norm(x, x.shape[-1:]), lambda x: x - x.amax(-1, keepdim=True))  # fmt: skip


class _Three(nn.Module):
    """Of three inputs."""

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return x + y + z


def _same(x: Tensor) -> Tensor:
    return x


class _Stack(nn.Module):
    """Products, and a different loop after each."""

    def __init__(self, after: Sequence[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.after = after
        for at in range(len(after)):
            self.register_buffer(f"packed_{at}", torch.randn(WIDTH, WIDTH) / WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for at, after in enumerate(self.after):
            x = after(torch.mm(x, self.get_buffer(f"packed_{at}")))
        return x


def overheads() -> dict[str, tuple[float, ...]]:
    """(hot, cached, streamed) of each."""
    last, company = cache_bytes()[1], Company()
    levels = [_all(nothing, nothing), _all(company, Between(last // 2)), _all(company, Between(3 * last))]
    return {name: tuple(accumulate((max(level[name], LEAST) for level in levels), max)) for name in levels[0]}


def _all(nodes: Run, calls: Run) -> dict[str, float]:
    """nodes, calls: what happens before a node of a graph in eager, and before a call."""

    def seconds(run: Run, between: Run = calls) -> float:
        return seconds_of_calls([run], between, 31)

    def lowered(module: nn.Module, x: Tensor, target: Target, inputs: int = 1) -> Run:
        return partial(LoweredModule(capture(module, (x,) * inputs), target), *(x,) * inputs)

    x, y, found = torch.randn(4, 2, 8), torch.randn(TOKENS, WIDTH), {}
    for target in TARGETS:
        one, three = lowered(_Nothing(0), x, target), lowered(_Three(), x, target, 3)
        found[f"{target}.call"] = seconds(one)
        found[f"{target}.input"] = (seconds(three) - found[f"{target}.call"]) / 2
    few, many = (seconds(lowered(_Nothing(views), x, "eager"), nodes) for views in (2, 2 + VIEWS))
    found["eager.view"] = (many - few) / VIEWS
    held = nn.Module()
    for at in range(100):
        held.register_buffer(f"packed_{at}", x)
    found["eager.attribute"] = seconds(lambda: [getattr(held, f"packed_{at}") for at in range(100)], nodes) / 100
    more = seconds(lowered(_Nothing(0, BUFFERS), x, "inductor"))
    found["inductor.attribute"] = max((more - found["inductor.call"]) / BUFFERS, LEAST)
    plain, loops = (seconds(lowered(_Stack(after), y, "inductor")) for after in ((_same,) * len(_AFTER), _AFTER))
    found["inductor.kernel"] = (loops - plain) / len(_AFTER)
    return found
