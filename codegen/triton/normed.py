"""One product of a norm of x, for few tokens (the mathematics: fxcompress.codegen.triton.norm).

    rms_norm(x, normalized_shape=[4096], weight=..., eps=1e-05) | linear(_, dequantize(...)) | silu(_)

The product's own loop, with a prologue: every tile of x is multiplied by g on its way, and its squares are added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxcompress.codegen.ops.fused import evaluate
from fxcompress.codegen.spec import Argument, Call, Input, Spec, given
from fxcompress.codegen.triton.gemm import Product, Prologue, gemm, store
from fxcompress.codegen.triton.kernel import Compute, Config
from fxcompress.codegen.triton.loaders.base import Loader
from fxcompress.codegen.triton.norm import Norm
from fxcompress.codegen.triton.unpack import FINISH, UNPACK, finish, unpack

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


@dataclass(frozen=True)
class NormedProduct(Product):
    """One weight behind a norm; `before_it` are the steps of the norm."""

    before_it: tuple[Call, ...] = ()

    @property
    def norm(self) -> Gain:
        gain = self.loaders[0][1]
        assert isinstance(gain, Gain)
        return gain

    @property
    def forms(self) -> dict[str, str]:
        loader, epilogue, outputs = self.loaders[-1][1], self.epilogue, self.own_outputs
        prologue = prologue_of(self.norm.norm, self.dtype)
        return {
            "fused_linear": gemm("fused_linear", loader, epilogue, outputs, False, prologue),
            "fused_linear_split": gemm("fused_linear_split", loader, epilogue, outputs, True, prologue),
        }

    def workspace(self, x: Tensor, config: Config) -> dict[str, Tensor]:
        made = super().workspace(x, config)
        if not made:
            return made
        across, _, _ = self.grid(len(x), config)
        names = prologue_of(self.norm.norm, self.dtype).sums
        sums = {f"partial_{s}": x.new_empty(config.split, across, len(x), dtype=torch.float32) for s in names}
        return {"partials": made["partials"], **sums, "arrived": made["arrived"]}

    def prepare(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        norm, taken = self.norm.norm, self.norm.constants
        own, rest = list(tensors[:taken]), tensors[taken:]
        loader = self.loaders[-1][1]
        gain = own.pop(0).float() if norm.weight else None
        vectors = {"gain": gain}
        if norm.layer:
            vectors["sums"] = self._times(torch.ones(self.columns) if gain is None else gain, rest[: loader.constants])
        if norm.bias:
            vectors["shift"] = self._times(own.pop(0).float(), rest[: loader.constants])
        made = [v.contiguous() for name in self.norm.pointers if (v := vectors[name]) is not None]
        return (*made, *loader.prepare(rest[: loader.constants]), *(t.contiguous() for t in rest[loader.constants :]))

    def _times(self, vector: Tensor, weight: Sequence[Tensor]) -> Tensor:
        """W v (N,), in float32, of the weight as it is kept."""
        product = Spec((Call("linear", (Input(), _exact(given(self.product)["weight"]))),), (0,))
        tensors = [t.float() if t.is_floating_point() else t for t in weight]
        wide = Spec(tuple(map(_widened, product.steps)), (0,))
        return evaluate(wide, vector.to(weight[0].device)[None], tensors, [])[0][0]

    def apart(
        self, x: Tensor, prepared: Sequence[Tensor], tensors: Sequence[Tensor], extras: Sequence[Tensor],
        dtypes: Sequence[torch.dtype], compute: Compute,
    ) -> list[Tensor]:  # fmt: skip
        """The norm, then the product."""
        taken = self.norm.constants
        first = Spec(self.before_it, (len(self.before_it) - 1,))
        (normed,) = compute(first, x, tensors[:taken], [], [x.dtype])
        return compute(self.rest, normed, tensors[taken:], extras, dtypes)
