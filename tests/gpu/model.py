"""A small network compressed by fxcompress.compile, then moved to the GPU: eager, compiled, freed."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.gpu.ground import Ground


class Residual(nn.Module):
    """Two gated blocks and a head: parallel products, epilogues with a residual, a norm between."""

    def __init__(self, width: int = 256, hidden: int = 768) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.down, self.mix = nn.Linear(hidden, width), nn.Linear(width, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return self.head(nn.functional.gelu(self.mix(self.norm(x))) + x)


@dataclass(frozen=True)
class Small:
    """`Residual`, compressed. room: of its relative error against the CPU."""

    rewrites: tuple[str, ...]
    budget: str
    room: float

    def runs_as_on_the_cpu(self, ground: Ground) -> None:
        """Eager and through torch.compile, from the first call of a fresh copy on, at two batch sizes."""
        compiled, inputs = _compressed(self.rewrites, self.budget)
        with torch.no_grad():
            for options in (None, *ground.compiled):
                moved = copy.deepcopy(compiled).to(ground.device)
                torch.compiler.reset()
                run = moved if options is None else torch.compile(moved, fullgraph=True, **options)
                for batch in (inputs[:3], inputs[:40]):
                    want = compiled(batch)
                    for _ in range(4):  # a graph is warmed up, captured, replayed
                        made = run(batch.to(ground.device)).cpu()
                        error = float((made - want).norm() / want.norm())
                        assert error <= self.room, f"{error:.2g} off the CPU's, {options or 'eager'}"

    def goes_with_its_memory(self, ground: Ground) -> None:
        """Weights as kernels read them are freed with the model."""
        compiled, inputs = _compressed(self.rewrites, self.budget)
        batch = inputs[:3].to(ground.device)
        with torch.no_grad():
            for _ in range(2):  # the first leaves counters and libraries behind
                before = ground.memory()
                moved = copy.deepcopy(compiled).to(ground.device)
                moved(batch)
                del moved
        left = ground.memory() - before
        assert left == 0, f"{left} bytes stay when the model is gone"


@functools.cache
def _compressed(rewrites: tuple[str, ...], budget: str) -> tuple[nn.Module, Tensor]:
    """-> (on the CPU, a batch)."""
    import fxcompress  # the whole of it, which needs more than codegen does

    torch.manual_seed(0)
    inputs = torch.randn(64, 256) * torch.logspace(0, -2, 256)
    model = Residual().eval()
    compiled = fxcompress.compile(
        model, budget, calibration=inputs.split(8), rewrites=list(rewrites) or None, progress=False
    )
    assert "fused" in compiled.code, "nothing was fused"
    return compiled, inputs
