"""What must hold of every kernel on real hardware. Each check raises `AssertionError`; none needs pytest.

The truth is the same program in float64, on the same device. Of a single weight the error is bounded by roundings:

    one to the dtype of the output          eps / 2 |y|
    a tensor core adds 16 products at once  K / 16 roundings, cut off rather than rounded, of at most sum |x| |w|
    scales, sums of x, the epilogue         64 more; the codes and the middle of the codes weigh up to 4 |w|

Of several weights one after the other, and of tokens that are rounded themselves, the body of the op makes the same
roundings in the same places: a kernel may be twice as far from the truth at worst, and half as much again altogether.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from benchmarks._constants import constants_of
from fxcompress.codegen.ops.fused import evaluate
from fxcompress.codegen.spec import Spec, parse
from fxcompress.codegen.triton.configs import choose
from fxcompress.codegen.triton.generate import generate
from fxcompress.codegen.triton.kernel import Config, Kernel
from tests.gpu.ground import Ground

TAIL = " | gelu(_) | add(_, extra[0])"
STEEPEST = 1.13  # a GELU


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that a kernel is given to write holds NaN, or 77, until it is written."""
    empty = torch.Tensor.new_empty

    def new_empty(self: Tensor, *size: object, **options: object) -> Tensor:
        made = empty(self, *size, **options)
        if made.dtype.itemsize == 1:
            made.view(torch.uint8).fill_(77)
            return made
        return made.fill_(float("nan") if made.is_floating_point() else 77)

    with mock.patch.object(torch.Tensor, "new_empty", new_empty):
        yield


class Example:
    """A program at some number of tokens: inputs, the truth, and what the body makes of it."""

    def __init__(self, product: str, tokens: int, ground: Ground, tensors: list[Tensor] | None = None, seed: int = 0):
        self.text = product + TAIL
        self.spec = parse(self.text)
        self.kernel: Kernel = generate(self.spec, torch.bfloat16, ("full",))
        self.tensors = constants_of(self.spec, ground.device) if tensors is None else tensors
        draw = torch.Generator(device=ground.device).manual_seed(1000 * tokens + seed)
        self.x, residual = (
            torch.randn(tokens, width, generator=draw, device=ground.device).bfloat16()
            for width in (self.kernel.columns, self.kernel.rows)
        )
        self.extras = [residual]

    def run(self, ground: Ground) -> Tensor:
        """As a model does."""
        (y,) = ground.call(self.text, self.x, self.tensors, self.extras)
        return y

    def check(self, made: Tensor) -> None:
        """`made` against the truth."""
        doubled = [t.double() if t.dtype == torch.bfloat16 else t for t in self.tensors]
        exact = parse(self.text.replace("bfloat16", "float64"))
        (want,) = evaluate(exact, self.x.double(), doubled, [e.double() for e in self.extras])
        assert (made.shape, made.dtype) == (want.shape, torch.bfloat16), f"{made.dtype} {list(made.shape)}"
        assert bool(torch.isfinite(made).all()), "not finite: something was not written, or is wrong"
        error, eps = (made.double() - want).abs(), torch.finfo(made.dtype).eps
        if self.spec.steps[0].name == "linear":
            within(error, eps / 2 * want.abs() + self._accumulated(exact, doubled))
            return
        (plain,) = evaluate(self.spec, self.x, self.tensors, self.extras)
        theirs = (plain.double() - want).abs()
        within(error, 2 * theirs.max() + eps / 2 * want.abs().max())
        whole, allowed = float(error.norm()), 1.5 * float(theirs.norm()) + eps / 4 * float(want.norm())
        assert whole <= allowed, f"an error of {whole:.3g} in all, where {allowed:.3g} is allowed"

    def _accumulated(self, exact: Spec, doubled: list[Tensor]) -> Tensor:
        """What float32 sums, and numbers made in float32, may be off by."""
        columns = self.kernel.columns
        weight = Spec((exact.steps[0],), (0,))
        own = len(weight.constants)
        taken = [t if t.shape != (self.kernel.rows,) else torch.zeros_like(t) for t in doubled[:own]]  # no bias
        eye = torch.eye(columns, dtype=torch.float64, device=self.x.device)
        (unpacked,) = evaluate(weight, eye, taken, [])  # (K, N)
        size = self.x.double().abs() @ unpacked.abs() + 1
        return STEEPEST * 4 * (columns / 8 + 64) * 2.0**-23 * size


