"""Where the checks run. On a GPU: the op as a model calls it, CUDA graphs, streams. Without one, to check the checks:
the same launches interpreted, a graph that is replayed by running it again, one stream."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.codegen.ops.fused import fused, fused_parallel
from fxcompress.codegen.spec import parse
from fxcompress.codegen.triton import launch
from fxcompress.codegen.triton.card import H200, Card, card_of

Run = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Ground:
    """tokens: how many are tried. runs: how often what must not vary is run. backends: of torch.compile, its modes."""

    device: str
    card: Card
    tokens: tuple[int, ...] = (1, 5, 16, 64, 200)
    runs: int = 100
    calls: int = 1000
    compiled: tuple[dict[str, str], ...] = ({}, {"mode": "reduce-overhead"})

    def call(self, text: str, x: Tensor, tensors: list[Tensor], extras: list[Tensor]) -> list[Tensor]:
        """The program, dispatched as for a model."""
        if self.device == "cpu":
            return launch.run(parse(text), x, tensors, extras, self.card)
        several = len(parse(text).outputs) > 1
        return fused_parallel(x, tensors, extras, text) if several else [fused(x, tensors, extras, text)]

    def capture(self, run: Run) -> tuple[list[Tensor], Callable[[], None]]:
        """-> (where a replay leaves its results, the replay)."""
        if self.device == "cpu":
            kept = [y.clone() for y in run()]
            return kept, lambda: [y.copy_(new) for y, new in zip(kept, run())] and None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # compiles, prepares, and sets libraries up
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept = run()
        return kept, graph.replay

    def stream(self) -> contextlib.AbstractContextManager[object]:
        """A stream of its own, as a context that can be entered again."""
        return contextlib.nullcontext() if self.device == "cpu" else torch.cuda.stream(torch.cuda.Stream())

    def wait(self) -> None:
        """Until all that was launched is done."""
        if self.device != "cpu":
            torch.cuda.synchronize()

    def memory(self) -> int:
        """Bytes of the device that tensors hold."""
        gc.collect()
        self.wait()
        return 0 if self.device == "cpu" else torch.cuda.memory_allocated()


def gpu() -> Ground:
    """The current GPU."""
    return Ground("cuda", card_of(torch.device("cuda", torch.cuda.current_device())))


def dry() -> Ground:
    """No GPU: few of everything."""
    return Ground("cpu", H200, (1, 5), 2, 2, ({"backend": "aot_eager"},))
