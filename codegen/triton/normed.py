"""One product of a norm of x, for few tokens (the mathematics: fxcompress.codegen.triton.norm).

    rms_norm(x, normalized_shape=[4096], weight=..., eps=1e-05) | linear(_, dequantize(...)) | silu(_)

The product's own loop, with a prologue: every tile of x is multiplied by g on its way, and its squares are added up.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.codegen.ops.fused import evaluate
from fxcompress.codegen.spec import Argument, Call, Constant, Input, Spec, behind, given
from fxcompress.codegen.triton.gemm import Product, Prologue, gemm
from fxcompress.codegen.triton.kernel import Compute, Config
from fxcompress.codegen.triton.loaders.base import Loader
from fxcompress.codegen.triton.norm import Norm

PREFIX = "n_"


def prologue_of(norm: Norm, dtype: torch.dtype) -> Prologue:
    """Lines of the kernel; gain is g, n_sums and n_shift are c and d."""
    eps = norm.epsilon(dtype)
    arguments = [PREFIX + name for name in pointers_of(norm)]
    start, tile = ["squares = tl.zeros((BLOCK_M,), tl.float32)"], ["wide = x_tile.to(tl.float32)"]
    tile.append("squares += tl.sum(wide * wide, 0)")
    if norm.layer:
        start.append("totals = tl.zeros((BLOCK_M,), tl.float32)")
        tile.append("totals += tl.sum(wide, 0)")
    if norm.weight:
        tile.append(f"gain = tl.load({PREFIX}gain + column, mask=column < K, other=0.0).to(tl.float32)")
        tile.append("x_tile = (wide * gain[:, None]).to(FLOAT)")
    if norm.layer:
        ends = [
            "mean = totals / K",
            f"scale = tl.rsqrt(tl.maximum(squares / K - mean * mean, 0.0) + {eps!r})",
            f"acc = acc - tl.load({PREFIX}sums + rn, mask=n_in, other=0.0)[:, None] * mean[None, :]",
        ]
    else:
        ends = [f"scale = tl.rsqrt(squares / K + {eps!r})"]
    ends.append("acc = acc * scale[None, :]")
    if norm.bias:
        ends.append(f"acc = acc + tl.load({PREFIX}shift + rn, mask=n_in, other=0.0)[:, None]")
    sums = ("squares", "totals") if norm.layer else ("squares",)
    return Prologue(tuple(arguments), tuple(start), tuple(tile), sums, tuple(ends))


def pointers_of(norm: Norm) -> dict[str, str]:
    """What `prepare` makes of the norm: all float32."""
    names = {"gain": norm.weight, "sums": norm.layer, "shift": norm.bias}
    return {name: "fp32" for name, there in names.items() if there}


@dataclass(frozen=True)
class Gain(Loader):
    """The norm's constants, in the place where a kernel looks for those of its weights."""

    norm: Norm

    @property
    def label(self) -> str:
        return "layer norm" if self.norm.layer else "rms norm"

    @property
    def plane(self) -> int:
        return self.columns

    @property
    def planes(self) -> int:
        return 1

    @property
    def pointers(self) -> dict[str, str]:
        return pointers_of(self.norm)

    @property
    def constants(self) -> int:
        return self.norm.weight + self.norm.bias

    def prepare(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        raise NotImplementedError("c and d are made of the weight as well: NormedProduct.prepare")

    def load(self, prefix: str) -> list[str]:
        return []

    def tile(self, prefix: str, plane: int) -> str:
        raise NotImplementedError("the norm is no weight")


class NormedProduct(Product):
    """One weight behind a norm."""

    @property
    def gain(self) -> Gain:
        gain = self.loaders[0][1]
        assert isinstance(gain, Gain)
        return gain

    @functools.cached_property
    def forms(self) -> dict[str, str]:
        prologue = prologue_of(self.gain.norm, self.dtype)
        names = {False: "fused_linear", True: "fused_linear_split"}
        loader, outputs = self.loaders[-1][1], self.stored
        return {name: gemm(name, loader, self.epilogue, outputs, split, prologue) for split, name in names.items()}

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.columns

    def workspace(self, x: Tensor, config: Config) -> dict[str, Tensor]:
        made = super().workspace(x, config)
        if not made:
            return made
        across, _, split = self.grid(len(x), config)
        names = prologue_of(self.gain.norm, self.dtype).sums
        sums = {f"partial_{s}": x.new_empty(split, across, len(x), dtype=torch.float32) for s in names}
        return {"partials": made["partials"], **sums, "arrived": made["arrived"]}

    def prepare(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        norm, loader, taken = self.gain.norm, self.loaders[-1][1], self.gain.constants
        own, rest = [t.float() for t in tensors[:taken]], tensors[taken:]
        made: list[Tensor] = own[:1] if norm.weight else []
        if norm.layer:
            made.append(self._times(own[0] if norm.weight else torch.ones(self.columns, device=rest[0].device), rest))
        if norm.bias:
            made.append(self._times(own[-1], rest))
        kept = loader.prepare(rest[: loader.constants])
        return (*(t.contiguous() for t in made), *kept, *(t.contiguous() for t in rest[loader.constants :]))

    def _times(self, vector: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """W v (N,) in float32, W unpacked in float32 too."""
        weight = given(self.product)["weight"]
        call = Call("linear", (Input(), _widened(weight)))
        own = [t.float() if t.is_floating_point() else t for t in tensors[: self.loaders[-1][1].constants]]
        return evaluate(Spec((call,), (0,)), vector[None], own, [])[0][0]

    def apart(
        self, x: Tensor, prepared: Sequence[Tensor], tensors: Sequence[Tensor], extras: Sequence[Tensor],
        dtypes: Sequence[torch.dtype], compute: Compute,
    ) -> list[Tensor]:  # fmt: skip
        """The norm, then the product."""
        at, taken = self.first, self.gain.constants
        norm = Spec(self.spec.steps[:at], (at - 1,))
        (normed,) = compute(norm, x, tensors[:taken], [], [x.dtype])
        return compute(behind(self.spec, at), normed, tensors[taken:], extras, dtypes)


def _widened(weight: Argument) -> Argument:
    """The same weight in float32."""
    match weight:
        case Constant(dtype, shape):
            return Constant(torch.float32 if dtype.is_floating_point else dtype, shape)
        case Call(name, args, named):
            wide = ((k, torch.float32 if isinstance(v, torch.dtype) else v) for k, v in named)
            return Call(name, tuple(map(_widened, args)), tuple(wide))
    return weight
