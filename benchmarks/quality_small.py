"""Small trained models: stories260K (Llama), vit_mnist and grokked modular addition. What each was trained for,
before and after.

python benchmarks/quality_small.py
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxcompress
from benchmarks.models import data, grokking, stories, vit_mnist
from fxcompress.core.signature import SignedModule


def main() -> None:
    """One table."""
    rows = [*story_rows(), *digit_rows(), *sum_rows()]
    heads = ["model", "budget", "on disk", "measure", "before", "after", "predicted", "measured", "chosen"]
    print(tabulate(rows, headers=heads,
                   disable_numparse=True))  # fmt: skip


def story_rows() -> list[tuple[str, ...]]:
    """Loss in nats a token on the 281 TinyStories paragraphs, calibrated on later ones."""
    model = stories.model()
    batches = [{"input_ids": ids} for ids in stories.batches(data.tinystories(60_000, 200_000))][:16]
    before = stories.loss(model)
    compiled, size = roundtrip(fxcompress.compile(model, "4x", calibration=batches))
    after = stories.loss(lambda input_ids: compiled(input_ids=input_ids))
    return [("stories260K", "4x", size, "loss, nats", f"{before:.4f}", f"{after:.4f}", *ends(compiled))]


def digit_rows() -> list[tuple[str, ...]]:
    """Accuracy on the 12,000 given MNIST images, calibrated on 128 of them (without labels)."""
    model, (images, labels) = vit_mnist.model(), data.mnist()
    batches = vit_mnist.normalise(images[:128]).split(16)
    before = vit_mnist.accuracy(model, images, labels)
    compiled, size = roundtrip(fxcompress.compile(model, "4x", calibration=list(batches)))
    after = vit_mnist.accuracy(compiled, images, labels)
    return [("vit_mnist", "4x", size, "accuracy", f"{before:.2%}", f"{after:.2%}", *ends(compiled))]


class LastPosition(nn.Module):
    """(a, b, =) -> the logits of the answer, which is all the model was trained to give."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)[:, -1, :113]


def sum_rows() -> list[tuple[str, ...]]:
    """How many of the 12,769 sums are right, for the grokked model and its memorised twin."""
    rows = []
    inputs, targets = grokking.all_sums()
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    batches = list(inputs[order[:4096]].split(512))
    for kind in ("grokked", "memorised"):
        model = LastPosition(grokking.model(kind))
        for budget, rewrites in (("3x", ["low_rank"]), ("4x", None), ("16x", None)):
            try:
                compiled, size = roundtrip(fxcompress.compile(model, budget, calibration=batches, rewrites=rewrites))
            except fxcompress.core.errors.InfeasibleBudgetError as error:
                rows.append(
                    (
                        kind,
                        f"{budget} {'low rank only' if rewrites else ''}",
                        "-",
                        "sums right",
                        "12769",
                        "-",
                        "-",
                        "-",
                        str(error)[:60],
                    )
                )
                continue
            with torch.no_grad():
                right = int((compiled(inputs).argmax(-1) == targets).sum())
            rows.append(
                (
                    kind,
                    f"{budget} {'low rank only' if rewrites else ''}",
                    size,
                    "sums right",
                    "12769",
                    str(right),
                    *ends(compiled),
                )
            )
    return rows


def ends(compiled: SignedModule) -> tuple[str, ...]:
    """Predicted and measured error, and how often each family was chosen."""
    families = Counter("+".join(p.split("{")[0].strip() for p in c.spec.split("|")) for c in compiled.plan.choices)
    chosen = ", ".join(f"{n} {name}" for name, n in families.most_common())
    return f"{compiled.report.predicted_error:.4f}", f"{compiled.report.measured_error:.4f}", chosen


def roundtrip(compiled: SignedModule) -> tuple[SignedModule, str]:
    """Through the disk: what is judged is what was stored."""
    with tempfile.TemporaryDirectory() as folder:
        fxcompress.save(compiled, Path(folder) / "m")
        size = sum(file.stat().st_size for file in (Path(folder) / "m").iterdir())
        loaded = fxcompress.load(Path(folder) / "m")
    return loaded, f"{size / 1e3:.1f} KB ({compiled.report.original_bytes / size:.2f}x)"


if __name__ == "__main__":
    main()
