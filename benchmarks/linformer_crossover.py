"""Seconds of one attention on this CPU, exact against Linformer, over the length of the sequence, and where they cross.

    python benchmarks/linformer_crossover.py [--threads 2] [--repetitions 15] [--batch 1]

12 heads of 64, float32, as BERT-base has them; n_max = n, nothing padded, E and F averages of neighbours (their values
do not change the work). Each repetition times both one after the other, and the ratio is the median of the
repetitions' ratios, so that a busy machine slows both. Greenformers' claim: Linformer pays from about 512.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tabulate import tabulate
from torch import Tensor

from fxcompress.codegen.ops.linformer_attention import linformer_attention
from fxcompress.passes.linformer import segments

HEADS, HEAD_DIM = 12, 64
LENGTHS = (128, 256)
SEQUENCES = (128, 256, 512, 1024, 2048, 4096)


@torch.no_grad()
def main() -> None:
    """One table, and the first n from which Linformer stays the faster one."""
    options = arguments()
    torch.set_num_threads(options.threads)
    ratios: dict[int, list[tuple[int, float]]] = {length: [] for length in LENGTHS}
    rows = []
    for n in SEQUENCES:
        q, k, v = (heads(options.batch, n, seed) for seed in range(3))
        for length in (length for length in LENGTHS if length <= n):
            e = segments(length, n)
            exact, ours, ratio = compared(
                lambda q=q, k=k, v=v: torch.ops.aten.scaled_dot_product_attention.default(q, k, v).contiguous(),
                lambda q=q, k=k, v=v, e=e: linformer_attention(q, k, v, e, e),
                options.repetitions,
            )
            ratios[length].append((n, ratio))
            rows.append((n, length, f"{exact * 1e3:.2f}", f"{ours * 1e3:.2f}", f"{ratio:.2f}x"))
    print(f"{HEADS} heads of {HEAD_DIM}, batch {options.batch}, {options.threads} threads, torch {torch.__version__}\n")
    print(tabulate(rows, headers=["n", "length", "exact ms", "linformer ms", "speed-up"], disable_numparse=True))
    print()
    for length, measured in ratios.items():
        print(f"length {length}: {crossover(measured)}")


def heads(batch: int, n: int, seed: int) -> Tensor:
    """(batch, heads, n, head_dim) as a model has it: a view of what came out of a linear."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, HEADS, HEAD_DIM, generator=generator).transpose(1, 2)


def compared(exact: Callable[[], Tensor], ours: Callable[[], Tensor], repetitions: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median of exact / ours."""
    pairs = []
    for repetition in range(repetitions + 2):
        pair = seconds(exact), seconds(ours)
        if repetition >= 2:  # the first two warm caches and thread pools
            pairs.append(pair)
    medians = [statistics.median(p[side] for p in pairs) for side in (0, 1)]
    return medians[0], medians[1], statistics.median(a / b for a, b in pairs)


def seconds(call: Callable[[], Tensor]) -> float:
    """One call."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def crossover(measured: list[tuple[int, float]]) -> str:
    """From which n on every ratio is above 1."""
    behind = [n for n, ratio in measured if ratio <= 1]
    ahead = [n for n, _ in measured if not behind or n > max(behind)]
    if not ahead:
        return f"not faster up to n = {measured[-1][0]}"
    return f"faster from n = {ahead[0]} on" + (f", not yet at {max(behind)}" if behind else ", all that was measured")


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--batch", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
