"""What the user asks for: a size, an error, a number of flops, a latency, or several of them.

    "4x"      a quarter of the original          "25%" or 0.25   the same
    "12 MB"   12 * 10^6 bytes on disk            Budget(size="4x", error=0.05, flops="2x")
    "12 ms"   a call of the lowered model        Budget(size="4x", latency="2x")    Budget(size="4x", latency="min")

Size means every byte `save` writes. With a size, flops or a latency the plan minimises the model's error under it; with
an error alone it minimises size, and the promise is checked on held-out batches. Error is the relative output error, or
nats of KL where the model's output is called logits (fxcompress.core.divergence).

Latency is what one call of `fxcompress.lower(compiled)` takes on this CPU with the current number of threads, predicted
from its measured profile; of several workloads, the mean weighted by how often each is called. "min" asks for the
fastest plan within the other bounds: within the error that was given, or else within MORE_ERROR of the least error that
the other bounds allow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fxcompress.core.errors import BudgetError
from fxcompress.core.units import format_bytes, parse_quantity

MORE_ERROR = 0.1  # predictions of errors are hardly better than that
MIN = "min"
HOW_FAST = 'write a ratio "2x", a share "50%" or 0.5, seconds "12 ms", or "min"'
HOW = 'write a ratio "4x", a share "25%" or 0.25, or bytes "12 MB"'


@dataclass(frozen=True)
class Budget:
    """Upper bounds; None means free.

    size, flops: `"4x"`, `"25%"`, 0.25 of the original; size also in bytes, `"12 MB"`.
    error: of the model's output, > 0.
    latency: `"2x"`, `"50%"`, 0.5 of the original's, `"12 ms"`, or `"min"` beside another bound.
    min_gain: a rewrite must save at least this share of its site's bytes, or the site is kept.
    """

    size: str | float | None = None
    error: float | None = None
    flops: str | float | None = None
    min_gain: float = 0.02
    latency: str | float | None = None

    def __post_init__(self) -> None:
        if self.size is None and self.error is None and self.flops is None and self.latency is None:
            raise BudgetError(f"Budget() bounds nothing: give size, error, flops or latency; for size {HOW}.")
        self.size_bytes(1 << 40)
        self.latency_seconds(1.0)
        if self.fastest and self.size is None and self.error is None and self.flops is None:
            raise BudgetError(
                'Budget latency="min" alone has no bound on what may be lost: give size, error or flops as well, such '
                'as Budget(size="4x", latency="min").'
            )
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

    @property
    def as_it_is(self) -> bool:
        """True for "1x" alone: nothing is to be changed."""
        return self.size_bytes(100) == 100 and self.error is self.flops is self.latency is None

    @property
    def fastest(self) -> bool:
        """True where the least latency is asked for, not a bound on it."""
        return isinstance(self.latency, str) and self.latency.strip().lower() == MIN

    def latency_seconds(self, original_seconds: float) -> float | None:
        """The bound on a call for a model that takes `original_seconds`; None where there is none, as for "min"."""
        if self.latency is None or self.fastest:
            return None
        if isinstance(self.latency, str) and (parsed := parse_quantity(self.latency)) and parsed[1] == "seconds":
            if not 0 < parsed[0] < math.inf:
                raise BudgetError(f"Budget latency={self.latency!r} must be above 0; {HOW_FAST}.")
            return parsed[0]
        value, unit = _share("latency", self.latency, HOW_FAST, "slower")
        if unit == "bytes":
            raise BudgetError(f"Budget latency={self.latency!r} is in bytes; {HOW_FAST}.")
        return value * original_seconds

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
        if self.fastest:
            parts.append("the least latency")
        elif self.latency is not None:
            parts.append(f"latency <= {_text(self.latency)}")
        return ", ".join(parts)


def _text(value: str | float) -> str:
    return value.strip() if isinstance(value, str) else f"{value:.4g}"


def _share(what: str, value: str | float, how: str = HOW, worse: str = "larger") -> tuple[float, str]:
    """-> (share of the original in (0, 1], "") or (bytes, "bytes")."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BudgetError(f"Budget {what}={value!r} is a {type(value).__name__}; {how}.")
    parsed = (float(value), "") if not isinstance(value, str) else parse_quantity(value)
    if parsed is None or parsed[1] == "seconds":
        raise BudgetError(f"Budget {what}={value!r} is not understood; {how}.")
    number, unit = parsed
    if not 0 < number < math.inf:
        raise BudgetError(f"Budget {what}={value!r} must be above 0; {how}.")
    if unit == "bytes":
        return number, "bytes"
    share = {"x": 1 / number, "%": number / 100, "": number}[unit]
    if share > 1:
        asked = f"{number:g}x would make the model {worse}" if unit == "x" else f"it is {share:g} times the original"
        raise BudgetError(f"Budget {what}={value!r}: {asked}; {how}. \"1x\" keeps the model as it is.")
    return share, ""
