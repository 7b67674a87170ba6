"""How far a model's output is from the original's: one number that adds up over sites and batches.

    outputs called logits    KL(p || q), nats a prediction, p = softmax of the original: they are the model's answer,
                             and others are left out
    any other                ||y - y'||^2 / ||y||^2, the mean over all floating outputs

Both are of second order in the change of the weights, so small errors of sites add (notes: measured additive within
1-5 %). The sum is called `loss`; what people read is `error`: nats of KL, or the root of the relative squares,
||y - y'|| / ||y||. Positions an attention_mask excludes are left out wherever an output (or input) begins with its two
dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor
from torch.utils import _pytree as pytree

Kind = Literal["relative", "kl"]


@dataclass
class Divergence:
    """A running comparison; `add` each batch, then read `loss` and `error`."""

    kind: Kind = "relative"
    numerators: dict[str, float] = field(default_factory=dict)
    denominators: dict[str, float] = field(default_factory=dict)

    def add(self, reference: Mapping[str, Tensor], output: Mapping[str, Tensor]) -> None:
        """One batch, as `named_outputs` gives it."""
        self.kind = kind_of(reference)
        for name, y in reference.items():
            if self.kind == "kl":
                log_p, log_q = (t.double().log_softmax(-1) for t in (y, output[name]))
                top, bottom = float((log_p.exp() * (log_p - log_q)).sum()), float(y.numel() // y.shape[-1])
            else:
                top, bottom = (
                    float((y.double() - output[name].double()).square().sum()),
                    float(y.double().square().sum()),
                )
            self.numerators[name] = self.numerators.get(name, 0.0) + top
            self.denominators[name] = self.denominators.get(name, 0.0) + bottom

    @property
    def loss(self) -> float:
        """Squared relative error, or nats."""
        ratios = [
            top / self.denominators[name] if self.denominators[name] else float(top > 0)
            for name, top in self.numerators.items()
        ]
        return max(0.0, sum(ratios) / len(ratios)) if ratios else 0.0

    @property
    def error(self) -> float:
        return readable(self.loss, self.kind)


def readable(loss: float, kind: Kind) -> float:
    """loss -> error."""
    return loss if kind == "kl" else math.sqrt(max(0.0, loss))


def additive(error: float, kind: Kind) -> float:
    """error -> loss."""
    return error if kind == "kl" else error * error


def named_outputs(output: Any, mask: Tensor | None) -> dict[str, Tensor]:
    """The floating outputs that count, by name, masked positions removed: (…, features)."""
    leaves = {}
    for path, leaf in pytree.tree_leaves_with_path(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel():
            leaves[pytree.keystr(path).strip("[].'\"") or "output"] = leaf
    answers = {name: t for name, t in leaves.items() if name == "logits" and t.shape[-1] > 1}
    return {name: unmasked(t, mask) for name, t in (answers or leaves).items()}


def kind_of(outputs: Mapping[str, Tensor]) -> Kind:
    return "kl" if set(outputs) == {"logits"} and outputs["logits"].shape[-1] > 1 else "relative"


def unmasked(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """tensor (batch, sequence, …) or (batch * sequence, …) without the positions where mask (batch, sequence) is 0."""
    if mask is None or mask.dim() != 2:
        return tensor
    if tensor.dim() >= 2 and tensor.shape[:2] == mask.shape:
        return tensor[mask.bool()]
    if tensor.dim() == 2 and tensor.shape[0] == mask.numel():
        return tensor[mask.bool().reshape(-1)]
    return tensor


def mask_of(kwargs: Mapping[str, Any]) -> Tensor | None:
    """The batch's attention_mask, if it has one of shape (batch, sequence)."""
    mask = kwargs.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
