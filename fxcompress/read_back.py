"""Weights that no linear module, table or convolution owns: read back whole wherever the module asks for them.

    MixtralExperts.gate_up_proj (4, 512, 128)   ->   gate_up_proj_codes, gate_up_proj_scales, ...; and a property
                                                     `gate_up_proj`, which dequantizes them each time

The module keeps its class as a base, and its own forward. So a router, stacked experts, the packed projections of
attention or a bare parameter are as small as in the compiled graph. Where the graph multiplies by factors without
making the weight, its numbers and these differ by roundings; where it only unpacks, they are the same bits.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fxcompress.core.errors import PlanError
from fxcompress.core.site import Site
from fxcompress.parts import Part
from fxcompress.passes import REWRITES
from fxcompress.passes.recipe import parse

READERS = "_fxcompress_readers"  # in the module's __dict__


@dataclass(frozen=True)
class Reader:
    """How a weight is made of the tensors that stand for it."""

    spec: str
    rows: int
    columns: int
    shape: tuple[int, ...]  # of the weight as its module has it
    turned: bool  # it has (columns, rows)
    dtype: torch.dtype

    @classmethod
    def of(cls, part: Part, weight: Tensor) -> Reader:
        """For `weight`, as the original has it. Of a square one no shape tells which way round it was read; what is
        read back is close to it one way only."""
        shape = tuple(weight.shape)
        straight = cls(str(part.recipe), part.rows, part.columns, shape, False, weight.dtype)
        turned = cls(str(part.recipe), part.rows, part.columns, shape, True, weight.dtype)
        if shape == (part.columns, part.rows) and part.rows != part.columns:
            return turned
        if shape != (part.columns, part.rows):
            return straight
        return min(straight, turned, key=lambda reader: float((reader(part.tensors) - weight).detach().norm()))

    @property
    def site(self) -> Site:
        """Sizes alone."""
        return Site("", (), torch.empty(self.rows, self.columns, dtype=self.dtype, device="meta"), ())

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors it reads."""
        return parse(self.spec, REWRITES).names(self.site)

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight, in its shape."""
        site = self.site
        made = parse(self.spec, REWRITES).of(site, {name: tensors[name] for name in self.names})
        matrix = made.read(site)
        return (matrix.t() if self.turned else matrix).reshape(self.shape)


def keep_read_back(module: nn.Module, name: str, part: Part, weight: Tensor) -> None:
    """Put `part`, its tensors as they are, in place of the module's parameter `name`, which was `weight`. Raises
    `PlanError`."""
    if "bias" in part.tensors:
        _take_bias(module, name, part)
    install(module, name, Reader.of(part, weight), part.tensors)


def install(module: nn.Module, name: str, reader: Reader, tensors: Mapping[str, Tensor]) -> None:
    """The same with a reader that is known; on meta, too."""
    del module._parameters[name]
    for key in reader.names:
        tensor = tensors[key]
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(f"{name}_{key}", tensor)
        else:
            module.register_buffer(f"{name}_{key}", tensor)
    base: Any = type(module).original if isinstance(module, ReadsBack) else type(module)
    module.__dict__[READERS] = {**module.__dict__.get(READERS, {}), name: reader}
    module.__class__ = _class_of(base, tuple(module.__dict__[READERS]))


class ReadsBack(nn.Module):
    """A module some of whose parameters are properties."""

    original: ClassVar[type[nn.Module]]  # the class it had

    def read_back(self, name: str) -> Tensor:
        """The weight `name`, made anew, without a gradient."""
        reader = self.readers[name]
        return reader({key: getattr(self, f"{name}_{key}") for key in reader.names}).detach()

    @property
    def readers(self) -> dict[str, Reader]:
        """By the name of the weight."""
        found: dict[str, Reader] = self.__dict__[READERS]
        return found

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What it holds in place of those weights, by name."""
        names = [f"{name}_{key}" for name, reader in self.readers.items() for key in reader.names]
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        own = super().extra_repr()
        kept = ", ".join(f"{name}: {reader.spec}" for name, reader in self.readers.items())
        return f"{own}, {kept}" if own else kept

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for reader in self.readers.values():
            wanted = fn(torch.empty(0, dtype=reader.dtype)).dtype
            if wanted != reader.dtype:
                raise PlanError(
                    f"a {type(self).__name__} cannot be cast from {reader.dtype} to {wanted}: that is what its weight "
                    "is read back in. Cast the original model and compress that."
                )
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restored, (self.original, self.__dict__)


def _restored(base: Any, state: dict[str, Any]) -> nn.Module:
    kind = _class_of(base, tuple(state[READERS]))
    module: nn.Module = kind.__new__(kind)
    module.__dict__.update(state)
    return module


@functools.cache  # one class for all modules of a kind
def _class_of(base: Any, names: tuple[str, ...]) -> Any:
    found: dict[str, Any] = {name: property(functools.partial(ReadsBack.read_back, name=name)) for name in names}
    return types.new_class(
        f"Compressed{base.__name__}", (ReadsBack, base), exec_body=lambda ns: ns.update(found, original=base)
    )


def _take_bias(module: nn.Module, name: str, part: Part) -> None:
    """The bias that absorbs the mean error, where the module's own is named after its weight."""
    bias, place = part.tensors["bias"], name.replace("weight", "bias")
    known = module._parameters.get(place) if place != name else None
    if known is None or known.shape != bias.shape:
        raise PlanError(
            f"{part.recipe} at {part.site} corrects a bias, and {type(module).__name__} has none named after {name}. "
            "Use the compiled graph."
        )
    module.register_parameter(place, nn.Parameter(bias.detach(), requires_grad=False))
