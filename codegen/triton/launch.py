"""What `fused` does on a GPU: its program in pieces, each by the kernel and the config that fit.

    pieces(spec)      products with what follows them              fxcompress.codegen.triton.pieces
    generate(...)     a kernel for each, by dtype and broadcasts   fxcompress.codegen.triton.generate
    prepare(...)      its constants as the kernel reads them, once a weight, kept as long as the weight lives
    choose(...)       a config by tokens and card, or none         fxcompress.codegen.triton.configs

What cannot be emitted runs as the op's body says, after one warning that names the node.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fxcompress.codegen.ops.fused import check, evaluate
from fxcompress.codegen.spec import UNROWS, Extra, Spec, Value
from fxcompress.codegen.triton.card import OLDEST, Card
from fxcompress.codegen.triton.configs import choose
from fxcompress.codegen.triton.epilogue import Kind
from fxcompress.codegen.triton.generate import generate, kind_of
from fxcompress.codegen.triton.kernel import Kernel
from fxcompress.codegen.triton.lasting import lasting
from fxcompress.codegen.triton.pieces import Piece, Source, folded, pieces
from fxcompress.core.errors import SpecError

log = logging.getLogger("fxcompress.kernels")
T = TypeVar("T")

FOLDED = 16  # tokens up to which a norm is done in the products that read it: more would be normalised again and again


def run(
    spec: Spec, x: Tensor, tensors: Sequence[Tensor], extras: Sequence[Tensor], card: Card, name: str = ""
) -> list[Tensor]:
    """The outputs of `spec`, as `evaluate` gives them; name: of the node, for a warning."""
    check(spec, tensors, extras)
    made: dict[int, Tensor] = {}

    def read(source: Source) -> Tensor:
        match source:
            case Extra(index):
                return extras[index]
            case Value(index):
                return made[index]
        return x.reshape(-1, x.shape[-1]) if source.rows else x

    tokens = x.numel() // x.shape[-1] if x.shape[-1] else 0
    for piece in folded(spec) if tokens <= FOLDED else pieces(spec):
        own = [tensors[i] for i in piece.tensors]
        given, own_x = [read(source) for source in piece.extras], read(piece.x)
        if any(call.name == UNROWS for call in piece.spec.steps):  # what follows has the dimensions of x
            own_x = own_x.reshape(*x.shape[:-1], own_x.shape[-1])
        results = attempt(
            functools.partial(_run_piece, piece, own_x, own, given, card),
            functools.partial(evaluate, piece.spec, own_x, own, given),
            card,
            name,
        )
        lead = x.shape[:-1]
        for at, flat, y in zip(piece.makes, piece.flat, results):
            made[at] = y.reshape(tokens, y.shape[-1]) if flat else y.reshape(*lead, y.shape[-1])
    return [made[i] for i in spec.outputs]


def attempt(kernel: Callable[[], T], body: Callable[[], T], card: Card, name: str) -> T:
    """What `kernel` gives; where it cannot be had, what `body` gives, after a warning that names the node."""
    if why := missing(card):
        warn(name, why)
        return body()
    try:
        return kernel()
    except _failures() as error:
        warn(name, f"{error}".strip().removesuffix("."))
        return body()


@functools.cache
def warn(name: str, why: str) -> None:
    """Once a node and reason."""
    log.warning("%s runs without a kernel, as plain PyTorch: %s.", name or "a fused node", why)


@functools.cache
def missing(card: Card) -> str | None:
    """Why there are no kernels at all, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'fxcompress[triton]')"
    if card.arch < OLDEST:
        return f"{card.name} is sm_{card.arch}, and kernels need sm_{OLDEST} or later"
    return None


@functools.cache
def _failures() -> tuple[type[Exception], ...]:
    """What a kernel that cannot be had raises: here, or from Triton's compiler (too much shared memory, say)."""
    from triton.errors import TritonError

    return SpecError, TritonError


def _run_piece(
    piece: Piece, x: Tensor, tensors: Sequence[Tensor], extras: Sequence[Tensor], card: Card
) -> list[Tensor]:
    types = tuple((e.dtype, e.dim() == 0) for e in extras)
    dtypes = _dtypes(piece.spec, x.dtype, x.shape[-1], types)
    return compute(card, piece.spec, x, tensors, extras, dtypes)


def compute(
    card: Card, spec: Spec, x: Tensor, tensors: Sequence[Tensor], extras: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
) -> list[Tensor]:  # fmt: skip
    """One product and what follows it, by the kernel or apart. Raises `SpecError` for what cannot be emitted."""
    kernel, extras = kernel_for(spec, x, extras)
    if kernel.least_arch > card.arch:
        raise SpecError(f"{kernel.label} needs sm_{kernel.least_arch}, and {card.name} is sm_{card.arch}.")
    tokens = x.numel() // kernel.columns
    if tokens == 0:
        return kernel.empty(x, dtypes)
    prepared, config = _prepared(kernel, tensors), choose(kernel, tokens, card)
    if config is not None:
        return kernel(x, prepared, extras, config, dtypes)
    return kernel.apart(x, prepared, tensors, extras, dtypes, functools.partial(compute, card))


def kernel_for(spec: Spec, x: Tensor, extras: Sequence[Tensor]) -> tuple[Kernel, list[Tensor]]:
    """The kernel, and the extras in forms it reads: what broadcasts in no way an epilogue knows is written out."""
    rows = (*x.shape[:-1], generate(spec, x.dtype, ("scalar",) * spec.extras).rows)
    kinds: list[Kind] = []
    given = []
    for extra in extras:
        if extra.shape == (x.numel() // x.shape[-1], rows[-1]):
            extra = extra.reshape(rows)  # a matrix of all rows
        try:
            kinds.append(kind_of(extra.shape, rows))
        except SpecError:
            extra = extra.expand(rows)
            kinds.append("full")
        given.append(extra.contiguous())
    return generate(spec, x.dtype, tuple(kinds)), given


@functools.lru_cache(maxsize=4096)
def _dtypes(
    spec: Spec, x: torch.dtype, columns: int, extras: tuple[tuple[torch.dtype, bool], ...]
) -> tuple[torch.dtype, ...]:
    """Those of the outputs, by running the program without data; extras: dtype, and whether it is a single number."""
    constants = [torch.empty(c.shape, dtype=c.dtype, device="meta") for c in spec.constants]
    others = [torch.empty(() if single else (1,), dtype=dtype, device="meta") for dtype, single in extras]
    outputs = evaluate(spec, torch.empty(1, columns, dtype=x, device="meta"), constants, others)
    return tuple(y.dtype for y in outputs)


_kept: dict[tuple[Any, ...], tuple[tuple[int, ...], tuple[Tensor, ...]]] = {}  # state of the tensors, what was made


def _prepared(kernel: Kernel, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`kernel.prepare`, once: kept while the tensors live, and made again where one was written to or moved."""
    key = (type(kernel), tuple(loader for _, loader in kernel.loaders), *map(id, tensors))
    state = tuple(n for t in tensors for n in (t.data_ptr(), 0 if t.is_inference() else t._version))
    if key not in _kept:
        for tensor in tensors:
            weakref.finalize(tensor, _kept.pop, key, None).atexit = False
    if key not in _kept or _kept[key][0] != state:
        made = lasting(lambda: kernel.prepare([t.detach() for t in tensors]), tensors[0].device)
        _kept[key] = state, made
    return _kept[key][1]
