"""How fast this machine is now: a few standard kernels, timed in a millisecond or two.

    slowdown = geometric mean of (seconds now / seconds while the profile was measured)

A shared machine changes its speed: 16 tokens by 1536 x 384 in int8 took 98 us, and 61 us two seconds later (2 threads
of a Zen 4 EPYC, 2026-11-21). A prediction is of the machine as it was profiled; what is measured beside it is of now.
The kernels belong to no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxcompress.codegen.cpu.clock import nothing, seconds_of_calls

Pulse = Mapping[str, float]


def _products(x: Tensor, weights: Tensor) -> None:
    for weight in weights:
        torch.mm(x, weight)


class Beat:
    """Timed once when called: {kernel: seconds}."""

    def __init__(self) -> None:
        x, w, codes = torch.ones(64, 256), torch.ones(256, 256), torch.ones(256, 256, dtype=torch.int8)
        self.runs: dict[str, Callable[[], Any]] = {
            "product": partial(torch.mm, x, w),
            "loop": partial(torch.exp, torch.ones(256, 256)),
            "calls": lambda: [x.t() for _ in range(50)],
            # as weights of a model in the last-level cache, which neighbours share: they are slow when the rest is not
            "weights": partial(_products, torch.ones(4, 512), torch.ones(8, 512, 512)),
        }
        if torch.cpu._is_vnni_supported():
            self.runs["int8"] = partial(torch._int_mm, torch.ones(64, 256, dtype=torch.int8), codes)

    def __call__(self) -> Pulse:
        return {name: seconds_of_calls([run], nothing, 4) for name, run in self.runs.items()}


def typical(pulses: Sequence[Pulse]) -> dict[str, float]:
    """The lower quartile of each kernel."""
    return {name: sorted(p[name] for p in pulses)[len(pulses) // 4] for name in pulses[0]}


def slowdown(now: Pulse, then: Pulse) -> float:
    """Of the machine, over the kernels that both know."""
    both = [math.log(now[name] / then[name]) for name in now if name in then]
    return math.exp(sum(both) / len(both)) if both else 1.0
