"""Sums over the inputs of a site, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxcompress.core.held import Few, Held, Many

SAMPLE_ROWS = 256  # inputs kept as they are, at most a quarter of them from one batch


@dataclass
class Moment:
    """Running sums over the rows of x (rows, in)."""

    count: int = 0
    total: Tensor | None = None  # (in,) float64
    second: Tensor | None = None  # (in, in) float32: half the memory, and CENTRED_FLOOR covers what it rounds off
    sample: Tensor | None = None  # (at most SAMPLE_ROWS, in) float32

    def add(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        second, total = x.T @ x, x.sum(0, dtype=torch.float64)
        self.second = second if self.second is None else self.second.add_(second)
        self.total = total if self.total is None else self.total.add_(total)
        self.count += len(x)
        kept = 0 if self.sample is None else len(self.sample)
        room = min(SAMPLE_ROWS // 4, SAMPLE_ROWS - kept, len(x))
        if room > 0:
            picked = x[spread(len(x), room)]
            self.sample = picked.clone() if self.sample is None else torch.cat([self.sample, picked])


@dataclass
class HeldMoment(Moment):
    """The same of held-out inputs, which are kept as they are while they are fewer than they are wide."""

    inputs: list[Tensor] = field(default_factory=list)  # (rows, in) float32; then there are no sums but the mean's

    def add(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        if self.second is None and self.count + len(x) < x.shape[1]:
            self.inputs.append(x.clone())  # the graph may write into its own
            self.count += len(x)
            total = x.sum(0, dtype=torch.float64)
            self.total = total if self.total is None else self.total.add_(total)
            return
        early, self.inputs = self.inputs, []
        if early:
            self.count, self.total = 0, None
        for each in (*early, x):
            super().add(each)

    def summed(self) -> Moment:
        """The sums, also where they were not needed before."""
        found = Moment()
        for x in self.inputs:
            found.add(x)
        return found if self.inputs else self


def pooled(moments: Sequence[Moment]) -> tuple[Tensor, Tensor] | None:
    """E[x x^T], E[x] over all of them, float64; None where none saw anything."""
    count = sum(m.count for m in moments)
    if not count:
        return None
    second, total = ([t for m in moments if (t := getattr(m, name)) is not None] for name in ("second", "total"))
    return _summed(second).div_(count), _summed(total).div_(count)


def held(moments: Sequence[HeldMoment]) -> Held | None:
    """All inputs held out of one site, as they are where that is less."""
    inputs = [x for m in moments for x in m.inputs]
    if all(m.second is None for m in moments) and 0 < sum(map(len, inputs)) < inputs[0].shape[1]:
        return Few(torch.cat(inputs))
    found = pooled([m.summed() for m in moments])
    return None if found is None else Many(*found)


def _summed(parts: Sequence[Tensor]) -> Tensor:
    """In float64, without another copy of any: moments are large."""
    found = parts[0].to(torch.float64, copy=True)
    for part in parts[1:]:
        found += part
    return found


def spread(count: int, room: int) -> Tensor:
    """`room` of the numbers below `count`, rising: one of each of as many equal stretches.

    Equal steps would meet the same column of every image, or the same position of every sentence, where one divides the
    other; multiples of the golden ratio say how far into its stretch each number lies.
    """
    edges = torch.arange(room + 1) * count // max(room, 1)
    golden = torch.arange(room, dtype=torch.float64) * ((math.sqrt(5) - 1) / 2) % 1
    return edges[:-1] + (golden * edges.diff()).long()
