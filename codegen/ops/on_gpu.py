"""Lookups on a GPU: generated kernels (fxcompress.codegen.triton.gather), imported at the first call.

Without Triton, on a card that is too old, or for what has no kernel, the op's body serves there too, after one warning.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def register(op: Any) -> None:
    """Give a lookup op the kernel of the same name."""

    def run(ids: Tensor, *args: Any) -> Tensor:
        from fxcompress.codegen.triton import gather
        from fxcompress.codegen.triton.card import card_of
        from fxcompress.codegen.triton.launch import attempt

        with torch.cuda.device(ids.device):
            made: Tensor = attempt(
                lambda: getattr(gather, op._name)(ids, *args),
                lambda: op._init_fn(ids, *args),
                card_of(ids.device),
                op._name,
            )
        return made

    op.register_kernel("cuda")(run)
