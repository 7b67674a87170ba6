"""What a rewrite says about itself: a frozen dataclass whose fields are its parameters and whose text parses back.

Two kinds compose. A `Structure` says how W is expressed (dense, low rank, Monarch, sparse); a `Storage` says how each
matrix of that expression is kept (as it is, quantized). A structure hands every matrix it makes to a `Store`, which
answers with the matrix as it will be read back, so that what is made next can make up for what storing lost.

The driver (fxcompress.core.surgery) does all graph edits; a rewrite only inserts its call.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, fx

from fxcompress.core.budget import Budget
from fxcompress.core.cost import Cost
from fxcompress.core.errors import SpecError
from fxcompress.core.metric import Metric, rounding_metric, row_errors, stand_ins
from fxcompress.core.site import Site, Use

_SPEC = re.compile(r"\s*([a-z_0-9]+)\s*(?:\{(.*)\})?\s*")
_NEXT = re.compile(r",(?=\s*[a-z_0-9]+\s*=)")  # the comma before a parameter, not one inside a value such as (8, 8)


class Rewrite(ABC):
    """One cheaper way to keep or compute a weight."""

    name: ClassVar[str]
    paper: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = ("linear", "embedding", "tied", "convolution")  # of sites it has an op for

    @classmethod
    @abstractmethod
    def refuses(cls, site: Site) -> str | None:
        """Why this rewrite cannot act here, a clause for the user's table; None if it can."""

    @classmethod
    @abstractmethod
    def space(cls, site: Site) -> Iterator[Self]:
        """The instances worth costing here, cheapest first."""

    @classmethod
    def unasked(cls, site: Site, budget: Budget) -> str | None:
        """Why it is not weighed here unless the user asks for it by name, a clause; None if it is."""
        return None

    @classmethod
    def unserved(cls, site: Site) -> str | None:
        """The refusal of a kind of site there is no op for; `refuses` starts with it."""
        return None if site.kind in cls.kinds else f"it has no op for {_KINDS[site.kind]}"

    def at(self, site: Site) -> Self:
        """The instance this stands for at `site`: shares become counts. Raises `SpecError` as `check` does."""
        self.check(site)
        return self

    def check(self, site: Site) -> None:  # noqa: B027 - most parameters fit anywhere
        """Raise a `SpecError` that names the site, what was found and what is allowed, if the parameters do not fit."""

    def __str__(self) -> str:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        given = [(f.name, v) for f in fields if (v := getattr(self, f.name)) != f.default]
        params = ", ".join(f"{name}={value}" for name, value in given)
        return f"{self.name}{{{params}}}" if params else self.name


_KINDS = {
    "linear": "linear weights",
    "embedding": "embedding tables",
    "tied": "a weight that is both looked up and multiplied",
    "convolution": "convolutions",
    "experts": "experts",
}


class Storage(Rewrite):
    """How one matrix is kept."""

    keys: ClassVar[tuple[str, ...]]  # names of the tensors `encode` makes

    @classmethod
    @abstractmethod
    def dense_errors(cls, site: Site) -> dict[Storage, float]:
        """The squared relative error of the site's whole weight under each instance of `space`."""

    def dense_weight(self, site: Site) -> Tensor:
        """The site's whole weight as it would be read back, in its dtype."""
        return self.decode(self.encode(site.weight, rounding_metric(site)), site.weight)

    def probe_rows(self, site: Site, rows: Tensor) -> Tensor:
        """Some rows (n,) with errors of the kind that `dense_weight` has, (n, columns); they may be quicker to make."""
        return self.dense_weight(site)[rows]

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


class Store:
    """Where a structure puts what it is made of, each matrix encoded by `storage` (None: as it is)."""

    def __init__(self, storage: Storage | None = None) -> None:
        self.storage = storage
        self.tensors: dict[str, Tensor] = {}  # by attribute name
        self.likes: dict[str, Tensor] = {}  # shape and dtype of each matrix, on meta
        self.kept: set[str] = set()  # names that are no matrix
        self.read: dict[str, Tensor] = {}  # every matrix as it will be read back, and everything kept

    def __call__(self, name: str, matrix: Tensor, metric: Metric | None = None) -> Tensor:
        """Store `matrix` (rows, columns) so that its error in `metric` is small -> the matrix as it will be read."""
        self.likes[name] = torch.empty_like(matrix, device="meta")
        if self.storage is None:
            self.tensors[name] = self.read[name] = matrix.contiguous()
            return matrix
        encoded = self.storage.encode(matrix, metric or Metric())
        self.tensors.update({key_of(name, key): tensor for key, tensor in encoded.items()})
        self.read[name] = self.storage.decode(encoded, matrix)
        return self.read[name]

    def keep(self, name: str, tensor: Tensor) -> None:
        """Store what is no matrix (a mask, indices) as it is."""
        self.kept.add(name)
        self.tensors[name] = self.read[name] = tensor.contiguous()


def key_of(matrix: str, part: str) -> str:
    """Attribute name of one tensor of one matrix: "codes" of the weight itself, "u_codes" of a factor."""
    return part if matrix == "weight" else f"{matrix}_{part}"


