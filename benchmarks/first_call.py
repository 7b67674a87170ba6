"""Seconds of the first call of MiniLM through torch.compile with a saved plan, beside plain PyTorch's.

    python benchmarks/first_call.py [--folder my-minilm-4x]

The folder is what `fxcompress compress` wrote (made here at 4x where none is given). Each row is a fresh process, three
of each, taken in turn; the model is loaded before the clock starts. Bar: less than 5 s more than eager. Inductor's own
compiling is shown beside it, as torch.compile's of the uncompressed model: no backend can leave it out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tabulate import tabulate

from benchmarks.models import minilm

OURS = 'torch.compile(model, backend="fxcompress", options={"plan": folder, "lower": %r})'
WAYS = {
    "PyTorch eager": "model",
    "fxcompress, run as it is": OURS % "eager",
    "torch.compile": "torch.compile(model)",
    "fxcompress, handed to Inductor": OURS % "inductor",
}
SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
import torch
from benchmarks.models import minilm
model, folder = minilm.model(), {folder!r}
batch = minilm.batches(["A sentence of a few words, to be embedded."] * 8)[0]
begun = time.perf_counter()
with torch.no_grad():
    ({way})(**batch)
print(time.perf_counter() - begun)
"""


def main() -> None:
    """One row a way to call it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as scratch:
        folder = given or minilm.saved_at_4x(Path(scratch) / "m")
        found: dict[str, list[float]] = {name: [] for name in WAYS}
        for turn in range(3):
            for name, way in WAYS.items():
                cache = str(Path(scratch) / f"inductor{turn}{len(name)}")  # empty: a user's first time
                found[name].append(seconds(way, folder, cache))
    medians = {name: statistics.median(each) for name, each in found.items()}
    eager = medians["PyTorch eager"]
    rows = [(name, f"{m:.2f} s", f"{m - eager:+.2f} s") for name, m in medians.items()]
    print(tabulate(rows, headers=["MiniLM, first call", "seconds", "beside eager"], disable_numparse=True))


def seconds(way: str, folder: Path, cache: str) -> float:
    """In a process of its own."""
    root = str(Path(__file__).resolve().parents[1])
    code = SCRIPT.format(root=root, folder=str(folder), way=way)
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
