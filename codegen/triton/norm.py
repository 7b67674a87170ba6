"""A norm of x done inside the product that reads it, for few tokens: one launch less, and x is read once.

    rms      y = W (g x / r)                        r^2 = mean x^2 + eps
    layer    y = W (g (x - m) / r + b)              m = mean x,  r^2 = mean x^2 - m^2 + eps

The product is linear, so what divides a whole token may wait: the main loop multiplies W by g x, adds up x and x^2 on
the way, and the accumulator is put right once, with c = W g and d = W b made when the graph is lowered:

    rms      y = acc / r                            layer    y = (acc - m c) / r + d

g x is rounded to the type of x as the norm's result is in the op's body; for a layer norm that is a rounding of x where
the body rounds x - m, so a mean many times the deviation costs precision that the body keeps. (Norms stand behind
residual sums, whose means are small.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fxcompress.codegen.spec import Argument, Call, Constant, Input, Value, given


@dataclass(frozen=True)
class Norm:
    """layer or rms; eps None is that of the dtype; which constants follow: g, b."""

    layer: bool
    eps: float | None
    weight: bool
    bias: bool

    def epsilon(self, dtype: torch.dtype) -> float:
        """torch computes norms of 16 bits in float32, and takes the eps of that."""
        return torch.finfo(torch.promote_types(dtype, torch.float32)).eps if self.eps is None else self.eps


def norm_of(steps: Sequence[Call]) -> Norm | None:
    """The norm that `steps` on x are, or None: a call of one, or an RMSNorm written out."""
    if len(steps) > 1:
        return _written_out(steps)
    (call,) = steps
    named = given(call)
    eps = named.get("eps", 1e-5 if call.name == "layer_norm" else None)
    if call.name not in ("layer_norm", "rms_norm") or not isinstance(eps, float | None):
        return None
    return Norm(call.name == "layer_norm", eps, *(isinstance(named.get(n), Constant) for n in ("weight", "bias")))


def _written_out(steps: Sequence[Call]) -> Norm | None:
    """x | pow 2 | mean | + eps | rsqrt | times x | times g, with casts to the type there is or to float32 between."""
    calls: list[Call] = []
    alias: dict[Argument, Argument] = {}

    def seen(argument: Argument) -> Argument:
        return alias.get(argument, argument) if isinstance(argument, Value | Input) else argument

    for at, call in enumerate(steps):
        args = tuple(seen(a) for a in call.args)
        if call.name == "to":
            alias[Value(at)] = args[0]
            continue
        alias[Value(at)] = Value(len(calls))
        calls.append(Call(call.name, args, call.named))
    match calls:
        case [
            Call("pow", (Input(),), (("exponent", 2 | 2.0),)),
            Call("mean", (Value(0),), _),
            Call("add", (Value(1), float(eps)), ()),
            Call("rsqrt", (Value(2),), ()),
            Call("mul", (Input(), Value(3)) | (Value(3), Input()), ()),
            *rest,
        ]:
            match rest:
                case []:
                    return Norm(False, eps, False, False)
                case [Call("mul", (Constant(), Value(4)) | (Value(4), Constant()), ())]:
                    return Norm(False, eps, True, False)
    return None
