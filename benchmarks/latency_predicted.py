"""Seconds of whole models: predicted from the profile of this machine, beside measured.

    fxcompress profile
    python benchmarks/latency_predicted.py [--target eager] [--models minilm,bert,gpt2,vit] [--sizes 4x]

Four models at three shapes and three sizes, and as they came: all-MiniLM-L6-v2, BERT-base and GPT-2 small with random
weights, a vision transformer for MNIST. Nothing of the profile is fitted to them. Measured as the profile is: calls
one by one, the median of a round, the least of rounds far apart. "machine now" is how much slower standard kernels were
in that round than while the profile was measured (fxcompress.codegen.cpu.pulse): on a shared machine that is up to 1.6,
and the last column takes it out. Sizes by fixed specs, so that nothing is calibrated:

    2x    every second weight in 8 bits, the others kept       4x    8 bits       8x    4 bits in groups of 32
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxcompress
from benchmarks.models import minilm, vit_mnist
from fxcompress.codegen.cpu.pulse import Beat, Pulse, slowdown
from fxcompress.codegen.cpu.seconds import seconds_of
from fxcompress.core.capture import capture
from fxcompress.profiling import here

EIGHT, FOUR = "quantize{bits=8, group_size=0}", "quantize{bits=4, group_size=32}"
ROUNDS, CALLS = 9, 3
Inputs = dict[str, Tensor]


def main() -> None:
    """Print a row a model, size and shape."""
    options = arguments()
    torch.set_num_threads(options.threads)
    profile, rows = here(), []
    for name in options.models.split(","):
        model, given, shapes = MODELS[name]()
        for size in options.sizes.split(","):
            graph, run = made(model, given(*shapes[1]), size, options.target)
            inputs = [given(*shape) for shape in shapes]
            predicted = [float(seconds_of(graph, profile, bound(graph, x), options.target)) for x in inputs]
            for shape, there, (found, now) in zip(shapes, predicted, measured(run, inputs)):
                slower = slowdown(now, profile.pulse)
                key = name, size, " x ".join(map(str, shape))
                rows.append((*key, there, slower, found, there / found - 1, there * slower / found - 1))
                print(*rows[-1], file=sys.stderr, flush=True)
    table = [
        (*key, f"{p * 1e3:.2f} ms", f"{slower:.2f}", f"{m * 1e3:.2f} ms", f"{off:+.0%}", f"{now:+.0%}")
        for *key, p, slower, m, off, now in rows
    ]
    print(f"{profile.device}, {profile.threads} threads, {options.target}\n")
    heads = ["model", "size", "shape", "predicted", "machine now", "measured", "off by", "off by, at its speed now"]
    print(tabulate(table, headers=heads, disable_numparse=True))
    medians = [f"{statistics.median(abs(row[at]) for row in rows):.1%}" for at in (-2, -1)]
    print(f"\nmedian |off| {medians[0]} over {len(rows)}, at the machine's speed now {medians[1]}")


def made(model: nn.Module, inputs: Inputs, size: str, target: Any) -> tuple[Any, Callable[..., Any]]:
    """The graph that is priced, and what is called."""
    if size == "1x":
        return capture(model, inputs), model if target == "eager" else torch.compile(model, dynamic=True)
    linear = [name for name, module in model.named_modules() if hasattr(module, "weight") and module.weight.dim() == 2]
    specs = {"2x": {n: EIGHT if i % 2 else "keep" for i, n in enumerate(linear)}, "4x": {"*": EIGHT}, "8x": {"*": FOUR}}
    small = fxcompress.restructure(model, specs[size], example_inputs=inputs, progress=False)
    fast = fxcompress.lower(small, to=target)
    return fast, fast


def bound(graph: Any, inputs: Inputs) -> Mapping[str, int]:
    """The symbols of a graph's inputs as numbers."""
    found = {}
    for node, tensor in zip(getattr(graph, "graph_module", graph).graph.find_nodes(op="placeholder"), inputs.values()):
        for size, number in zip(node.meta["val"].shape, tensor.shape):
            if isinstance(size, torch.SymInt):
                found.update({symbol.name: number for symbol in size.node.expr.free_symbols})
    return found


def measured(run: Callable[..., Any], inputs: list[Inputs]) -> list[tuple[float, Pulse]]:
    """Seconds of a call for each of the inputs, and how fast the machine was meanwhile."""
    found: list[list[tuple[float, Pulse]]] = [[] for _ in inputs]
    beat = Beat()
    with torch.no_grad():
        for x in inputs:
            run(**x), run(**x)
        for _ in range(ROUNDS):
            for x, medians in zip(inputs, found):
                calls = []
                for _ in range(CALLS):
                    begun = time.perf_counter()
                    run(**x)
                    calls.append(time.perf_counter() - begun)
                medians.append((statistics.median(calls), beat()))
    return [min(medians, key=lambda each: each[0]) for medians in found]


def _tokens(batch: int, seq: int) -> Inputs:
    ids = torch.randint(1000, 20_000, (batch, seq), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def _minilm() -> Any:
    return minilm.model(), _tokens, ((1, 16), (1, 128), (16, 128))


def _bert() -> Any:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig()).eval(), _tokens, ((1, 16), (1, 128), (8, 128))


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(use_cache=False)).eval()
    return model, lambda b, s: {"input_ids": _tokens(b, s)["input_ids"]}, ((1, 16), (1, 128), (8, 128))


def _vit() -> Any:
    return vit_mnist.model(), lambda b: {"images": torch.randn(b, 1, 28, 28)}, ((1,), (16,), (256,))


MODELS: dict[str, Callable[[], Any]] = {"minilm": _minilm, "bert": _bert, "gpt2": _gpt2, "vit": _vit}


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=("eager", "inductor"), default="eager")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--sizes", default="1x,2x,4x,8x")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
