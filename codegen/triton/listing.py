"""What a compressed graph runs on a GPU: every kernel with its node, its program, its file and its launch configs.

    print(compiled.kernels)
    fxcompress inspect DIR --kernels

Nothing is launched or compiled; the sources are written to the cache folder, where a debugger or profiler finds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, fx

from fxcompress.codegen.ops import fused
from fxcompress.codegen.spec import Extra, Spec, parse
from fxcompress.codegen.triton.build import digest_of, write_source
from fxcompress.codegen.triton.card import H200, Card, card_of
from fxcompress.codegen.triton.configs import BUCKETS, choose
from fxcompress.codegen.triton.epilogue import Kind
from fxcompress.codegen.triton.generate import generate, kind_of
from fxcompress.codegen.triton.kernel import Config, Kernel
from fxcompress.codegen.triton.launch import FOLDED, missing
from fxcompress.codegen.triton.pieces import Source, folded, pieces
from fxcompress.core.errors import SpecError

NODES = (fused.fused._opoverload, fused.fused_parallel._opoverload)


@dataclass(frozen=True)
class Emitted:
    """One kernel of a graph.

    node: the graph's name for it; name: of the modules it stands for. configs: by tokens up to; None is the weight
    unpacked once and a library's product. refusal: why plain PyTorch runs instead, or None.
    """

    node: str
    name: str
    spec: str
    label: str
    source: Path | None
    configs: dict[int, Config | None]
    refusal: str | None

    def to_json(self) -> dict[str, Any]:
        configs = {str(at): None if config is None else asdict(config) for at, config in self.configs.items()}
        return {**asdict(self), "source": str(self.source) if self.source else None, "configs": configs}


class Listing(tuple[Emitted, ...]):
    """All of a graph's; prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "no fused nodes: nothing here runs generated kernels."
        heads = ["module", "kernel", *(f"to {at} tokens" for at in (16, 256)), "source"]
        lines = [
            (
                kernel.name or kernel.node,
                kernel.label,
                *(_told(kernel, at) for at in (16, 256)),
                str(kernel.source) if kernel.source else "",
            )
            for kernel in self
        ]
        table = tabulate(lines, headers=heads, disable_numparse=True)
        refused = list(dict.fromkeys(f"{k.name or k.node}: {k.refusal}." for k in self if k.refusal))
        return "\n".join([table, *(["", "In plain PyTorch:", *refused] if refused else [])])


def list_kernels(gm: fx.GraphModule, card: Card | None = None) -> Listing:
    """The kernels of a fused graph, as `card` (this machine's GPU, or an H200) would launch them."""
    on = card or (card_of(torch.device("cuda")) if torch.cuda.is_available() else H200)
    nodes = [node for node in gm.graph.nodes if node.target in NODES]
    return Listing(kernel for node in nodes for kernel in _of_node(node, on))


def kernels_of(node: fx.Node) -> Iterator[tuple[Spec, Kernel | SpecError, tuple[int, ...]]]:
    """Each piece of a fused node, its kernel or why there is none, and for how many tokens (BUCKETS) it is used."""
    spec, x = parse(str(node.args[3])), _value(node.args[0])
    extras = [_value(extra) for extra in node.args[2] or ()]  # type: ignore[union-attr]
    sizes: dict[str, int] = {}
    few, many = folded(spec), pieces(spec)
    uses = [(piece, tuple(at for at in BUCKETS if piece in (few if at <= FOLDED else many))) for piece in (*few, *many)]
    for piece, buckets in dict(uses).items():
        try:
            rows = generate(piece.spec, x.dtype, ("scalar",) * piece.spec.extras).rows
            shape = (*_sizes(x, sizes)[:-1], rows)
            kinds = tuple(_kind(source, extras, shape, sizes) for source in piece.extras)
            yield piece.spec, generate(piece.spec, x.dtype, kinds), buckets
        except SpecError as error:
            yield piece.spec, error, buckets


def _of_node(node: fx.Node, card: Card) -> Iterator[Emitted]:
    name = str(node.args[4]) if len(node.args) > 4 else ""
    for spec, kernel, buckets in kernels_of(node):
        if isinstance(kernel, SpecError):
            yield Emitted(node.name, name, str(spec), spec.steps[0].name, None, {}, str(kernel).removesuffix("."))
            continue
        path = write_source(kernel.source, digest_of(kernel.source))
        configs = {at: choose(kernel, at, card) for at in buckets}
        yield Emitted(node.name, name, str(spec), kernel.label, path, configs, missing(card))


def _kind(source: Source, extras: Sequence[Tensor], rows: tuple[int, ...], sizes: dict[str, int]) -> Kind:
    """As fxcompress.codegen.triton.launch.kernel_for finds it."""
    if not isinstance(source, Extra):
        return "full"
    try:
        return kind_of(_sizes(extras[source.index], sizes), rows)
    except SpecError:
        return "full"


def _sizes(tensor: Tensor, sizes: dict[str, int]) -> tuple[int, ...]:
    """A number for every symbol, the same for equal ones, and no guard made of it."""
    return tuple(s if type(s) is int else sizes.setdefault(str(s), 1009 + len(sizes)) for s in tensor.shape)


def _value(node: Any) -> Tensor:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value


def _told(kernel: Emitted, at: int) -> str:
    if kernel.refusal:
        return "plain PyTorch"
    if at not in kernel.configs:
        return "-"
    config = kernel.configs[at]
    if config is None:
        return "apart"
    split = f" / {config.split}" if config.split > 1 else ""
    return f"{config.block_m} x {config.block_n}{split}, {config.warps} warps"
