"""What the user asks for: a size, an error, a number of flops, or several of them.

    "4x"      a quarter of the original          "25%" or 0.25   the same
    "12 MB"   12 * 10^6 bytes on disk            Budget(size="4x", error=0.05, flops="2x")

Size means every byte `save` writes. With a size (or flops) the plan minimises the model's error under it; with an error
alone it minimises size, and the promise is checked on held-out batches. Error is the relative output error, or nats of
KL where the model's output is called logits (fxcompress.core.divergence).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fxcompress.core.errors import BudgetError
from fxcompress.core.units import format_bytes, parse_quantity

HOW = 'write a ratio "4x", a share "25%" or 0.25, or bytes "12 MB"'


@dataclass(frozen=True)
class Budget:
    """Upper bounds; None means free.

    size, flops: `"4x"`, `"25%"`, 0.25 of the original; size also in bytes, `"12 MB"`.
    error: of the model's output, > 0.
    min_gain: a rewrite must save at least this share of its site's bytes, or the site is kept.
    """

    size: str | float | None = None
    error: float | None = None
    flops: str | float | None = None
    min_gain: float = 0.02

    def __post_init__(self) -> None:
        if self.size is None and self.error is None and self.flops is None:
            raise BudgetError(f"Budget() bounds nothing: give size, error or flops; for size {HOW}.")
        self.size_bytes(1 << 40)
        if self.flops is not None and _share("flops", self.flops)[1] == "bytes":
            raise BudgetError(f"Budget flops={self.flops!r} is in bytes; write a ratio \"2x\" or a share \"50%\".")
        if self.error is not None and (
            isinstance(self.error, bool) or not isinstance(self.error, int | float) or not 0 < self.error < math.inf
        ):
            raise BudgetError(f"Budget error={self.error!r} is no bound; write a number above 0, such as error=0.05.")
        if not 0 <= self.min_gain < 1:
            raise BudgetError(
                f"Budget min_gain={self.min_gain!r} must lie in [0, 1): the share of bytes a rewrite must save."
            )

    @classmethod
    def parse(cls, budget: Budget | str | float) -> Budget:
        """A `Budget`, or one made of a bare size."""
        return budget if isinstance(budget, Budget) else cls(size=budget)

    def size_bytes(self, original_bytes: int) -> float | None:
        """The bound in bytes for a model of `original_bytes`."""
        if self.size is None:
            return None
        value, unit = _share("size", self.size)
        return value if unit == "bytes" else value * original_bytes

    def flops_share(self) -> float | None:
        """The bound as a share of the original's flops."""
        return None if self.flops is None else _share("flops", self.flops)[0]

    def __str__(self) -> str:
        parts = []
        if self.size is not None:
            value, unit = _share("size", self.size)
            parts.append(f"size <= {format_bytes(value)}" if unit == "bytes" else f"size <= {_text(self.size)}")
        if self.error is not None:
            parts.append(f"error <= {self.error:g}")
        if self.flops is not None:
            parts.append(f"flops <= {_text(self.flops)}")
        return ", ".join(parts)


def _text(value: str | float) -> str:
    return value.strip() if isinstance(value, str) else f"{value:.4g}"


def _share(what: str, value: str | float) -> tuple[float, str]:
    """-> (share of the original in (0, 1], "") or (bytes, "bytes")."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BudgetError(f"Budget {what}={value!r} is a {type(value).__name__}; {HOW}.")
    parsed = (float(value), "") if not isinstance(value, str) else parse_quantity(value)
    if parsed is None:
        raise BudgetError(f"Budget {what}={value!r} is not understood; {HOW}.")
    number, unit = parsed
    if not 0 < number < math.inf:
        raise BudgetError(f"Budget {what}={value!r} must be above 0; {HOW}.")
    if unit == "bytes":
        return number, "bytes"
    share = {"x": 1 / number, "%": number / 100, "": number}[unit]
    if share > 1:
        asked = f"{number:g}x would make the model larger" if unit == "x" else f"it is {share:g} times the original"
        raise BudgetError(f"Budget {what}={value!r}: {asked}; {HOW}. \"1x\" keeps the model as it is.")
    return share, ""
