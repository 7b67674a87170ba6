"""How a captured graph may be called: by position or by name, in any order, at any size inside the captured ranges.

A graph takes exactly the inputs it was captured with. `Signature.bind` turns whatever a caller of the original would
write into that form: positions are named after the original's `forward`, inputs given as None are dropped, an
`attention_mask` left out is all ones and `token_type_ids` left out are zeros (what every Hugging Face model does),
anything else is an `InputError` that says what is wanted.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxcompress.core.devices import device_of, move
from fxcompress.core.errors import InputError
from fxcompress.core.modes import switch


@dataclass(frozen=True)
class Slot:
    """One input leaf: a tensor's dtype and dimensions, or a constant.

    dims: per dimension a fixed size or (symbol, low, high), high None for no bound. sizes: those it was captured with.
    """

    name: str
    dtype: str | None  # None for a constant
    dims: tuple[int | tuple[str, int, int | None], ...] = ()
    sizes: tuple[int, ...] = ()
    constant: bool | int | float | str | None = None

    def check(self, value: Any) -> str | None:
        """What is wrong with `value`, or None."""
        if self.dtype is None:
            same = value == self.constant
            return None if same else f"input {self.name!r} is {value!r}; the graph was captured with {self.constant!r}"
        if not isinstance(value, Tensor):
            return f"input {self.name!r} is a {type(value).__name__}; a {self.dtype} tensor is wanted"
        if value.dim() != len(self.dims):
            return f"input {self.name!r} has shape {tuple(value.shape)}; {len(self.dims)} dimensions are wanted"
        if _name(value.dtype) != self.dtype:
            return f"input {self.name!r} is {_name(value.dtype)}; {self.dtype} is wanted"
        for axis, (size, dim) in enumerate(zip(value.shape, self.dims)):
            low, high = (dim, dim) if isinstance(dim, int) else dim[1:]
            if size < low or (high is not None and size > high):
                wanted = str(low) if low == high else f"{low} to {high if high is not None else 'any size'}"
                return f"input {self.name!r} has size {size} in dimension {axis}; it was captured for {wanted}"
        return None

    def example(self) -> Any:
        """Zeros of the captured sizes, or the constant: enough to trace the graph again."""
        return self.constant if self.dtype is None else torch.zeros(self.sizes, dtype=getattr(torch, self.dtype))


@dataclass(frozen=True)
class Signature:
    """order: the names of the original's `forward`; positional, keyword: the captured inputs, in the captured order."""

    order: tuple[str, ...]
    positional: tuple[str, ...]
    keyword: tuple[str, ...]
    slots: tuple[Slot, ...]  # one a leaf

    @classmethod
    def of(
        cls, gm: fx.GraphModule, ranges: Mapping[sympy.Symbol, Any], order: tuple[str, ...], leaves: Sequence[Any]
    ) -> Signature:
        """Read it off a graph made by torch.export from the inputs `leaves`."""
        args_spec, kwargs_spec = gm._in_spec.children()
        names = list(gm.graph._codegen.pytree_info.orig_args)  # type: ignore[attr-defined]
        slots = tuple(
            _slot(node, leaf, ranges) for node, leaf in zip(gm.graph.find_nodes(op="placeholder"), leaves, strict=True)
        )
        return cls(order, tuple(names[: args_spec.num_children]), tuple(kwargs_spec.context or ()), slots)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Signature:
        """The inverse of `to_json`."""

        def slot(entry: Mapping[str, Any]) -> Slot:
            dims = tuple(d if isinstance(d, int) else (str(d[0]), int(d[1]), d[2]) for d in entry["dims"])
            return Slot(entry["name"], entry["dtype"], dims, tuple(entry["sizes"]), entry["constant"])

        return cls(
            tuple(data["order"]),
            tuple(data["positional"]),
            tuple(data["keyword"]),
            tuple(slot(s) for s in data["slots"]),
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call in the captured form; raises `InputError`."""
        if len(args) > max(len(self.order), len(self.positional)):
            raise InputError(f"{len(args)} positional inputs were given; {self} is wanted.")
        by_position = self.positional if len(args) <= len(self.positional) and not self.keyword else self.order
        given = {**dict(zip(by_position, args)), **kwargs}
        wanted = (*self.positional, *self.keyword)
        given = {k: v for k, v in given.items() if k in wanted or not (v is None or isinstance(v, bool))}
        for name, fill in (("attention_mask", torch.ones_like), ("token_type_ids", torch.zeros_like)):
            if name in wanted and given.get(name) is None and isinstance(given.get("input_ids"), Tensor):
                given[name] = fill(given["input_ids"])
        missing, extra = [n for n in wanted if n not in given], [n for n in given if n not in wanted]
        if missing or extra:
            complaints = (("lacks", missing), ("has no place for", extra))
            said = [f"{what} {', '.join(names)}" for what, names in complaints if names]
            raise InputError(
                f"the call {' and '.join(said)}: the graph was captured with {self}. "
                "Capture again with example_inputs that hold what you want to pass."
            )
        return tuple(given[n] for n in self.positional), {n: given[n] for n in self.keyword}

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Dtypes, ranks and sizes of a bound call; raises `InputError`."""
        leaves = pytree.tree_leaves((args, kwargs))
        if len(leaves) != len(self.slots):
            raise InputError(
                f"the inputs hold {len(leaves)} values; the graph was captured with {len(self.slots)}: {self}."
            )
        seen: dict[str, tuple[str, int]] = {}  # size symbol -> the first input that has it, and its size there
        for slot, leaf in zip(self.slots, leaves):
            wrong = slot.check(leaf)
            if wrong:
                raise InputError(f"{wrong}.")
            for axis, dim in enumerate(slot.dims):
                if isinstance(dim, tuple):
                    name, size = seen.setdefault(dim[0], (slot.name, leaf.shape[axis]))
                    if size != leaf.shape[axis]:
                        raise InputError(
                            f"input {slot.name!r} has size {leaf.shape[axis]} in dimension {axis} where {name!r} has "
                            f"{size}; they must agree."
                        )

    def symbols(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
        """The value each size symbol takes in a bound call."""
        found: dict[str, int] = {}
        for slot, leaf in zip(self.slots, pytree.tree_leaves((args, kwargs))):
            for axis, dim in enumerate(slot.dims):
                if isinstance(dim, tuple):
                    found.setdefault(dim[0], int(leaf.shape[axis]))
        return found

    def __str__(self) -> str:
        return f"({', '.join((*self.positional, *self.keyword))})"


class SignedModule(fx.GraphModule):
    """A GraphModule that binds and checks each call by `meta["signature"]`; deep copies keep it."""

    @property
    def signature(self) -> Signature:
        """How the graph may be called."""
        found: Signature = self.meta["signature"]
        return found

    @property
    def plan(self) -> Any:
        """What was chosen (fxcompress.Plan); on a compressed module."""
        return self._told("plan")

    @property
    def report(self) -> Any:
        """Predicted beside measured (fxcompress.Report); on a compressed module."""
        return self._told("report")

    @property
    def kernels(self) -> Any:
        """The kernels it runs on a GPU: node, program, source file, launch configs (fxcompress.codegen.triton.listing).
        """
        return self._told("kernels")(self)

    @property
    def cost(self) -> Any:
        """Flops, traffic, launches and peak memory in the graph's own symbols (fxcompress.cost_model.graph_cost)."""
        return self._told("cost")(self)

    def _told(self, what: str) -> Any:
        if what not in self.meta:
            raise AttributeError(f"a captured graph has no {what}; fxcompress.compile makes one.")
        return self.meta[what]

    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call of the captured sizes, all zeros: enough to trace the graph again."""
        call: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(
            [slot.example() for slot in self.signature.slots], self._in_spec
        )
        return call

    def train(self, mode: bool = True) -> SignedModule:
        """As nn.Module.train; dropout and batch norm follow where the graph was captured to be trained."""
        super().train(mode)
        if switch(self.graph, mode):
            self.recompile()
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SignedModule:
        """As nn.Module, behind `to` and `cuda`; what the graph makes as it runs is made where the weights are."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = device_of(self)
        if device is not None and move(self.graph, device):
            self.recompile()
        return self

    def copy(self) -> SignedModule:
        """A second graph over the same tensors, to be edited without touching this one."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, about copying its input spec
            twin = SignedModule(self, copy.deepcopy(self.graph))
        twin.meta.update(self.meta)
        return twin

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.signature.bind(args, kwargs)
        if not torch.compiler.is_compiling():  # sizes are symbols there, and comparing them would pin them
            self.signature.check(args, kwargs)
        return super().__call__(*args, **kwargs)


def _slot(node: fx.Node, leaf: Any, ranges: Mapping[sympy.Symbol, Any]) -> Slot:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(leaf, Tensor):
        return Slot(node.name, None, constant=leaf)
    dims = tuple(_dim(s, ranges) for s in value.shape)
    return Slot(node.name, _name(value.dtype), dims, tuple(leaf.shape))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dim(size: int | torch.SymInt, ranges: Mapping[sympy.Symbol, Any]) -> int | tuple[str, int, int | None]:
    if isinstance(size, int):
        return size
    expr = size.node.expr
    if expr.is_Integer:  # left open to the tracer, and found to be fixed by the model
        return int(expr)
    found = ranges.get(expr)
    if found is None:  # an expression of other symbols: whatever fits them
        return (str(expr), 0, None)
    high = int(found.upper) if found.upper.is_Integer else None
    # torch.export excludes 0 and 1 only to keep its own reasoning simple; the graph serves a batch of 1
    # (tests/test_capture.py).
    return (str(expr), 1 if found.lower <= 2 else int(found.lower), high)
