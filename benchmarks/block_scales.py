"""BCT's claim (arXiv 2304.01483): a scale for every small block loses far less than a scale for the whole tensor.

    python benchmarks/block_scales.py

Relative error ||W - W'|| / ||W|| of weights rounded to 8 and 4 bits, symmetric, no data:

    per tensor, row, 64, 32    weights that share a scale
    2^k, float                 what a scale may be
    range                      the scale that just holds the largest of the block, codes to nearest, as BCT has it
    fitted                     scales searched for the least error, quantize{symmetric=True}: 2^bits codes around 0 but
                               none at 0, which shows where a block is one outlier and little else

Weights: 1024 x 1024 of Student's t with 4 degrees of freedom, then those of all-MiniLM-L6-v2, where it is there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tabulate import tabulate
from torch import Tensor

from benchmarks.models import minilm
from benchmarks.models.data import DataMissing
from fxcompress.core.metric import Metric
from fxcompress.passes.quantize import Quantize

BLOCKS = {"tensor": None, "row": 0, "64": 64, "32": 32}  # name: weights of a row that share a scale; None: all of them


def main() -> None:
    """Two tables, one row a matrix and way of choosing scales."""
    for bits in (8, 4):
        heads = ["weight", f"int{bits} scales", *(f"{name} {kind}" for name in BLOCKS for kind in ("2^k", "float"))]
        rows = []
        for name, weight in weights():
            for way, error in (("range", by_range), ("fitted", fitted)):
                errors = [error(weight, bits, block, kind) for block in BLOCKS.values() for kind in (True, False)]
                rows.append([name, way, *("" if e is None else f"{e:.4f}" for e in errors)])
        print(tabulate(rows, headers=heads, disable_numparse=True), end="\n\n")


def weights() -> Iterator[tuple[str, Tensor]]:
    """Name, weight (rows, columns) float32."""
    normal, chi = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    squares = torch.randn(4, 1024, 1024, generator=chi).square().sum(0)
    yield "Student t4", torch.randn(1024, 1024, generator=normal) / (squares / 4).sqrt()
    try:
        model = minilm.model()
    except DataMissing as missing:
        print(f"MiniLM left out: {missing}", file=sys.stderr)
        return
    found = [(n.removesuffix(".weight"), p.detach()) for n, p in model.named_parameters() if p.dim() == 2]
    yield from ((name.replace("encoder.layer.", ""), w) for name, w in found if w.numel() > 2048 and _shown(name))


def by_range(weight: Tensor, bits: int, block: int | None, power_of_two: bool) -> float:
    """Relative error with the scale max |w| / (2^(bits-1) - 1) of each block, or the power of two above it."""
    w = weight.double()
    grouped = w.reshape(1, -1) if block is None else w.reshape(-1, block or w.shape[1])
    most = 2 ** (bits - 1) - 1
    scale = (grouped.abs().amax(1, keepdim=True) / most).clamp_min(1e-30)
    if power_of_two:
        scale = torch.exp2(scale.log2().ceil())
    rounded = (grouped / scale).round().clamp(-most, most) * scale
    return float((rounded - grouped).norm() / grouped.norm())


def fitted(weight: Tensor, bits: int, block: int | None, power_of_two: bool) -> float | None:
    """Relative error of the storage; None where it has no such block."""
    if block is None:
        return None
    storage = Quantize(bits, block, symmetric=True, power_of_two=power_of_two)
    back = storage.decode(storage.encode(weight, Metric()), weight)
    return float((back - weight).double().norm() / weight.double().norm())


def _shown(name: str) -> bool:
    """The table, and the first and the last layer."""
    return "layer" not in name or name.split(".")[2] in "05"


if __name__ == "__main__":
    main()
