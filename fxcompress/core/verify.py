"""The original and the compressed graph on the same batches: the measured loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxcompress.core.calibrate import Call
from fxcompress.core.divergence import Divergence, mask_of, named_outputs
from fxcompress.core.errors import CalibrationError
from fxcompress.core.signature import SignedModule


def compare(original: SignedModule, compressed: SignedModule, calls: Sequence[Call]) -> Divergence:
    """One batch at a time; nothing but the running sums is kept."""
    divergence = Divergence()
    with torch.no_grad():
        for index, (args, kwargs) in enumerate(calls):
            mask = mask_of(kwargs)
            reference = named_outputs(original(*args, **kwargs), mask)
            bad = [name for name, y in reference.items() if not bool(torch.isfinite(y).all())]
            if bad:
                raise CalibrationError(
                    f"the original model's {bad[0]} is NaN or infinite on held-out batch {index}; remove that batch."
                )
            divergence.add(reference, named_outputs(compressed(*args, **kwargs), mask))
    return divergence
