"""What each candidate takes once the model is lowered to this CPU, predicted from the machine's measured profile.

    seconds of a candidate = sum over the uses of its site of the products (or the lookup) that `lower` makes of it
    fixed seconds          = seconds of the lowered model as it is - what its sites take of that
    original seconds       = of the captured graph itself, run the same way

So a plan that keeps everything is predicted to take what the whole lowered graph is, and each choice adds the
difference of its own products. What becomes of a recipe is decided by the rules that `lower` follows
(fxcompress.codegen.cpu.rules): low rank is two products or one dense one, blocks keep their structure or are decoded,
everything else is decoded to a dense matrix in int8. NB: products of one input are lowered to one call, which rounds it
once; here each pays for its own, so plans with many of them are a little faster than predicted.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import sympy
import torch

from fxcompress.codegen.cpu.lower import lower_graph, lower_pointwise
from fxcompress.codegen.cpu.rules import is_two_products, stays_structured
from fxcompress.codegen.cpu.seconds import chain_seconds, seconds_of
from fxcompress.core.plan import KEEP, Candidate, Plan
from fxcompress.core.rewrite import Storage
from fxcompress.core.signature import SignedModule
from fxcompress.core.site import Site, Use, find_sites, tokens_of
from fxcompress.core.workload import Workload, bind, weighted
from fxcompress.cost_model.device import DeviceProfile, Target
from fxcompress.passes import REWRITES
from fxcompress.passes.block_low_rank import BlockLowRank
from fxcompress.passes.hidden_units import HiddenUnits
from fxcompress.passes.low_rank import LowRank
from fxcompress.passes.monarch import Monarch
from fxcompress.passes.quantize import Quantize
from fxcompress.passes.recipe import Recipe, parse

_BLOCKS = (BlockLowRank.name, Monarch.name)


@dataclass(frozen=True)
class Pricing:
    """sizes: what each size symbol of the graph is in a call of each workload."""

    profile: DeviceProfile
    target: Target
    workload: tuple[Workload, ...]
    sizes: tuple[Mapping[str, int], ...]
    elements: float  # of all weights that are multiplied: they pass through the cache between two calls of a product
    _known: dict[Hashable, float] = field(default_factory=dict, repr=False)  # of a chain: layers repeat their shapes

    @classmethod
    def of(cls, gm: SignedModule, workload: Sequence[Workload], profile: DeviceProfile, target: Target) -> Pricing:
        """Raises `WorkloadError` where the graph cannot be called so."""
        elements = sum(site.weight.numel() for site in find_sites(gm) if site.kind != "embedding")
        return cls(profile, target, tuple(workload), tuple(bind(gm, w) for w in workload), float(elements))

    def seconds(self, recipe: Recipe, site: Site) -> tuple[float, ...]:
        """Of one call of each workload."""
        return tuple(sum(self._use(recipe, site, use, sizes) for use in site.uses) for sizes in self.sizes)

    def latency(self, recipe: Recipe, site: Site) -> float:
        """The mean of them, weighted."""
        return weighted(self.seconds(recipe, site), self.workload)

    def _use(self, recipe: Recipe, site: Site, use: Use, sizes: Mapping[str, int]) -> float:
        tokens = count_of(use, sizes)
        if use.kind == "embedding":
            return self._lookup(recipe, site, tokens)
        if use.kind == "convolution":
            return self._convolution(recipe, site, tokens)
        if (multiplications := _structured(recipe, site)) is not None:
            return self._floats(tokens, site, multiplications)
        products, group, kept = products_of(recipe, site), group_of(recipe.storage), recipe.is_keep
        key = tokens, products, group, kept, site.weight.dtype
        if key not in self._known:
            self._known[key] = chain_seconds(
                products,
                tokens,
                self.profile,
                target=self.target,
                dtype=site.weight.dtype,
                groups=[group] * len(products),
                working_set=self.elements * (2 if kept else 1),  # if all were kept in bf16, or all in int8
            )
        return self._known[key]

    def _lookup(self, recipe: Recipe, site: Site, ids: float) -> float:
        if not recipe.is_keep and recipe.structure.name == LowRank.name:  # rows of U, then a product
            rank, _ = recipe.structure.matrices(site)["v"]
            product = self.profile.product_seconds("float", ids, site.columns, rank, target=self.target)
            return self.profile.pass_seconds("gather", ids, rank, self.target) + product
        return self.profile.pass_seconds("embedding" if recipe.is_keep else "gather", ids, site.columns, self.target)

    def _convolution(self, recipe: Recipe, site: Site, tokens: float) -> float:
        """Convolutions are not lowered: floats, and what is stored otherwise is decoded on every call."""
        matrices = recipe.structure.matrices(site)
        multiplications = sum(r * c for r, c in matrices.values()) if recipe.structure.name == LowRank.name else None
        whole = self._floats(tokens, site, multiplications or site.rows * site.columns)
        if recipe.is_keep or (recipe.storage is None and multiplications is not None):
            return whole
        return whole + 2 * self.profile.pass_seconds("mul", site.rows, site.columns, self.target)

    def _floats(self, tokens: float, site: Site, multiplications: int) -> float:
        """At the rate of the dense product."""
        whole = self.profile.product_seconds("float", tokens, site.rows, site.columns, target=self.target)
        return whole * multiplications / (site.rows * site.columns)


def priced(plan: Plan, original: SignedModule, sites: Sequence[Site], pricing: Pricing) -> Plan:
    """`plan` with the seconds of every candidate, of the rest of the model, and of the model as it was."""
    by_name = {site.name: site for site in sites}
    known: dict[tuple[str, str], tuple[float, ...]] = {}

    def put(candidate: Candidate) -> Candidate:
        key = candidate.site, candidate.spec
        if key not in known:
            known[key] = pricing.seconds(parse(candidate.spec, REWRITES), by_name[candidate.site])
        return replace(candidate, seconds=known[key])

    candidates, choices = tuple(map(put, plan.candidates)), tuple(map(put, plan.choices))
    with torch.no_grad():
        kept = lower_graph(original, pricing.profile, pricing.target)
        kept = lower_pointwise(kept) if pricing.target == "inductor" else kept
    whole, before = ([_total(gm, pricing, sizes) for sizes in pricing.sizes] for gm in (kept, original))
    own = [sum(c.seconds[w] for c in candidates if c.spec == KEEP) for w in range(len(pricing.workload))]
    return replace(
        plan,
        candidates=candidates,
        choices=choices,
        workload=pricing.workload,
        fixed_seconds=tuple(max(0.0, all_ - mine) for all_, mine in zip(whole, own)),
        original_seconds=tuple(before),
        target=pricing.target,
    )


def _total(gm: SignedModule, pricing: Pricing, sizes: Mapping[str, int]) -> float:
    return float(seconds_of(gm, pricing.profile, sizes, pricing.target).total)


def products_of(recipe: Recipe, site: Site) -> tuple[tuple[int, int, bool], ...]:
    """(rows, columns, compressed) of the products that `lower` makes of the site's, one after the other."""
    structure = recipe.structure
    if isinstance(structure, HiddenUnits):  # a dense weight of what is left
        rows, columns = structure.matrices(site)["weight"]
        return ((rows, columns, recipe.storage is not None),)
    if structure.name == LowRank.name:
        rank, _ = structure.matrices(site)["v"]
        if is_two_products(rank, site.rows, site.columns):
            return (rank, site.columns, True), (site.rows, rank, True)
    return ((site.rows, site.columns, not recipe.is_keep),)


def group_of(storage: Storage | None) -> int | None:
    """Columns of a scale, where codes are of 4 bits or fewer and the int4 kernel may read them as they are."""
    return storage.group_size if isinstance(storage, Quantize) and storage.bits <= 4 else None


def count_of(use: Use, sizes: Mapping[str, int]) -> float:
    """Tokens, output positions or ids of one call; a symbol that is no input's size counts as 1."""
    tokens = sympy.sympify(tokens_of(use))
    return float(tokens.xreplace({s: sympy.Integer(sizes.get(str(s), 1)) for s in tokens.free_symbols}))


def _structured(recipe: Recipe, site: Site) -> int | None:
    """Multiplications a token of a structure that keeps its op; None where it becomes products."""
    if recipe.structure.name not in _BLOCKS:
        return None
    kept = sum(rows * columns for rows, columns in recipe.structure.matrices(site).values())
    return kept if stays_structured(kept, site.rows, site.columns) else None
