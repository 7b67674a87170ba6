"""A recipe: how one weight is expressed, and how each matrix of that expression is kept.

    keep                                                    the weight as it is
    quantize{bits=4, group_size=64}                         dense, quantized
    low_rank{rank=80}                                       U V, both in the weight's dtype
    low_rank{rank=80} | quantize{bits=8, group_size=64}     U V, both quantized

The text is what plans print, save and parse; `parse` is its inverse.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fxcompress.core.cost import Cost
from fxcompress.core.errors import SpecError
from fxcompress.core.metric import corrected_bias, local_error
from fxcompress.core.rewrite import Operand, Rewrite, Storage, Store, Structure, key_of, parse_spec
from fxcompress.core.site import Site, Use
from fxcompress.core.surgery import attribute_of, replace
from fxcompress.passes.dense import Dense

KEEP = "keep"


@dataclass(frozen=True)
class Recipe:
    """A structure, and one storage for all its matrices (None: the weight's own dtype)."""

    structure: Structure = field(default_factory=Dense)
    storage: Storage | None = None

    def __str__(self) -> str:
        parts = [str(p) for p in (self.structure, self.storage) if p is not None and not isinstance(p, Dense)]
        return " | ".join(parts) or KEEP

    @property
    def is_keep(self) -> bool:
        return isinstance(self.structure, Dense) and self.storage is None

    def stored_bytes(self, site: Site) -> int:
        """Bytes of everything that takes the weight's place (the bias is counted elsewhere, changed or not)."""
        size = site.weight.element_size()
        shapes = self.structure.matrices(site).values()
        stored = sum(self.storage.stored_bytes(r, c, size) if self.storage else r * c * size for r, c in shapes)
        return stored + self.structure.kept_bytes(site)

    def net_bytes(self, site: Site) -> int:
        """`stored_bytes` less what biases lose with it: what the choice costs a file. Below 0 where they lose more."""
        return self.stored_bytes(site) - self.structure.freed_bytes(site)

    def parameters(self, site: Site) -> int:
        """Elements of its matrices, however each is stored."""
        return sum(r * c for r, c in self.structure.matrices(site).values()) or site.weight.numel()

    def cost(self, site: Site) -> Cost:
        """Work of one forward: every use of the site, its weight stored once."""
        stored, size = self.stored_bytes(site), site.weight.element_size()
        costs = [self.structure.cost_at(site, use, stored, size) for use in site.uses]
        total = sum(costs[1:], costs[0])
        return Cost(total.flops, total.bytes, stored, total.launches)

    def refuses(self, site: Site) -> str | None:
        """Why one of its two parts cannot act at `site`, a clause; None if both can."""
        parts = (self.structure, self.storage) if self.storage is not None else (self.structure,)
        return next((why for part in parts if (why := part.refuses(site)) is not None), None)

    def at(self, site: Site) -> Recipe:
        """The recipe with shares made counts at `site`. Raises `SpecError` where its parameters do not fit there."""
        if self.storage is not None and not self.structure.matrices(site):
            raise SpecError(f"{self} at {site.name}: {self.structure.name} has its own way of storing.")
        return Recipe(self.structure.at(site), None if self.storage is None else self.storage.at(site))

    def error(self, site: Site, weight: Tensor) -> float:
        """The squared relative error at `site` once `weight` is what it reads (fxcompress.core.metric)."""
        return local_error(site, weight) + self.structure.input_error(site)

    def make(self, site: Site) -> Made:
        """Compute the tensors. Deterministic: the same site gives the same bits."""
        store = Store(self.storage)
        self.structure.factor(site, store)
        weight = self.structure.dense(store.read, site).to(site.weight.dtype)
        return Made(self, store, weight, bias_of(site, weight))

    def names(self, site: Site) -> tuple[str, ...]:
        """Of the tensors that `make` makes, but a bias."""
        matrices = [*self.structure.matrices(site)]
        keys = matrices if self.storage is None else [key_of(m, key) for m in matrices for key in self.storage.keys]
        return (*keys, *self.structure.keeps)

    def of(self, site: Site, tensors: Mapping[str, Tensor]) -> Made:
        """What `make` made, from its `names` (on meta, too) and the "bias" there may be; of `site` only the sizes and
        the dtype are read."""
        store = Store(self.storage)
        store.kept = set(self.structure.keeps)
        store.tensors = {name: tensors[name] for name in self.names(site)}
        for name, (rows, columns) in self.structure.matrices(site).items():
            store.likes[name] = torch.empty(rows, columns, dtype=site.weight.dtype, device="meta")
        return Made(self, store, site.weight.to("meta"), tensors.get("bias"))

    def draw(self, site: Site, generator: torch.Generator) -> Made:
        """A random start of the same shapes, for training from scratch."""
        store = Store(self.storage)
        self.structure.draw(site, generator, store)
        return Made(self, store, self.structure.dense(store.read, site).to(site.weight.dtype), None)


@dataclass(frozen=True, eq=False)
class Made:
    """A recipe carried out at one site."""

    recipe: Recipe
    store: Store
    weight: Tensor  # the dense weight it amounts to (rows, columns)
    bias: Tensor | None  # the bias that absorbs the mean of the error, where there is one

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What takes the weight's place, by attribute name."""
        return self.store.tensors

    def read(self, site: Site) -> Tensor:
        """The dense weight (rows, columns), from the tensors alone."""
        store, storage, found = self.store, self.recipe.storage, {name: self.tensors[name] for name in self.store.kept}
        for name, like in store.likes.items():
            if storage is None:
                found[name] = self.tensors[name]
            else:
                mine = {key: self.tensors[key_of(name, key)] for key in storage.keys}
                found[name] = storage.decode(mine, like)
        return self.recipe.structure.dense(found, site).to(self.weight.dtype)

    def settled(self) -> Made:
        """The same without its dense forms, to be kept: no larger than what is stored."""
        store = copy.copy(self.store)
        store.read = {}
        return Made(self.recipe, store, self.weight.to("meta"), self.bias)

    def apply(self, gm: fx.GraphModule, site: Site) -> None:
        """Put it into the graph in place of the site's weight."""
        bias = self._bias(site)
        tensors = self.tensors if bias is None else {**self.tensors, "bias": bias}
        trainable = {"bias", *(self.store.likes if self.recipe.storage is None else ())}
        replace(gm, site, tensors, trainable, self._emit, str(self.recipe))

    def _bias(self, site: Site) -> Tensor | None:
        """The bias to be stored anew: corrected, or cut to the rows that are left. Where others read it as well it
        stays; passes that cut rows shrink it at its place (fxcompress.passes.unit_groups)."""
        rows = self.recipe.structure.kept_rows(site) if site.correctable else None
        if rows is None:
            return self.bias
        whole = attribute_of(site.uses[0].bias) if self.bias is None else self.bias  # type: ignore[arg-type]
        return whole[rows]

    def _emit(self, graph: fx.Graph, use: Use, reads: Mapping[str, fx.Node]) -> fx.Node:
        names = [*self.store.likes, *sorted(self.store.kept)]
        operands = {name: self._operand(graph, name, reads) for name in names}
        return self.recipe.structure.emit(graph, use, operands, reads.get("bias", use.bias))

    def _operand(self, graph: fx.Graph, name: str, reads: Mapping[str, fx.Node]) -> Operand:
        storage = self.recipe.storage
        if storage is None or name in self.store.kept:
            return Operand(
                lambda: reads[name],
                lambda ids: graph.call_function(torch.ops.aten.embedding.default, (reads[name], ids)),
            )
        like = self.store.likes[name]
        mine = {key: reads[key_of(name, key)] for key in storage.keys}
        return Operand(lambda: storage.read(graph, mine, like), lambda ids: storage.lookup(graph, mine, like, ids))


def bias_of(site: Site, weight: Tensor) -> Tensor | None:
    """The site's bias once it absorbs the mean error of `weight`; None where it has none that could."""
    node = site.uses[0].bias
    if node is None or not site.correctable or site.statistics.mean is None:
        return None
    return corrected_bias(site, weight, attribute_of(node))


def parse(text: str, known: Iterable[type[Rewrite]]) -> Recipe:
    """The inverse of `str(recipe)`. Raises `SpecError`."""
    if text.strip() == KEEP:
        return Recipe()
    names = {r.name: r for r in known}
    structure, storage = None, None
    for part in text.split("|"):
        rewrite = parse_spec(part, names)
        if isinstance(rewrite, Structure) and structure is None and storage is None:
            structure = rewrite
        elif isinstance(rewrite, Storage) and storage is None:
            storage = rewrite
        else:
            raise SpecError(
                f"{text!r}: write at most one structure, then at most one storage, "
                "as in 'low_rank{rank=80} | quantize{bits=4, group_size=64}'."
            )
    return Recipe(structure or Dense(), storage)
