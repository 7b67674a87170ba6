"""all-MiniLM-L6-v2: size against quality for each family of rewrites alone and for the mix of all of them.

    python benchmarks/pareto_minilm.py [--families low_rank monarch ...] [--ratios 2 4 ...] [--out FOLDER/NAME]

Writes OUT.csv (one row a family and budget: bytes on disk, predicted and measured error, STS-B dev, mean cosine) and
OUT.png. Then holds the predicted errors of the mix against those of every family at a grid of equal sizes, and ends
with status 1 if the mix is anywhere worse: more to choose from must never lose. Sizes at which a family predicts an
error above that of the output itself are left out. Calibration: 128 lines of SST-2 dev.
"""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from benchmarks._rivals import at_equal_sizes
from benchmarks.models import data, minilm
from fxcompress.api import observe, price, resolve, untouched
from fxcompress.carrying_out import carry_out
from fxcompress.checkpoint import bytes_on_disk
from fxcompress.core.budget import Budget
from fxcompress.core.calibrate import Calibration
from fxcompress.core.errors import InfeasibleBudgetError
from fxcompress.core.plan import Plan
from fxcompress.core.signature import SignedModule
from fxcompress.cost_model.select import NEXT_TO_NOTHING, choose
from fxcompress.passes import REWRITES

MIX = "all families"
FAMILIES = ["quantize", "low_rank", "block_low_rank", "monarch", "tensor_train", "prune", "prune_2_4", "float8"]
GRID = [1.25 * 1.1**i for i in range(28)]  # 1.25x to 16x
TOLERANCE = NEXT_TO_NOTHING["loss"]  # what one rewrite for Q, K and V may cost a plan


@dataclass(frozen=True)
class Point:
    """One family at one budget, carried out."""

    family: str
    budget: str
    bytes: int
    predicted_error: float
    measured_error: float
    spearman: float
    cosine: float


def main() -> None:
    options = arguments()
    plans, original, known = priced(options.families)
    points = []
    dense, reference = minilm.spearman(minilm.model())
    for family, plan in plans.items():
        for ratio in tqdm(options.ratios, family, leave=False):
            try:
                chosen = choose(plan, Budget(size=f"{ratio}x"))
            except InfeasibleBudgetError:
                continue
            points.append(measured(family, f"{ratio}x", original, known, chosen, reference))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write(points, options.out.with_suffix(".csv"))
    draw(points, dense, plans[MIX].original_bytes, options.out.with_suffix(".png"))
    print(f"uncompressed STS-B dev {dense:.4f}\n")
    print(tabulate([(p.family, p.budget, f"{p.bytes / 1e6:.2f} MB", f"{p.predicted_error:.4f}",
                     f"{p.measured_error:.4f}", f"{p.spearman:.4f}", f"{p.cosine:.4f}") for p in points],
                   headers=["family", "budget", "on disk", "predicted error", "measured", "STS-B dev", "mean cosine"],
                   disable_numparse=True))  # fmt: skip
    worse = [line for family, plan in plans.items() if family != MIX for line in losses(plans[MIX], family, plan)]
    print("\n" + ("\n".join(worse) or "the mix is at every size at least as good as each family alone (predicted)"))
    sys.exit(bool(worse))


def priced(families: list[str]) -> tuple[dict[str, Plan], object, object]:
    """-> (a plan with every candidate, for each family and for all), captured model, calibration."""
    lines = [text for text, _ in data.sst2("dev")][:128]
    anything = Budget(error=1e6)  # prices every candidate, and is met by all of them
    with untouched():
        original, known = observe(minilm.model(), None, minilm.batches(lines), True)
        plans = {MIX: price(original, REWRITES, known, anything, True)}
        for rewrite in resolve(families):
            alone = price(original, (rewrite,), known, anything, True, named=True)
            if any(c.spec != "keep" for c in alone.candidates):
                plans[rewrite.name] = alone
    return plans, original, known


def measured(
    family: str, budget: str, original: SignedModule, known: Calibration, plan: Plan, reference: Tensor
) -> Point:
    """Carry the plan out and judge it."""
    compiled = carry_out(original, known, plan, None)
    score, embeddings = minilm.spearman(compiled)
    return Point(
        family, budget, bytes_on_disk(compiled), plan.predicted_error, compiled.report.measured_error, score,
        minilm.mean_cosine(embeddings, reference),
    )  # fmt: skip


def losses(mix: Plan, family: str, alone: Plan) -> list[str]:
    """Sizes at which the mix's prediction is worse than the family's."""
    return [
        f"at {ratio:.2f}x {family} alone predicts loss {theirs:.4g}, the mix {ours:.4g}"
        for ratio, ours, theirs in at_equal_sizes(mix, alone, GRID)
        if ours > theirs * (1 + TOLERANCE)
    ]


def write(points: list[Point], path: Path) -> None:
    """One row a point."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(Point.__dataclass_fields__)
        for p in points:
            figures = (p.predicted_error, p.measured_error, p.spearman, p.cosine)
            rows.writerow([p.family, p.budget, p.bytes, *(f"{value:.6f}" for value in figures)])


def draw(points: list[Point], dense: float, original_bytes: int, path: Path) -> None:
    """Both qualities against size; the mix on top."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    families = [MIX, *sorted({p.family for p in points} - {MIX})]
    labels = {"spearman": "Spearman, STS-B dev", "cosine": "1 - mean cosine to the original (log)"}
    for axis, (quality, label) in zip(axes, labels.items()):
        for i, family in enumerate(families):
            mine = sorted((p for p in points if p.family == family), key=lambda p: p.bytes)
            values = [getattr(p, quality) for p in mine]
            shown = [max(1 - v, 1e-6) for v in values] if quality == "cosine" else values  # the CSV has six digits
            style = {"color": "black", "linewidth": 2.2, "zorder": 9} if family == MIX else {"color": f"C{i - 1}"}
            axis.plot([original_bytes / p.bytes for p in mine], shown, marker="o", markersize=4, label=family, **style)
        axis.set(xlabel="times smaller on disk", ylabel=label, xscale="log")
        axis.set_xticks(ticks := [1, 2, 3, 4, 6, 8, 12], [f"{t}x" for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    axes[1].invert_yaxis()  # up is better on both sides
    axes[0].axhline(dense, color="grey", linewidth=0.8, linestyle="--")
    axes[0].legend(fontsize=8, loc="lower left")
    figure.suptitle("all-MiniLM-L6-v2: one family alone, and the choice among all")
    figure.savefig(path, dpi=120)


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=FAMILIES, help="alone, beside the mix of all")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.5, 2, 3, 4, 6, 8, 10, 12])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pareto_minilm"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
