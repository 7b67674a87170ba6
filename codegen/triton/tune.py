"""`fxcompress tune`: the launch configs of a compressed model, measured on the card that will run it.

    every fused node -> its pieces -> their kernels, and those that a kernel is put together from where it does not fit
    kernel, tokens   -> some configs near the rule's (`candidates`), and none: what `Kernel.apart` does instead
    kept             the fastest, if it beats the rule's by more than both timings scatter; the rule's otherwise

What is found goes to the user's table (fxcompress.codegen.triton.configs), so that no first call ever has to measure.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import triton
from tabulate import tabulate
from torch import Tensor, fx
from tqdm import tqdm

from fxcompress.codegen.ops.fused import fused, fused_parallel
from fxcompress.codegen.spec import Extra, Spec, parse
from fxcompress.codegen.triton import launch
from fxcompress.codegen.triton.card import Card
from fxcompress.codegen.triton.configs import bucket, remember, size_of
from fxcompress.codegen.triton.epilogue import Kind
from fxcompress.codegen.triton.generate import generate, kind_of
from fxcompress.codegen.triton.kernel import Config, Kernel
from fxcompress.codegen.triton.pieces import Piece, folded, pieces
from fxcompress.codegen.triton.timing import Call, Timer, Timing, copies
from fxcompress.core.errors import SpecError

MOST = 24  # configs a kernel and number of tokens
_TARGETS = (fused._opoverload, fused_parallel._opoverload)
_SIZES = {"block_m": (16, 32, 64, 128), "block_n": (32, 64, 128), "split": (1, 2, 4, 8, 16), "warps": (4, 8)}
_STAGES = (2, 3, 4, 5)


@dataclass(frozen=True)
class Work:
    """A kernel and constants that it runs on."""

    kernel: Kernel
    tensors: tuple[Tensor, ...]

    @property
    def key(self) -> tuple[str, str]:
        """What tables know it by."""
        return self.kernel.label, size_of(self.kernel)


@dataclass(frozen=True)
class Found:
    """What was measured for one kernel and bucket. took, instead_of: seconds of what is kept, and of the rule's."""

    key: tuple[str, str]
    bucket: int
    config: Config | None
    took: float
    instead_of: float


def works_of(gm: fx.GraphModule) -> list[Work]:
    """One for every kernel and size that the fused nodes of `gm` need; what has no kernel is left out."""
    found: dict[tuple[str, str], Work] = {}
    for node in gm.graph.nodes:
        if node.target not in _TARGETS:
            continue
        x, tensors, extras, text = node.args[:4]
        constants = [_constant(gm, t) for t in tensors]
        for piece in dict.fromkeys((*pieces(parse(text)), *folded(parse(text)))):
            try:
                kernel = generate(piece.spec, x.meta["val"].dtype, _kinds(piece, x, extras))
            except SpecError:
                continue
            if kernel.loaders:  # whole rows are divided in one way
                work = Work(kernel, tuple(constants[i] for i in piece.tensors))
                found.setdefault(work.key, work)
    return list(found.values())


def tune_model(
    gm: fx.GraphModule, tokens: Sequence[int], card: Card, cache: int, timer: Timer, progress: bool = True
) -> list[Found]:
    """`tune` for all that `gm` needs, each result remembered as soon as it is known: others are made of it."""
    works = list(with_parts(works_of(gm)))
    total = len(works) * len(set(map(bucket, tokens)))
    told = {"torch": torch.__version__, "triton": triton.__version__, "date": _today(), "source": "fxcompress tune"}
    found = []
    each = tune(works, tokens, card, cache, timer)
    for one in tqdm(each, "tune", total, unit="kernel", disable=not progress, leave=False):
        remember(card.name, *one.key, {one.bucket: one.config}, told)
        found.append(one)
    return found


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _constant(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    return functools.reduce(getattr, str(node.target).split("."), cast(Any, gm)).detach()  # type: ignore[no-any-return]


def _kinds(piece: Piece, x: fx.Node, extras: Sequence[fx.Node]) -> tuple[Kind, ...]:
    """How the epilogue reads its extras, by the shapes that the graph was captured with."""
    dtype, lead = x.meta["val"].dtype, _shape(x)[:-1]
    rows = (*lead, generate(piece.spec, dtype, ("scalar",) * piece.spec.extras).rows)
    kinds: list[Kind] = []
    for source in piece.extras:
        shape = _shape(extras[source.index]) if isinstance(source, Extra) else rows  # what a piece made is as large
        try:
            kinds.append("full" if math.prod(shape) == math.prod(rows) else kind_of(shape, rows))
        except SpecError:
            kinds.append("full")  # it is written out (launch.kernel_for)
    return tuple(kinds)


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else int(size.node.hint or 2) for size in node.meta["val"].shape)


def with_parts(works: Iterable[Work]) -> Iterator[Work]:
    """Each behind the kernels that it is put together from where it does not fit, every one once."""
    seen: set[tuple[str, str]] = set()
    for work in works:
        for each in (*_parts(work), work):
            if each.key not in seen:
                seen.add(each.key)
                yield each


def _parts(work: Work) -> list[Work]:
    parts: list[Work] = []

    def compute(
        spec: Spec, x: Tensor, tensors: Sequence[Tensor], extras: Sequence[Tensor], dtypes: Sequence[torch.dtype]
    ) -> list[Tensor]:
        kernel, _ = launch.kernel_for(spec, x, extras)
        parts.append(Work(kernel, tuple(tensors)))
        return [y.zero_() for y in kernel.empty(x, dtypes)]

    x, extras, dtypes = _example(work, 1)
    work.kernel.apart(x, work.kernel.prepare(work.tensors), work.tensors, extras, dtypes, compute)
    return parts


