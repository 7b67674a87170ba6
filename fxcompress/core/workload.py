"""What a model will be asked: calls of a given batch and sequence, and how often each is made.

    ("decode", 1, 1)      ("prefill", 8, 512, 0.3)      "decode=1x1"      "prefill=8x512:0.3"

Dimension 0 of every input is the batch, dimension 1 the sequence, as fxcompress.core.capture makes them dynamic. A
weight is a number of calls: the latency of several workloads is their mean

    sum_w weight_w seconds_w / sum_w weight_w

so that one long call weighs as much as the time it takes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxcompress.core.calibrate import Call
from fxcompress.core.errors import WorkloadError
from fxcompress.core.signature import Signature, SignedModule, Slot

HOW = 'write (name, batch, sequence) or (name, batch, sequence, weight), such as ("prefill", 8, 512)'
_TEXT = re.compile(r"\s*([^=\s]+)\s*=\s*(\d+)\s*x\s*(\d+)\s*(?::\s*([0-9.eE+-]+)\s*)?")


@dataclass(frozen=True)
class Workload:
    """Calls of `batch` sequences of `sequence` tokens each, `weight` of them for one of another of weight 1."""

    name: str
    batch: int
    sequence: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise WorkloadError(f"workload {self.name!r}: a name is wanted; {HOW}.")
        for what in ("batch", "sequence"):
            size = getattr(self, what)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise WorkloadError(f"workload {self.name!r}: {what}={size!r} is no whole number of at least 1; {HOW}.")
        weight = self.weight
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise WorkloadError(f"workload {self.name!r}: weight={weight!r} is no number above 0; {HOW}.")

    @classmethod
    def parse(cls, given: Any) -> Workload:
        """A `Workload`, a tuple of its fields, or the text "prefill=8x512:0.3". Raises `WorkloadError`."""
        if isinstance(given, Workload):
            return given
        if isinstance(given, str):
            match = _TEXT.fullmatch(given)
            try:
                weight = 1.0 if match is None or match[4] is None else float(match[4])
            except ValueError:
                match = None
            if match is None:
                raise WorkloadError(
                    f"workload {given!r} is not understood; write name=BATCHxSEQUENCE or name=BATCHxSEQUENCE:WEIGHT, "
                    "such as decode=1x1 or prefill=8x512:0.3."
                )
            return cls(match[1], int(match[2]), int(match[3]), weight)
        if not isinstance(given, Sequence) or len(given) not in (3, 4):
            raise WorkloadError(f"workload {given!r} is not understood; {HOW}.")
        return cls(*given)

    def __str__(self) -> str:
        return f"{self.name} ({self.batch} x {self.sequence})"


def parse_workload(given: Iterable[Any]) -> tuple[Workload, ...]:
    """Each of them parsed, under different names. Raises `WorkloadError`."""
    if isinstance(given, str | Workload) or not isinstance(given, Iterable):
        raise WorkloadError(f"workload={given!r} is no list; write a list of them: {HOW}.")
    every = tuple(Workload.parse(one) for one in given)
    if not every:
        raise WorkloadError(f"workload is empty; {HOW}.")
    twice = next((w.name for i, w in enumerate(every) if w.name in {o.name for o in every[:i]}), None)
    if twice is not None:
        raise WorkloadError(f"two workloads are called {twice!r}; give each a name of its own.")
    return every


def shape_of(gm: SignedModule, call: Call) -> Workload:
    """The workload that one call of `gm` is."""
    batch, sequence = 1, 1
    for slot, leaf in zip(gm.signature.slots, pytree.tree_leaves(call)):
        if isinstance(leaf, Tensor) and leaf.dim() and slot.dtype is not None:
            batch = int(leaf.shape[0])
            if leaf.dim() > 1 and _has_sequence(slot):
                sequence = int(leaf.shape[1])
                break
    return Workload("example", batch, sequence)


def bind(gm: SignedModule, workload: Workload) -> dict[str, int]:
    """What each size symbol of the graph is in such a call. Raises `WorkloadError` outside the captured range."""
    found: dict[str, int] = {}
    for slot in gm.signature.slots:
        for axis, size in _sizes(slot, workload).items():
            dim = slot.dims[axis]
            low, high = (dim, dim) if isinstance(dim, int) else dim[1:]
            if size < low or (high is not None and size > high):
                raise WorkloadError(_outside(slot, axis, size, low, high, workload))
            if isinstance(dim, tuple) and dim[0].isidentifier():
                found.setdefault(dim[0], size)
                if found[dim[0]] != size:
                    raise WorkloadError(
                        f"workload {workload.name!r} is {workload.batch} x {workload.sequence}, and the graph was "
                        f"captured with dimension {axis} of input {slot.name!r} equal to another that would be "
                        f"{found[dim[0]]}."
                    )
    _check_formulas(gm.signature, found, workload)
    return found


def inputs_of(gm: SignedModule, workload: Workload, call: Call) -> Call:
    """A call of that shape, the values of `call` repeated or cut."""
    leaves, spec = pytree.tree_flatten(call)
    made = []
    for slot, leaf in zip(gm.signature.slots, leaves, strict=True):
        for axis, size in _sizes(slot, workload).items():
            leaf = leaf.index_select(axis, torch.arange(size) % leaf.shape[axis])
        made.append(leaf)
    again: Call = pytree.tree_unflatten(made, spec)
    return again


def weighted(seconds: Sequence[float], workload: Sequence[Workload]) -> float:
    """The mean of a call."""
    return sum(w.weight * s for w, s in zip(workload, seconds, strict=True)) / sum(w.weight for w in workload)


def _sizes(slot: Slot, workload: Workload) -> dict[int, int]:
    """{axis: its size}: the batch, and the sequence where dimension 1 is one."""
    if slot.dtype is None or not slot.dims:
        return {}
    sizes = {0: workload.batch}
    if _has_sequence(slot) or (len(slot.dims) > 1 and workload.sequence != 1):
        sizes[1] = workload.sequence
    return sizes


def _has_sequence(slot: Slot) -> bool:
    """Features and channels are numbers of a fixed size; what is dynamic, or fixed and counts tokens, is a sequence."""
    counted = slot.dtype is not None and slot.dtype.startswith(("int", "bool"))
    return len(slot.dims) > 1 and (isinstance(slot.dims[1], tuple) or counted)


def _check_formulas(signature: Signature, found: dict[str, int], workload: Workload) -> None:
    """Dimensions that are formulas of others (2*s0) must come out as the workload says."""
    for slot in signature.slots:
        for axis, size in _sizes(slot, workload).items():
            dim = slot.dims[axis]
            if isinstance(dim, tuple) and not dim[0].isidentifier():
                value = sympy.sympify(dim[0]).subs({sympy.Symbol(n): v for n, v in found.items()})
                if value != size:
                    raise WorkloadError(
                        f"workload {workload.name!r} is {workload.batch} x {workload.sequence}, and input "
                        f"{slot.name!r} was captured with {dim[0]} in dimension {axis}, which is {value} there."
                    )


def _outside(slot: Slot, axis: int, size: int, low: int, high: int | None, workload: Workload) -> str:
    what = "batch" if axis == 0 else "sequence"
    wanted = str(low) if low == high else f"{low} to {high if high is not None else 'any size'}"
    without = "" if axis == 0 or isinstance(slot.dims[1], tuple) else ", or 1 where the model reads no sequence"
    return (
        f"workload {workload.name!r} has a {what} of {size}, and input {slot.name!r} was captured for {wanted} in "
        f"dimension {axis}{without}. Ask for that, or capture with other example_inputs."
    )
