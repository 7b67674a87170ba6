"""8-bit floats in words (fxcompress::dequantize_float8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fxcompress.codegen.triton.loaders.base import WordLoader
from fxcompress.codegen.triton.words import Words


@dataclass(frozen=True)
class Float8(WordLoader):
    """e4m3 numbers in words of four; one scale a row."""

    width: int = 16

    @property
    def label(self) -> str:
        return "float8"

    @property
    def words(self) -> Words:
        return Words(8, self.width)

    @property
    def pointers(self) -> dict[str, str]:
        return {"words": "i32", "scales": "fp32"}

    @property
    def constants(self) -> int:
        return 2

    def prepare(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        codes, scales = tensors
        return self.words.pack(codes), scales.float().flatten().contiguous()

    def tile(self, prefix: str, plane: int) -> str:
        return f"parts.word_e4m3({prefix}word, {plane}, FLOAT)"

    def once(self, prefix: str) -> list[str]:
        return [f"{prefix}scale = tl.load({prefix}scales + rn, mask=n_in, other=0.0)"]

    def scaled(self, prefix: str, product: str, total: str) -> str:
        return f"{product} * {prefix}scale[:, None]"
