"""The mix against one setting for the whole model: at the size of each uniform setting, is the mix at least as good?

    python benchmarks/uniform.py [--models minilm stories260K vit_mnist]

Every setting of `SETTINGS` is put at every site, or all but one in ten; then `compile` is asked for that many bytes.
Both are measured on fresh inputs, which neither calibrating nor choosing has seen. The exit status is 1 where the mix
is larger or worse.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tabulate import tabulate
from torch import nn

from benchmarks.models import data, minilm, stories, vit_mnist
from fxcompress.api import REWRITES, observe, price, untouched
from fxcompress.carrying_out import carry_out
from fxcompress.core.budget import Budget
from fxcompress.core.calibrate import bind_batch
from fxcompress.core.plan import KEEP, Plan
from fxcompress.core.verify import compare
from fxcompress.cost_model.select import choose

SETTINGS = tuple(
    f"quantize{{bits={bits}, group_size={group}}}"
    for bits, group in ((8, 0), (4, 32), (4, 64), (4, 128), (3, 32), (3, 64), (3, 128), (2, 32), (2, 64))
)


def main() -> None:
    """A row a model and setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    rows = [row for name in parser.parse_args().models for row in compared(name, *MODELS[name]())]
    heads = ["model", "one setting everywhere", "bytes", "error, fresh", "mix, bytes", "predicted",
             "error, fresh", "ratio"]  # fmt: skip
    print(tabulate([row[:-1] for row in rows], headers=heads, disable_numparse=True))
    worse = [row for row in rows if not row[-1]]
    print(f"\nthe mix is as good or better in {len(rows) - len(worse)} of {len(rows)} cases")
    sys.exit(bool(worse))


def compared(name: str, model: nn.Module, batches: list[Any], fresh: list[Any]) -> Iterator[tuple[Any, ...]]:
    """One model, every setting."""
    with untouched():
        original, known = observe(model, None, batches, True)
        table = price(original, REWRITES, known, Budget(error=1e6), True)  # every candidate, and all of them allowed
        calls = [bind_batch(original, batch, i) for i, batch in enumerate(fresh)]
        for spec in SETTINGS:
            everywhere = uniform(table, spec)
            if sum(c.spec == KEEP for c in everywhere.choices) > 0.1 * len(everywhere):
                continue
            budget = Budget(size=f"{everywhere.predicted_bytes} B")
            for _ in range(2):  # its plan says what was asked for, as the mix's does: that is part of the size
                alone = carry_out(original, known, replace(everywhere, budget=budget), None)
                budget = Budget(size=f"{alone.report.measured_bytes} B")
            mix = carry_out(original, known, choose(table, budget), budget)
            theirs, ours = (compare(original, compiled, calls).error for compiled in (alone, mix))
            sizes = alone.report.measured_bytes, mix.report.measured_bytes
            row = (
                name, spec, f"{sizes[0]:,}", f"{theirs:.4f}", f"{sizes[1]:,}", f"{mix.report.predicted_error:.4f}",
                f"{ours:.4f}", f"{ours / theirs:.2f}", sizes[1] <= sizes[0] and ours <= theirs,
            )  # fmt: skip
            print(*row, flush=True, file=sys.stderr)
            yield row


def uniform(table: Plan, spec: str) -> Plan:
    """`spec` at every site that has it as a candidate."""
    of = {(c.site, c.spec): c for c in table.candidates}
    return replace(table, choices=tuple(of.get((s.name, spec), of[s.name, KEEP]) for s in table.sites))


def _minilm() -> tuple[nn.Module, list[Any], list[Any]]:
    lines = [text for text, _ in data.sst2("dev")]
    return minilm.model(), minilm.batches(lines[:128]), minilm.batches(lines[128:640])


def _stories() -> tuple[nn.Module, list[Any], list[Any]]:
    def batches(text: str) -> list[Any]:
        return [{"input_ids": ids} for ids in stories.batches(text)]

    return stories.model(), batches(data.tinystories(60_000, 200_000))[:16], batches(data.tinystories())[:16]


def _vit() -> tuple[nn.Module, list[Any], list[Any]]:
    images = vit_mnist.normalise(data.mnist()[0])
    return vit_mnist.model(), list(images[:512].split(16)), list(images[512:2560].split(64))


MODELS: dict[str, Callable[[], tuple[nn.Module, list[Any], list[Any]]]] = {
    "minilm": _minilm,
    "stories260K": _stories,
    "vit_mnist": _vit,
}

if __name__ == "__main__":
    main()
