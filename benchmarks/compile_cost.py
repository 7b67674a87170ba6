"""What compiling costs: seconds and peak memory on MiniLM with 128 calibration sentences, and seconds to plan a
second budget.

    python benchmarks/compile_cost.py [--model bert-base] [--uncalibrated]

bert-base has random weights; the sentences are 128 of SST-2 for either. The steps are those of `fxcompress.compile`.
Peak memory is the process's resident maximum above what it was with the model loaded and run once.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tabulate import tabulate
from torch import nn

from benchmarks.models import data, minilm
from fxcompress.api import REWRITES, observe, price, untouched
from fxcompress.carrying_out import carry_out
from fxcompress.core.budget import Budget
from fxcompress.cost_model.select import choose


def main() -> None:
    """The steps and their sum, beside their bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("minilm", "bert-base"), default="minilm")
    parser.add_argument("--uncalibrated", action="store_true", help="from the weights alone")
    asked = parser.parse_args()
    small = asked.model == "minilm"
    model = minilm.model() if small else bert_base()
    sentences = minilm.batches([text for text, _ in data.sst2("dev")][:128])
    with torch.no_grad():
        model(**sentences[0])
    before = peak_bytes()
    budget, clock = Budget.parse("4x"), [time.perf_counter()]
    with untouched():
        original, known = observe(model, sentences[0], None if asked.uncalibrated else sentences, False)
        clock.append(time.perf_counter())
        plan = price(original, REWRITES, known, budget, False)
        clock.append(time.perf_counter())
        compiled = carry_out(original, known, plan, budget)
        clock.append(time.perf_counter())
    memory = peak_bytes() - before
    choose(compiled.plan, Budget(size="8x"))
    clock.append(time.perf_counter())
    seen, planned, rewritten, again = (b - a for a, b in pairwise(clock))
    rows = [
        ("capture" if asked.uncalibrated else "capture and calibrate", f"{seen:.1f} s", ""),
        ("plan at 4x", f"{planned:.1f} s", ""),
        ("rewrite and verify", f"{rewritten:.1f} s", ""),
        ("plan and rewrite", f"{planned + rewritten:.1f} s", "" if small else "< 180 s"),
        ("all of it", f"{seen + planned + rewritten:.1f} s", "< 60 s" if small else ""),
        ("plan a second budget, 8x", f"{again:.2f} s", "< 5 s"),
        ("peak memory above the model's own", f"{memory / 1e6:.0f} MB", "< 1000 MB" if small else ""),
    ]
    given = "no data" if asked.uncalibrated else "128 sentences"
    heads = [f"{asked.model}, {given}, {torch.get_num_threads()} threads", "measured", "bar"]
    print(tabulate(rows, headers=heads, disable_numparse=True))


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