def within(error: Tensor, room: Tensor) -> None:
    """Element by element."""
    worst = float((error - room).max())
    assert worst <= 0, f"{worst:.3g} too much, where {float(room.max()):.3g} is allowed"


def config_is_right(product: str, config: Config, ground: Ground) -> None:
    """One launch with this config, at one token, an odd number, and more than a block."""
    tensors = None
    for tokens in (1, 5, config.block_m + 1):
        example = Example(product, tokens, ground, tensors)
        tensors = example.tensors
        prepared = example.kernel.prepare(tensors)
        with poisoned():
            (made,) = example.kernel(example.x, prepared, example.extras, config)
        example.check(made)


def dispatch_is_right(product: str, ground: Ground) -> None:
    """As a model calls it, at every number of tokens."""
    tensors = None
    for tokens in ground.tokens:
        example = Example(product, tokens, ground, tensors)
        tensors = example.tensors
        with poisoned():
            made = example.run(ground)
        example.check(made)


def bits_stay(product: str, ground: Ground) -> None:
    """Over many runs, with other work between them in the same memory."""
    example = Example(product, 5, ground)
    first = example.run(ground)
    for _ in range(ground.runs):
        torch.empty_like(first).normal_()
        assert torch.equal(example.run(ground), first), "other bits on another run"


def graph_follows_its_inputs(product: str, ground: Ground) -> None:
    """A capture replayed on other numbers is what an ordinary call makes of them."""
    for tokens in (1, ground.tokens[-1]):
        example = Example(product, tokens, ground)
        (kept,), replay = ground.capture(lambda e=example: [e.run(ground)])
        for seed in (1, 2):
            other = Example(product, tokens, ground, example.tensors, seed)
            example.x.copy_(other.x)
            example.extras[0].copy_(other.extras[0])
            kept.fill_(float("nan"))
            replay()
            ground.wait()
            if choose(example.kernel, tokens, ground.card) is not None:
                assert torch.equal(kept, other.run(ground)), "a replay has other bits than a call"
            other.check(kept)


def graphs_do_not_meet(product: str, ground: Ground) -> None:
    """Two captures of one weight, replayed on two streams at once: their workspaces and counters are their own."""
    first = Example(product, 5, ground)
    second = Example(product, 5, ground, first.tensors, seed=1)
    wanted = [example.run(ground).clone() for example in (first, second)]
    captures = [ground.capture(lambda e=example: [e.run(ground)]) for example in (first, second)]
    streams = [ground.stream(), ground.stream()]
    ground.wait()
    for _ in range(ground.runs):
        for stream, (_, replay) in zip(streams, captures):
            with stream:
                replay()
    ground.wait()
    for want, ((kept,), _) in zip(wanted, captures):
        assert torch.equal(kept, want), "graphs on two streams disturb each other"


def streams_do_not_meet(product: str, ground: Ground) -> None:
    """Ordinary calls on several streams at once."""
    examples = [Example(product, 5, ground, seed=seed) for seed in range(3)]
    wanted = [example.run(ground) for example in examples]
    streams = [ground.stream() for _ in examples]
    ground.wait()
    made = [torch.empty_like(want) for want in wanted]
    for _ in range(ground.runs):
        for stream, example, into in zip(streams, examples, made):
            with stream:
                into.copy_(example.run(ground))
    ground.wait()
    for got, want in zip(made, wanted):
        assert torch.equal(got, want), "calls on several streams disturb each other"


def memory_stays(product: str, ground: Ground) -> None:
    """Flat over many calls; what was prepared goes with the weight."""
    Example(product, 5, ground, seed=1).run(ground)  # counters, libraries
    empty = ground.memory()
    example = Example(product, 5, ground)
    example.run(ground)
    before = ground.memory()
    for _ in range(ground.calls):
        example.run(ground)
    assert ground.memory() == before, f"{ground.memory() - before} bytes more after {ground.calls} calls"
    del example
    assert ground.memory() == empty, f"{ground.memory() - empty} bytes stay when the weight is gone"
