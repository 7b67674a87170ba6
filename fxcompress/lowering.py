"""lower: a compressed module onto what runs fast here. On a CPU: packed weights, libraries' products, Inductor.

    compiled = fxcompress.load("my-bert-4x")
    fast = fxcompress.lower(compiled, to="inductor")     # the same call, the same outputs within rounding

The compressed module stays as it is, and is what can be saved; a lowered one fits the machine that made it.
"""

from __future__ import annotations

from typing import Any, get_args

import torch

from fxcompress.codegen.cpu.lower import lower_graph, lower_pointwise
from fxcompress.codegen.cpu.module import LoweredModule, Target
from fxcompress.core.errors import LoweringError
from fxcompress.core.signature import SignedModule
from fxcompress.cost_model.device import DeviceProfile
from fxcompress.passes.fuse import fuse
from fxcompress.profiling import cached


def lower(
    compiled: SignedModule, to: Target = "inductor", *, profile: DeviceProfile | None = None
) -> LoweredModule:
    """`compiled` (of `compile`, `restructure` or `load`) with each product on a kernel of this CPU; for inference.

    to: "eager" runs it node after node; "inductor" compiles what is between the products too, at the first call.

    profile: what chooses between kernels where there are several (`fxcompress.profile`); by default the one that was
        kept for this machine and number of threads, if any. Nothing is measured here.

    Compressed weights are multiplied in int8 by inputs rounded to 8 bits a token, kept ones in bf16, where the
    processor has instructions for it; with a profile some compressed ones for few tokens by inputs in bf16. Raises
    `LoweringError`, and `ProfileError` for a profile of another machine.
    """
    check_target(to)
    if isinstance(compiled, LoweredModule):
        raise LoweringError("this module is lowered already; lower the compiled one it was made from again.")
    if not isinstance(compiled, SignedModule):
        raise LoweringError(
            f"lower takes what fxcompress.compile, restructure or load returned, not a {type(compiled).__name__}."
        )
    if elsewhere := {t.device.type for t in (*compiled.parameters(), *compiled.buffers())} - {"cpu"}:
        raise LoweringError(
            f"the module is on {', '.join(sorted(elsewhere))}, and only CPUs are lowered to; move it with .cpu() first."
        )
    if profile is None:
        profile = cached()
    else:
        profile.check_here()
    with torch.no_grad():
        lowered = lower_graph(fuse(compiled), profile, to)
        return LoweredModule(lower_pointwise(lowered) if to == "inductor" else lowered, to)


def check_target(to: Any) -> None:
    """Raises `LoweringError` for what nothing can be lowered to."""
    if to not in get_args(Target):
        known = " or ".join(f'"{name}"' for name in get_args(Target))
        raise LoweringError(f"cannot lower to {to!r}: it is {known}.")
