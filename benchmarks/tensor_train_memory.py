"""What a tensor-train layer keeps for backward, and how long it takes there and back, at a batch of 16,384 tokens: the
cores contracted one after the other under autograd, W rebuilt under autograd, the op, and a dense layer.

    python benchmarks/tensor_train_memory.py [tokens]

Bytes are those of the distinct storages autograd saves in one forward, the input and the cores among them. Seconds are
the shorter of two forward and backward passes. The layers are the paper's (arXiv 2306.02697): 768 -> 2304 with the
digits it measures, and GPT-2 small's 768 -> 3072, both at rank 16. Takes 6 GB.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from fxcompress.codegen.ops.tensor_train import rebuild
from fxcompress.codegen.ops.tensor_train_linear import tensor_train_linear
from fxcompress.passes.tt_shapes import Shapes, bond_ranks, factor_shapes

TOKENS = 16_384
BAR = 4  # of the bytes the contraction under autograd keeps: at least this many times those of the op
LAYERS: tuple[tuple[Shapes, int], ...] = (
    (((8, 8), (8, 8), (12, 12), (1, 3)), 16),
    (factor_shapes(768, 3072, 16), 16),
)


def main(tokens: int = TOKENS) -> None:
    """One table a layer."""
    for shapes, rank in LAYERS:
        x, cores, weight = layer(shapes, rank, tokens)
        n, m = [n for n, _ in shapes], [m for _, m in shapes]
        ways: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
            "einsum after einsum, autograd": (partial(einsums, x, cores, shapes), cores),
            "rebuild and multiply, autograd": (partial(rebuilt, x, cores, n, m), cores),
            "fxcompress::tensor_train_linear": (partial(tensor_train_linear, x, cores, n, m, len(weight), None), cores),
            "dense": (partial(F.linear, x, weight), [weight]),
        }
        few = x[:8].detach()
        assert torch.allclose(einsums(few, cores, shapes), F.linear(few, weight), rtol=1e-3, atol=1e-3)
        kept = {name: kept_bytes(forward) for name, (forward, _) in ways.items()}
        seconds = {name: both_ways(forward, [x, *wanted]) for name, (forward, wanted) in ways.items()}
        naive, _, ours, _ = ways
        rows = [
            (
                name,
                f"{kept[name] / 1e6:.1f} MB",
                f"{kept[name] / kept[ours]:.2f}x",
                f"{seconds[name]:.2f} s",
                f"{seconds[name] / seconds[ours]:.2f}x",
            )
            for name in ways
        ]
        title = f"{weight.shape[1]} -> {weight.shape[0]}, rank {rank}, {' '.join(map(str, shapes))}"
        print(f"{title}, {tokens:,} tokens, float32, {torch.get_num_threads()} threads")
        print(
            tabulate(
                rows,
                headers=["", "kept for backward", "of the op's", "there and back", "of the op's"],
                disable_numparse=True,
                colalign=("left", "right", "right", "right", "right"),
            )
        )
        ratio = kept[naive] / kept[ours]
        print(f"{ratio:.1f} times less than einsums keep; bar: {BAR}; {'met' if ratio >= BAR else 'MISSED'}\n")


def layer(shapes: Shapes, rank: int, tokens: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """x (tokens, columns), the cores and the dense weight they amount to, all to be differentiated."""
    generator, ranks = torch.Generator().manual_seed(0), bond_ranks(shapes, rank)
    cores = [
        torch.randn(ranks[k] * n, m * ranks[k + 1], generator=generator) / (ranks[k] * n) ** 0.5
        for k, (n, m) in enumerate(shapes)
    ]
    weight = rebuild(cores, [n for n, _ in shapes], [m for _, m in shapes])
    x = torch.randn(tokens, weight.shape[1], generator=generator)
    return x.requires_grad_(), [c.requires_grad_() for c in cores], weight.requires_grad_()


def einsums(x: Tensor, cores: list[Tensor], shapes: Shapes) -> Tensor:
    """The definition, from the left: one einsum a core, whatever autograd makes of it."""
    done = 1
    state = x.reshape(len(x), 1, -1, 1)  # (tokens, rows' digits so far, columns' digits left, rank)
    for core, (n, m) in zip(cores, shapes):
        left = state.shape[3]
        g = core.reshape(left, n, m, -1)
        split = state.reshape(len(x), done, n, state.shape[2] // n, left)
        state = torch.einsum("tonlr,rnms->tomls", split, g).reshape(len(x), done * m, split.shape[3], g.shape[3])
        done *= m
    return state.reshape(len(x), done)


def rebuilt(x: Tensor, cores: list[Tensor], n: list[int], m: list[int]) -> Tensor:
    """W from the cores, then the product."""
    return F.linear(x, rebuild(cores, n, m))


def kept_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that backward will read."""
    storages: dict[int, int] = {}
    alive: list[Tensor] = []  # a freed storage's address may be given out again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(storages.values())


def both_ways(forward: Callable[[], Tensor], wanted: list[Tensor]) -> float:
    """Seconds of a forward and a backward pass, the shorter of two."""
    found = []
    for _ in range(2):
        begun = time.perf_counter()
        y = forward()
        torch.autograd.grad(y, wanted, y.detach())
        found.append(time.perf_counter() - begun)
    return min(found)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
