"""How long an exact choice takes: 2,000 sites of 60 candidates under bounds on bytes, flops and seconds at once.

    python benchmarks/solver.py

Made-up sites: weights of 10 thousand to 5 million elements, 1.5 to 16 bits, losses of kappa 4^-bits (the law that
quantization follows, core/metric.py) times chance, a tenth of the flops to all of them, seconds that hardly follow the
flops. Bounds are drawn between a quarter and half of what is possible. Bar: under 2 s, proven within 1e-4.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from tabulate import tabulate

from fxcompress.core.errors import InfeasibleBudgetError
from fxcompress.cost_model.knapsack import Item, Limits, select

SITES, CANDIDATES, SEEDS = 2000, 60, 41


def instance(seed: int) -> tuple[list[list[Item]], Limits]:
    """Sites, and bounds that all bind or nearly do."""
    rng = np.random.default_rng(seed)
    shape = SITES, CANDIDATES
    size, kappa = 10 ** rng.uniform(4, 6.7, (SITES, 1)), 10 ** rng.uniform(-4, 0, (SITES, 1))
    bits, work = rng.uniform(1.5, 16, shape), rng.uniform(0.1, 1, shape)
    bits[:, 0], work[:, 0] = 32, 1
    loss = kappa * 4**-bits * rng.uniform(0.5, 2, shape) + 1e-3 * kappa * (1 - work)
    loss[:, 0] = 0
    flops = 2 * size * work
    seconds = flops * rng.uniform(0.3, 1, shape) * 1e-12
    values = np.stack([(size * bits / 8).round(), loss, flops, seconds], axis=-1)
    low, high = values.min(1).sum(0), values[:, 0].sum(0)
    bytes_, _, flops_, seconds_ = low + rng.uniform(0.25, 0.5, 4) * (high - low)
    sites = [[Item(*row) for row in site] for site in values.tolist()]
    return sites, Limits(bytes=float(bytes_), flops=float(flops_), seconds=float(seconds_))


def main() -> None:
    """A row for each seed."""
    rows, worst, gaps = [], 0.0, 0.0
    for seed in range(SEEDS):
        sites, limits = instance(seed)
        begun = time.perf_counter()
        try:
            found = select(sites, limits)
        except InfeasibleBudgetError:
            rows.append((seed, f"{time.perf_counter() - begun:.2f} s", "", "", "infeasible"))
            continue
        took = time.perf_counter() - begun
        worst, gaps = max(worst, took), max(gaps, found.gap)
        chosen = [items[i] for items, i in zip(sites, found.picked)]
        used = [sum(getattr(c, axis) for c in chosen) / getattr(limits, axis) for axis in ("bytes", "flops", "seconds")]
        rows.append((seed, f"{took:.2f} s", f"{found.gap:.1e}", f"{sum(c.loss for c in chosen):.6g}",
                     ", ".join(f"{u:.2%}" for u in used)))  # fmt: skip
    heads = ["seed", "time", "gap", "loss", "of bytes, flops, seconds allowed"]
    print(f"{SITES} sites of {CANDIDATES} candidates, 3 bounds, {torch.get_num_threads()} threads\n")
    print(tabulate(rows, headers=heads, disable_numparse=True))
    print(f"\nslowest {worst:.2f} s (bar: 2 s), largest gap {gaps:.1e} (bar: 1e-4)")


if __name__ == "__main__":
    main()
