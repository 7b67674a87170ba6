"""The device that a graph makes tensors on follows its weights.

A captured graph names devices where the model made tensors as it ran (positions, masks). They were those of the weights
then, so when the weights move, every name moves with them:

    %ids = aten.arange(%n, device=cpu)          compiled.to("cuda")          %ids = aten.arange(%n, device=cuda:0)
"""

from __future__ import annotations

import itertools

import torch
from torch import fx, nn


def device_of(module: nn.Module) -> torch.device | None:
    """Of all parameters and buffers; None where there are none, or several."""
    devices = {tensor.device for tensor in itertools.chain(module.parameters(), module.buffers())}
    return devices.pop() if len(devices) == 1 else None


def move(graph: fx.Graph, device: torch.device) -> bool:
    """Name `device` wherever the graph names one; True if that changed anything."""

    def moved(value: fx.node.Argument) -> fx.node.Argument:
        return device if isinstance(value, torch.device) else value

    changed = False
    for node in graph.nodes:
        args = tuple(map(moved, node.args))
        kwargs = {name: moved(value) for name, value in node.kwargs.items()}
        if (args, kwargs) != (node.args, dict(node.kwargs)):
            node.args, node.kwargs, changed = args, kwargs, True
    return changed