@dataclasses.dataclass(frozen=True)
class Operand:
    """A stored matrix, or a kept tensor, inside a graph."""

    read: Callable[[], fx.Node]
    lookup: Callable[[fx.Node], fx.Node]  # ids (...) -> rows (..., columns)


class Structure(Rewrite):
    """How a weight is expressed by matrices."""

    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    joint: ClassVar[bool] = False  # what it loses shows at other sites, too: none of them can be judged alone
    keeps: ClassVar[tuple[str, ...]] = ()  # names of what `factor` keeps beside the matrices
    errs_as: ClassVar[str] = ""  # the family whose errors a model minds alike, its own where empty

    @abstractmethod
    def matrices(self, site: Site) -> dict[str, tuple[int, int]]:
        """(rows, columns) of each matrix `factor` stores, in its order."""

    def kept_bytes(self, site: Site) -> int:
        """Bytes of everything `factor` keeps beside the matrices."""
        return 0

    def kept_rows(self, site: Site) -> Tensor | None:
        """The rows whose outputs remain, ascending, and so the entries of the bias that do; None for all."""
        return None

    def freed_bytes(self, site: Site) -> int:
        """Bytes that tensors which are no site's weight (biases) lose when this is chosen here."""
        return 0

    def error_bound(self, site: Site) -> float:
        """A lower bound on the squared relative error over the calibration inputs, cheap: no storage gets lower."""
        return 0.0

    def series(self) -> Hashable:
        """Of the instances of one site that have this in common, one with more bytes loses no more."""
        return self

    def bound_from(self, site: Site, larger: Self, lost: float) -> float:
        """A lower bound on what it loses, from what one of its series with more bytes does."""
        return lost

    def input_error(self, site: Site) -> float:
        """The squared relative error of what happens to the inputs (rounding them), which no weight shows."""
        return 0.0

    def unstored(self, site: Site) -> Tensor:
        """The dense weight (rows, columns) this amounts to before anything is stored."""
        store = Store()
        self.factor(site, store)
        return self.dense(store.read, site)

    def unstored_rows(self, site: Site, rows: Tensor) -> Tensor:
        """Some of its rows (n,): (n, columns)."""
        return self.unstored(site)[rows]

    def unstored_error(self, site: Site) -> float:
        """`local_error` of that, told from rows that stand for all."""
        sample = site.analysis(stand_ins)
        return sample.total(row_errors(site, sample.rows, self.unstored_rows(site, sample.rows)))

    def rising_errors(self, site: Site) -> Iterator[float]:
        """Lower bounds on the squared relative error before anything is stored, each dearer than the one before; the
        last is that error, what happens to the inputs included. Who has seen enough asks for no more."""
        bound = self.error_bound(site)
        yield bound
        yield max(self.unstored_error(site) + self.input_error(site), bound)

    @abstractmethod
    def factor(self, site: Site, store: Store) -> None:
        """Project the site's weight: store every one of `matrices`, keep everything else."""

    @abstractmethod
    def dense(self, factors: Mapping[str, Tensor], site: Site) -> Tensor:
        """The dense weight (rows, columns) these matrices amount to; differentiable, any floating dtype."""

    def draw(self, site: Site, generator: torch.Generator, store: Store) -> None:
        """A random start in place of `factor`: independent normal entries, scaled so that the dense weight has the
        spread of the site's own. What is kept beside the matrices is drawn from the site as `factor` does it."""
        itemtype, made = site.weight.dtype, Store()
        self.factor(site, made)
        factors = {name: torch.randn(shape, generator=generator) for name, shape in self.matrices(site).items()}
        spread = float(self.dense({**made.read, **factors}, site).float().std())
        gain = (float(site.weight.float().std()) / spread) ** (1 / len(factors)) if spread > 0 else 1.0
        for name, factor in factors.items():
            store(name, (factor * (gain if math.isfinite(gain) else 1.0)).to(itemtype))
        for name in made.kept:
            store.keep(name, made.tensors[name])

    @abstractmethod
    def emit(self, graph: fx.Graph, use: Use, operands: Mapping[str, Operand], bias: fx.Node | None) -> fx.Node:
        """Insert the replacement of `use` and return it. Must not erase or rewire anything."""

    @abstractmethod
    def cost(self, use: Use, rows: int, columns: int, weight_bytes: int, itemsize: int) -> Cost:
        """Work of one use of a (rows, columns) weight, all factors kept in `weight_bytes`."""

    def cost_at(self, site: Site, use: Use, weight_bytes: int, itemsize: int) -> Cost:
        """The same of one use of `site`."""
        return self.cost(use, site.rows, site.columns, weight_bytes, itemsize)


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
    types = {f.name: f.type for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    params: dict[str, Any] = {}
    for part in filter(None, (p.strip(" ,") for p in _NEXT.split(match[2] or ""))):
        key, _, value = (p.strip() for p in part.partition("="))
        if key not in types:
            raise SpecError(f"{text!r}: {kind.name} has no parameter {key!r}; it takes {', '.join(types) or 'none'}.")
        try:
            params[key] = value if types[key] == "str" else ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise SpecError(f"{text!r}: {key}={value} is no number.") from None
    try:
        return kind(**params)
    except TypeError as error:
        raise SpecError(f"{text!r}: {str(error).split('() ')[-1]}.") from None