def _example(work: Work, tokens: int) -> tuple[Tensor, list[Tensor], list[torch.dtype]]:
    """-> (x, extras, dtypes of the outputs), random."""
    kernel, device = work.kernel, work.tensors[0].device
    shapes: Mapping[Kind, tuple[int, ...]] = {
        "full": (tokens, kernel.rows), "row": (kernel.rows,), "column": (tokens, 1), "scalar": (),
    }  # fmt: skip
    kinds: dict[int, Kind] = {o.number: o.kind for o in kernel.epilogue.operands if isinstance(o.source, Extra)}
    extras = [
        torch.randn(shapes[kinds.get(i, "scalar")], device=device).to(kernel.dtype) for i in range(kernel.spec.extras)
    ]
    x = torch.randn(tokens, kernel.columns, device=device).to(kernel.dtype)
    return x, extras, [kernel.dtype] * len(kernel.spec.outputs)


def candidates(kernel: Kernel, tokens: int, multiprocessors: int) -> list[Config]:
    """The rule's first, then those nearest to it: doubling one number is a step. Those that launch alike are one."""
    if not kernel.forms:
        return []
    rule = kernel.rule(tokens, multiprocessors) or Config(16 if tokens <= 16 else 64, 128, 1, 8, 3)
    most = max(16, 1 << (tokens - 1).bit_length())
    every = (Config(m, n, s, w, stages) for m, n, s, w, stages in itertools.product(*_SIZES.values(), _STAGES))

    def distance(config: Config) -> float:
        pairs = [(getattr(config, name), getattr(rule, name)) for name in (*_SIZES, "stages")]
        return sum(abs(math.log2(a / b)) for a, b in pairs)

    found: dict[object, Config] = {}
    for config in (rule, *sorted((c for c in every if c.block_m <= most), key=distance)):
        alike = (kernel.form(config), *kernel.constants(config).items(), kernel.grid(tokens, config))
        found.setdefault((alike, config.warps, config.stages), config)
    return list(found.values())[:MOST]


def tune(
    works: Sequence[Work], tokens: Sequence[int], card: Card, cache: int, timer: Timer
) -> Iterator[Found]:
    """cache: bytes of the card's L2. Numbers of tokens that share a bucket are judged together."""
    buckets = {at: sorted(of) for at, of in itertools.groupby(sorted(set(tokens)), bucket)}
    for work in works:
        stored = sum(t.numel() * t.element_size() for t in work.tensors)
        sets = [[t.clone() for t in work.tensors] for _ in range(copies(stored, cache))]
        prepared = [work.kernel.prepare(own) for own in sets]
        for at, counts in buckets.items():
            yield _best(work, at, counts, sets, prepared, card, timer)


def _best(
    work: Work, at: int, counts: Sequence[int], sets: Sequence[list[Tensor]], prepared: Sequence[tuple[Tensor, ...]],
    card: Card, timer: Timer,
) -> Found:  # fmt: skip
    kernel, most = work.kernel, counts[-1]
    rule = kernel.rule(most, card.multiprocessors) if kernel.forms else None
    examples = [_example(work, count) for count in counts]

    def took(config: Config | None) -> list[Timing] | None:
        """At each number of tokens; None where the compiler refuses."""
        try:
            return [timer([_call(kernel, config, e, own, p, card) for own, p in zip(sets, prepared)]) for e in examples]
        except launch._failures():
            return None

    timed = {config: took(config) for config in (rule, None, *candidates(kernel, most, card.multiprocessors))}
    known = {config: timings for config, timings in timed.items() if timings is not None}
    basis = known.get(rule) or known[None]
    best = min(known, key=lambda config: _relative(known[config], basis))
    noise = max(t.spread + b.spread for t, b in zip(known[best], basis))
    if rule in known and _relative(known[best], basis) > 1 - noise:
        best = rule
    return Found(work.key, at, best, *(sum(t.seconds for t in timings) for timings in (known[best], basis)))


def _relative(timings: Sequence[Timing], basis: Sequence[Timing]) -> float:
    return sum(t.seconds / b.seconds for t, b in zip(timings, basis)) / len(basis)


def _call(
    kernel: Kernel, config: Config | None, example: tuple[Tensor, list[Tensor], list[torch.dtype]],
    tensors: Sequence[Tensor], prepared: tuple[Tensor, ...], card: Card,
) -> Call:  # fmt: skip
    x, extras, dtypes = example
    if config is not None:
        return lambda: kernel(x, prepared, extras, config, dtypes)
    compute = functools.partial(launch.compute, card)
    return lambda: kernel.apart(x, prepared, tensors, extras, dtypes, compute)


def table(found: Sequence[Found]) -> str:
    """For people."""
    lines = [
        (*one.key, one.bucket, "apart" if one.config is None else _text(one.config), f"{one.took * 1e6:.1f}",
         f"{one.instead_of * 1e6:.1f}")
        for one in found
    ]  # fmt: skip
    return tabulate(lines, headers=["kernel", "size", "tokens to", "config", "us", "us by rule"], disable_numparse=True)


def _text(config: Config) -> str:
    split = f" / {config.split}" if config.split > 1 else ""
    return f"{config.block_m} x {config.block_n}{split}, {config.warps} warps, {config.stages} stages"
