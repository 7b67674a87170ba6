"""all-MiniLM-L6-v2 at 4x, 7.988x, 10x and 12x: STS-B dev, embedding cosine, bytes on disk, predicted beside measured
error.

    python benchmarks/quality_minilm.py [--examples 128] [--uniform]

Calibration: the first lines of SST-2 dev (another domain than STS-B). `measured` is on 128 SST-2 train sentences
no plan has seen. --uniform adds the best single setting for all sites at each budget (the same rounding, no choice
per site), for comparison.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tabulate import tabulate
from torch import Tensor

import fxcompress
from benchmarks.models import data, minilm
from fxcompress.api import observe
from fxcompress.carrying_out import carry_out
from fxcompress.core.calibrate import Calibration, Call, bind_batch
from fxcompress.core.plan import Plan
from fxcompress.core.signature import SignedModule
from fxcompress.core.verify import compare

BARS = {"4x": (0.001, 0.999), "7.988x": (0.002, 0.982), "10x": (0.005, 0.950), "12x": (0.008, 0.870)}


def main() -> None:
    """Print one row a budget."""
    options = arguments()
    model = minilm.model()
    lines = [text for text, _ in data.sst2("dev")]
    calibration = minilm.batches(lines[: options.examples])
    fresh = minilm.batches([text for text, _ in data.sst2("train")][:128])
    score, reference = minilm.spearman(model)
    original, known = observe(model, None, calibration, True)
    calls = [bind_batch(original, batch, 0) for batch in fresh]
    plan, rows = None, []
    for budget, (most_drop, least_cosine) in BARS.items():
        begun = time.perf_counter()
        if plan is None:
            compiled = fxcompress.compile(model, budget, calibration=calibration)
        else:
            again = fxcompress.cost_model.select.choose(plan, fxcompress.Budget(size=budget))
            compiled = carry_out(original, known, again, fxcompress.Budget(size=budget))
        seconds, plan = time.perf_counter() - begun, compiled.plan
        rows.append(
            row(
                f"{budget} (drop <= {most_drop}, cosine >= {least_cosine})",
                compiled,
                original,
                calls,
                score,
                reference,
                seconds,
            )
        )
        if options.uniform:
            rows += [
                row(f"  uniform {spec}", c, original, calls, score, reference, 0.0)
                for spec, c in uniform(plan, original, known, budget)
            ]
    heads = [
        "budget and bar",
        "on disk",
        "ratio",
        "STS-B drop",
        "mean cosine",
        "predicted",
        "measured",
        "off by",
        "seconds",
    ]
    print(f"uncompressed STS-B dev Spearman {score:.4f}; {len(lines[: options.examples])} calibration sentences\n")
    print(tabulate(rows, headers=heads, disable_numparse=True))


def row(
    name: str, compiled: SignedModule, original: SignedModule, calls: list[Call], score: float, reference: Tensor,
    seconds: float,
) -> tuple[str, ...]:  # fmt: skip
    """Save, load, judge."""
    with tempfile.TemporaryDirectory() as folder:
        fxcompress.save(compiled, Path(folder) / "m")
        on_disk = sum(file.stat().st_size for file in (Path(folder) / "m").iterdir())
        loaded = fxcompress.load(Path(folder) / "m")
    mine, embeddings = minilm.spearman(loaded)
    predicted, measured = compiled.plan.predicted_error, compare(original, compiled, calls).error
    return (
        name, f"{on_disk / 1e6:.3f} MB", f"{90.852864e6 / on_disk:.3f}x", f"{score - mine:+.4f}",
        f"{minilm.mean_cosine(embeddings, reference):.4f}", f"{predicted:.4f}", f"{measured:.4f}",
        f"{measured / predicted - 1:+.1%}", f"{seconds:.0f}",
    )  # fmt: skip


def uniform(plan: Plan, original: SignedModule, known: Calibration, budget: str) -> list[tuple[str, SignedModule]]:
    """The most exact single setting whose whole model is no larger than the budget."""
    room = fxcompress.Budget(size=budget).size_bytes(plan.original_bytes)
    assert room is not None
    best: tuple[str, Plan] | None = None
    for spec in sorted({c.spec for c in plan.candidates if c.spec.startswith("quantize{")}):
        by_site = {c.site: c for c in plan.candidates if c.spec == spec}
        kept = {c.site: c for c in plan.candidates if c.spec == "keep"}
        if len(by_site) < len(kept) - 2:
            continue
        choices = tuple(by_site.get(s.name, kept[s.name]) for s in plan.sites)
        candidate = replace(plan, choices=choices)
        if candidate.predicted_bytes <= room and (best is None or candidate.predicted_loss < best[1].predicted_loss):
            best = (spec, candidate)
    return [] if best is None else [(best[0], carry_out(original, known, best[1], None))]


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--uniform", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
