"""What compiling costs: seconds and peak memory on MiniLM with 128 calibration sentences, and seconds to plan a
second budget.

    python benchmarks/compile_cost.py [--model bert-base]

bert-base has random weights; the sentences are 128 of SST-2 for either. Peak memory is the process's resident maximum
above what it was with the model loaded and run once.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tabulate import tabulate
from torch import nn

import fxcompress
from benchmarks.models import data, minilm
from fxcompress.cost_model.select import choose


def main() -> None:
    """Three figures beside their bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("minilm", "bert-base"), default="minilm")
    name = parser.parse_args().model
    model, bar = (minilm.model(), "< 60 s") if name == "minilm" else (bert_base(), "< 180 s")
    calibration = minilm.batches([text for text, _ in data.sst2("dev")][:128])
    with torch.no_grad():
        model(**calibration[0])
    before = peak_bytes()
    begun = time.perf_counter()
    compiled = fxcompress.compile(model, "4x", calibration=calibration, progress=False)
    compile_seconds = time.perf_counter() - begun
    memory = peak_bytes() - before
    begun = time.perf_counter()
    second = choose(compiled.plan, fxcompress.Budget(size="8x"))
    plan_seconds = time.perf_counter() - begun
    rows = [
        ("compile at 4x", f"{compile_seconds:.1f} s", bar),
        (f"plan a second budget ({second.budget})", f"{plan_seconds:.2f} s", "< 5 s"),
        ("peak memory above the model's own", f"{memory / 1e6:.0f} MB", "< 1000 MB" if name == "minilm" else ""),
    ]
    print(
        tabulate(
            rows,
            headers=[f"{name}, 128 sentences, {torch.get_num_threads()} threads", "measured", "bar"],
            disable_numparse=True,
        )
    )


def bert_base() -> nn.Module:
    """Of random weights."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig()).eval()


def peak_bytes() -> int:
    """The largest resident size so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
