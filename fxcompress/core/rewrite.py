"""What a rewrite says about itself: a frozen dataclass whose fields are its parameters and whose text parses back.

Two kinds compose. A `Structure` says how W is expressed (dense, low rank); a `Storage` says how each matrix of that
expression is kept (as it is, quantized). A structure hands every matrix it makes to `store`, which answers with the
matrix as it will be read back, so that what is made next can make up for what storing lost.

The driver (fxcompress.core.surgery) does all graph edits; a rewrite only inserts its call.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, fx

from fxcompress.core.cost import Cost
from fxcompress.core.errors import SpecError
from fxcompress.core.metric import Metric
from fxcompress.core.site import Site, Use

Store = Callable[[str, Tensor, Metric], Tensor]
"""(name, matrix (rows, columns), metric) -> the matrix as it will be read back."""

_SPEC = re.compile(r"\s*([a-z_]+)\s*(?:\{(.*)\})?\s*")


class Rewrite(ABC):
    """One cheaper way to keep or compute a weight."""

    name: ClassVar[str]
    paper: ClassVar[str]

    @classmethod
    @abstractmethod
    def refuses(cls, site: Site) -> str | None:
        """Why this rewrite cannot act here, a clause for the user's table; None if it can."""

    @classmethod
    @abstractmethod
    def space(cls, site: Site) -> Iterator[Self]:
        """The instances worth costing here, cheapest first."""

    def __str__(self) -> str:
        params = ", ".join(f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self))  # type: ignore[arg-type]
        return f"{self.name}{{{params}}}" if params else self.name


class Storage(Rewrite):
    """How one matrix is kept."""

    keys: ClassVar[tuple[str, ...]]  # names of the tensors `encode` makes

    @classmethod
    @abstractmethod
    def dense_errors(cls, site: Site) -> dict[Storage, float]:
        """The squared relative error of the site's whole weight under each instance of `space`."""

    @classmethod
    @abstractmethod
    def for_factors(cls, site: Site) -> tuple[Self, ...]:
        """The instances worth trying on the matrices of a structure."""

    @abstractmethod
    def stored_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        """Exactly what `encode` makes, in bytes."""

    @abstractmethod
    def encode(self, matrix: Tensor, metric: Metric) -> dict[str, Tensor]:
        """The tensors that replace `matrix` (rows, columns), by the attribute name they get."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """The matrix as `read` will give it, in the shape and dtype of `like`."""

    @abstractmethod
    def read(self, graph: fx.Graph, tensors: Mapping[str, fx.Node], like: Tensor) -> fx.Node:
        """Insert the call that gives the whole matrix."""

    @abstractmethod
    def lookup(self, graph: fx.Graph, tensors: Mapping[str, fx.Node], like: Tensor, ids: fx.Node) -> fx.Node:
        """Insert the call that gives the rows `ids`."""


@dataclasses.dataclass(frozen=True)
class Operand:
    """A stored matrix inside a graph."""

    read: Callable[[], fx.Node]
    lookup: Callable[[fx.Node], fx.Node]


class Structure(Rewrite):
    """How a weight is expressed by matrices."""

    @abstractmethod
    def shapes(self, site: Site) -> dict[str, tuple[int, int]]:
        """(rows, columns) of each matrix `factor` stores."""

    @abstractmethod
    def error_bound(self, site: Site) -> float:
        """The squared relative error over the calibration inputs before anything is stored: no storage gets lower."""

    @abstractmethod
    def unstored(self, site: Site) -> Tensor:
        """The dense weight (rows, columns) this amounts to before anything is stored; cheap next to `factor`."""

    @abstractmethod
    def factor(self, site: Site, store: Store) -> Tensor:
        """Store every matrix; return the dense weight (rows, columns) float they amount to."""

    @abstractmethod
    def emit(self, graph: fx.Graph, use: Use, operands: Mapping[str, Operand], bias: fx.Node | None) -> fx.Node:
        """Insert the replacement of `use` and return it. Must not erase or rewire anything."""

    @abstractmethod
    def cost(self, use: Use, rows: int, columns: int, weight_bytes: int, itemsize: int) -> Cost:
        """Work of one use, all factors kept in `weight_bytes`."""


def parse_spec(text: str, known: Mapping[str, type[Rewrite]]) -> Rewrite:
    """`"low_rank{rank=80}"` -> LowRank(rank=80). Raises `SpecError` that says what is allowed."""
    match = _SPEC.fullmatch(text)
    if match is None:
        raise SpecError(
            f"{text!r} is no rewrite; write name{{parameter=value}}, such as 'quantize{{bits=4, group_size=64}}'."
        )
    if match[1] not in known:
        raise SpecError(f"unknown rewrite {match[1]!r}; known are {', '.join(known)}.")
    kind = known[match[1]]
    wanted = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    params: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in (match[2] or "").split(","))):
        key, _, value = part.partition("=")
        if key.strip() not in wanted:
            raise SpecError(
                f"{text!r}: {kind.name} has no parameter {key.strip()!r}; it takes {', '.join(wanted) or 'none'}."
            )
        try:
            params[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            raise SpecError(f"{text!r}: {key.strip()}={value.strip()} is no number.") from None
    try:
        return kind(**params)
    except TypeError as error:
        raise SpecError(f"{text!r}: {str(error).split('() ')[-1]}.") from None

