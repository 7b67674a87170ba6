"""What launching needs to know of a GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

OLDEST = 80  # sm_80: the first with bfloat16 tensor cores and asynchronous copies


@dataclass(frozen=True)
class Card:
    """name: as the driver gives it; arch: 90 is sm_90; multiprocessors: how many programs run at once, at least."""

    name: str
    arch: int
    multiprocessors: int


H200 = Card("NVIDIA H200", 90, 132)


@functools.cache
def card_of(device: torch.device) -> Card:
    """The GPU behind `device`. Asks the driver, so never at import."""
    found = torch.cuda.get_device_properties(device)
    return Card(found.name, 10 * found.major + found.minor, found.multi_processor_count)
