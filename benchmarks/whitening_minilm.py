"""Low rank in the metric of the inputs against plain truncated SVD, at every rank of every linear weight of MiniLM.

    python benchmarks/whitening_minilm.py [--examples 128] [--step 1]

Calibration: the first lines of SST-2 dev. Each approximation is judged by the local error (fxcompress.core.metric) on
the calibration inputs, where whitening is the best there is by Eckart and Young, and on the last quarter of every
batch, which was held out. The plain one is torch.linalg.svd of the weight and gets the same corrected bias. `wins`
counts (weight, rank) pairs. Ends with status 1 unless whitening wins at all of them on the calibration inputs. About
four minutes; `--step 8` takes one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.models import data, minilm
from fxcompress.core.calibrate import calibrate
from fxcompress.core.capture import capture
from fxcompress.core.metric import local_error
from fxcompress.core.site import Site, find_sites
from fxcompress.passes.low_rank import LowRank

SHOWN = (1, 25, 49, 97, 145, 193, 289)


def linear_sites(examples: int) -> list[Site]:
    """The linear weights of the encoder and pooler, calibrated. Raises `DataMissing`."""
    batches = minilm.batches([text for text, _ in data.sst2("dev")][:examples])
    gm = capture(minilm.model(), batches[0])
    sites = find_sites(gm)
    known = calibrate(gm, sites, batches, progress=False)
    return [known.informed(site) for site in sites if site.kind == "linear"]


@dataclass(frozen=True)
class Pair:
    """Squared relative errors of one weight at one rank."""

    site: str
    rank: int
    whitened: float
    plain: float


def errors(site: Site, step: int = 1) -> Iterator[tuple[Pair, Pair]]:
    """-> (on the calibration inputs, on held-out ones), for ranks below full."""
    p, s, qt = torch.linalg.svd(site.weight.double(), full_matrices=False)
    seen = site.knowing(replace(site.statistics, check=None))
    for rank in range(1, min(site.rows, site.columns), step):
        plain, whitened = (p[:, :rank] * s[:rank]) @ qt[:rank], LowRank(rank).unstored(site)
        judged = (Pair(site.name, rank, local_error(at, whitened), local_error(at, plain)) for at in (seen, site))
        yield next(judged), next(judged)


def main() -> None:
    """One table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--step", type=int, default=1, help="between ranks")
    options = parser.parse_args()
    fitted: list[Pair] = []
    held_out: list[Pair] = []
    for site in tqdm(linear_sites(options.examples), "weights", leave=False):
        for on_fitted, on_held_out in errors(site, options.step):
            fitted.append(on_fitted)
            held_out.append(on_held_out)
        site.forget()
    rows = []
    for rank in sorted({pair.rank for pair in held_out if pair.rank in SHOWN}):
        mine = [pair for pair in held_out if pair.rank == rank]
        ratios = sorted(pair.whitened / pair.plain for pair in mine)
        whitened, plain = (sum(column) / len(mine) for column in zip(*((q.whitened, q.plain) for q in mine)))
        rows.append((rank, f"{whitened:.4f}", f"{plain:.4f}", f"{ratios[0]:.2f} to {ratios[-1]:.2f}"))
    heads = ["rank", "mean held-out error, whitened", "plain SVD", "ratio, best to worst weight"]
    print(tabulate(rows, headers=heads, disable_numparse=True))
    for where, pairs in (("calibration inputs", fitted), ("held-out inputs", held_out)):
        lost = [pair for pair in pairs if pair.whitened >= pair.plain]
        print(f"\nwins on {where}: {len(pairs) - len(lost)} of {len(pairs)}")
        for pair in lost[:20]:
            print(f"  not at {pair.site}, rank {pair.rank}: {pair.whitened:.6f} against {pair.plain:.6f}")
    sys.exit(any(pair.whitened >= pair.plain for pair in fitted))


if __name__ == "__main__":
    main()
