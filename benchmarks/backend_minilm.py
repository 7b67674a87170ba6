"""Milliseconds of MiniLM through torch.compile(model, backend="fxcompress"), beside PyTorch, torch.compile and
fxcompress.lower, and how close the outputs are to the original's.

    python benchmarks/backend_minilm.py [--folder my-minilm-4x]

The folder is what `fxcompress compress` wrote (made here at 4x where none is given). Medians of interleaved calls.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from tabulate import tabulate

import fxcompress
from benchmarks.models import data, minilm

SHAPES = ((1, 16), (1, 128), (32, 128))
ROUNDS = 15


def main() -> None:
    """A row a way to run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    torch._dynamo.config.recompile_limit = 64  # of one forward in three modes; past it Dynamo runs the original
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        ways = ways_of(parser.parse_args().folder or minilm.saved_at_4x(Path(scratch) / "m"))
        sentences = [text for text, _ in data.sst2("dev")][128:256]
        wanted = minilm.embed(ways["PyTorch eager"], sentences)
        found = {shape: milliseconds(ways, shape) for shape in SHAPES}
        rows = []
        for name, run in ways.items():
            times = [f"{found[s][name]:.1f}  {found[s][name] / found[s]['torch.compile']:.2f}" for s in SHAPES]
            cosine = F.cosine_similarity(minilm.embed(run, sentences), wanted).mean()
            rows.append((name, *times, f"{cosine:.4f}"))
    shapes = [f"{batch} x {length}" for batch, length in SHAPES]
    threads = f"MiniLM, ms and ratio, {torch.get_num_threads()} threads"
    print(tabulate(rows, headers=[threads, *shapes, "mean cosine"], disable_numparse=True))


def ways_of(folder: Path) -> dict[str, Callable[..., Any]]:
    """By name, each called as the model is."""

    def backend(lower: str) -> Any:
        return torch.compile(minilm.model(), backend="fxcompress", options={"plan": folder, "lower": lower})

    return {
        "PyTorch eager": minilm.model(),
        "torch.compile": torch.compile(minilm.model()),
        "fxcompress": backend("inductor"),
        'fxcompress, "lower": "cpu"': backend("cpu"),
        "fxcompress.lower": fxcompress.lower(fxcompress.load(folder)),
    }


def milliseconds(ways: dict[str, Callable[..., Any]], shape: tuple[int, int]) -> dict[str, float]:
    """Medians, each way called in turn."""
    ids = torch.randint(1000, 20000, shape, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS + 2):
        for name, run in ways.items():
            begun = time.perf_counter()
            run(**inputs)
            if turn >= 2:  # the first calls compile
                times[name].append(1e3 * (time.perf_counter() - begun))
    return {name: statistics.median(each) for name, each in times.items()}


if __name__ == "__main__":
    main()
