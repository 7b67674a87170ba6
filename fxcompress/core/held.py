"""The inputs that errors are judged by, and what a row a of a weight makes of them: a G a^T with

    G = E[(x - p) (x - p)^T]        p what a bias absorbs, or 0

Few inputs are kept as they are: |a X^T|^2 / n takes n products in place of as many as they are wide, and no difference
of large numbers. Of many, or where there never were inputs, there is a matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

ROW_CHUNK = 4096  # rows of a vocabulary taken at once


class Gram(ABC):
    """G, for the energies of rows in it."""

    def energies(self, rows: Tensor) -> Tensor:
        """a G a^T of each of `rows` (n, in), (n,) float64; the products in float32, which costs a millionth and halves
        the time."""
        return torch.cat([self._energies(part) for part in torch.split(rows.float(), ROW_CHUNK)]).clamp_min(0)

    @abstractmethod
    def diagonal(self) -> Tensor:
        """(in,) float64."""

    @abstractmethod
    def _energies(self, rows: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Identity(Gram):
    """All that is known without data."""

    columns: int

    def diagonal(self) -> Tensor:
        return torch.ones(self.columns, dtype=torch.float64)

    def _energies(self, rows: Tensor) -> Tensor:
        return rows.square().sum(1, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class OfMatrix(Gram):
    """matrix: (in, in) float32."""

    matrix: Tensor

    def diagonal(self) -> Tensor:
        return self.matrix.diagonal().double().clamp_min(0)

    def _energies(self, rows: Tensor) -> Tensor:
        return (rows @ self.matrix).mul_(rows).sum(1, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class OfInputs(Gram):
    """inputs: (n, in) float32."""

    inputs: Tensor

    def diagonal(self) -> Tensor:
        return self.inputs.double().square().mean(0)

    def _energies(self, rows: Tensor) -> Tensor:
        return (rows @ self.inputs.T).square_().mean(1, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Few:
    """Held-out inputs: (n, in) float32."""

    inputs: Tensor

    @property
    def second(self) -> Tensor:
        x = self.inputs.double()
        return x.T @ x / len(x)

    @property
    def mean(self) -> Tensor:
        return self.inputs.mean(0, dtype=torch.float64)

    def around(self, point: Tensor | None) -> Gram:
        """G with p = point (in,) float64, or 0."""
        return OfInputs(self.inputs if point is None else (self.inputs.double() - point).float())


@dataclass(frozen=True, eq=False)
class Many:
    """The moments of held-out inputs."""

    second: Tensor  # E[x x^T] (in, in) float64
    mean: Tensor  # E[x] (in,) float64

    def around(self, point: Tensor | None) -> Gram:
        """E[x x^T] - p E[x]^T - E[x] p^T + p p^T."""
        if point is None:
            return OfMatrix(self.second.float())
        return OfMatrix(torch.addr(self.second, self.mean, point, alpha=-1).addr_(point, point - self.mean).float())


Held = Few | Many
