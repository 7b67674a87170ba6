"""Which criterion prunes best: the squared relative error of every linear weight of MiniLM, on held-out sentences.

    python benchmarks/pruning_minilm.py [--examples 128]

Calibration: the first lines of SST-2 dev, the last quarter of every batch held out; `mean error` is the mean over the
weights of the local error on those (fxcompress.core.metric), `wins` at how many weights the criterion on this line
beats the one above it. Masks and values are what fxcompress.passes.masks makes; nothing is quantized.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tabulate import tabulate

from benchmarks.models import data, minilm
from fxcompress.core.calibrate import calibrate
from fxcompress.core.capture import capture
from fxcompress.core.metric import local_error
from fxcompress.core.rewrite import Structure
from fxcompress.core.site import find_sites
from fxcompress.passes.masks import CRITERIA
from fxcompress.passes.prune import Prune
from fxcompress.passes.prune_2_4 import Prune24
from fxcompress.passes.prune_blocks import PruneBlocks


def structures(by: str) -> tuple[Structure, ...]:
    """What is compared, by one criterion."""
    return Prune24(by), Prune(0.5, by), PruneBlocks(0.5, 16, by)


def errors(examples: int = 128) -> dict[tuple[str, str], dict[str, float]]:
    """(structure, criterion) -> error by site, over the linear weights of the encoder. Raises `DataMissing`."""
    model, lines = minilm.model(), [text for text, _ in data.sst2("dev")][:examples]
    batches = minilm.batches(lines)
    gm = capture(model, batches[0])
    sites = find_sites(gm)
    known = calibrate(gm, sites, batches, progress=False)
    table: dict[tuple[str, str], dict[str, float]] = {}
    for site in sites:
        if site.kind != "linear" or not site.name.startswith("encoder."):
            continue
        informed = known.informed(site)
        for by in CRITERIA:
            for structure, plain in zip(structures(by), structures("sparsegpt")):
                error = local_error(informed, structure.unstored(informed))
                table.setdefault((str(plain), by), {})[site.name] = error
        informed.forget()
    return table


def main() -> None:
    """One table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=128)
    examples = parser.parse_args().examples
    begun = time.perf_counter()
    table = errors(examples)
    rows = []
    for structure in (str(s) for s in structures("sparsegpt")):
        above: dict[str, float] | None = None
        for by in CRITERIA:
            mine = table[structure, by]
            wins = "" if above is None else f"{sum(mine[n] < above[n] for n in mine)} of {len(mine)}"
            rows.append((structure, by, f"{sum(mine.values()) / len(mine):.4f}", f"{max(mine.values()):.4f}", wins))
            above = mine
    heads = [f"MiniLM, {examples} sentences", "by", "mean error", "worst", "wins"]
    print(tabulate(rows, headers=heads, disable_numparse=True))
    print(f"\n{time.perf_counter() - begun:.0f} s, calibration included")


if __name__ == "__main__":
    main()
