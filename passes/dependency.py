"""Hidden units: what inside a network can be cut out of several weights at once without anything else noticing.

A hidden unit is made by rows of some linears (and their biases), passes through ops that keep it apart from its
neighbours, and is read by columns of other linears. Which rows and columns belong together is read off the graph:

    1. Every op ties dimensions of what it reads to dimensions of what it makes (fxcompress.passes.dimension_ties).
    2. Reshapes cut dimensions into factors: 96 ~ (3, 4, 8) where a fused q|k|v is split in 3 and viewed as 4 heads of
       8. A factorisation is a chain of strides, here {1, 8, 32}; every dimension gets the strides of those it is tied
       to, until nothing changes.
    3. Vertices are these factors, (holder, axis, stride); edges are the ties. A connected component is cut together.
    4. A component is a group if nothing refuses it (a norm over it, an output, an op that is not known), if it holds
       rows of at least one linear and columns of at least one. Unit u of n is then the u-th entry of the factor in
       every dimension of the component: position (outer, u, stride).

So neurons of a feed-forward layer, of a gated one, heads of attention, and whole groups of heads that share a key are
found by the same few lines; the residual stream is refused by its norms.

Paper: Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023 (arXiv 2301.12900), groups as the components of
a dependency graph.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import networkx as nx
import torch
from torch import Tensor, fx

from fxcompress.core.site import Site, find_sites
from fxcompress.passes.dimension_ties import Dim, Ties, read_ties, stored


@dataclass(frozen=True)
class Span:
    """Where units lie in one dimension of size outer * units * width."""

    outer: int
    units: int
    width: int

    @property
    def size(self) -> int:
        return self.outer * self.units * self.width

    def by_unit(self) -> Tensor:
        """Positions of each unit: (units, outer * width) int64."""
        return torch.arange(self.size).view(self.outer, self.units, self.width).transpose(0, 1).reshape(self.units, -1)

    def positions(self, kept: Tensor) -> Tensor:
        """Positions of the units `kept`, as they lie: (outer * len(kept) * width,) int64."""
        return torch.arange(self.size).view(self.outer, self.units, self.width)[:, kept].reshape(-1)


class Cut(NamedTuple):
    """One dimension that shrinks."""

    holder: str  # path of a stored tensor, or name of a node
    axis: int
    span: Span


@dataclass(frozen=True)
class HiddenGroup:
    """Units that several weights make and read; named after the first site that reads them."""

    producers: tuple[str, ...]  # names of the sites whose rows make the units
    consumers: tuple[str, ...]  # names of the sites whose columns read them
    units: int
    width: int  # columns of the first consumer that one unit fills: 1 for a neuron, the size of a head for a head
    stored: tuple[Cut, ...]  # every stored tensor that shrinks: weights, biases, other vectors
    values: tuple[Cut, ...]  # every value that shrinks

    @property
    def name(self) -> str:
        return self.consumers[0]

    @property
    def sites(self) -> tuple[str, ...]:
        return (*self.producers, *self.consumers)

    def span_of(self, site: Site) -> Span:
        """Where the units lie among the columns of a consumer, or the rows of a producer."""
        axis = _columns_axis(site) if site.name in self.consumers else 1 - _columns_axis(site)
        return next(c.span for c in self.stored if c.holder in site.paths and c.axis == axis)


@dataclass(frozen=True)
class Refused:
    """Weights that make and read the same units, of which none can be cut."""

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    why: str  # a clause, lower case, no full stop


class _Factor(NamedTuple):
    """A vertex: the factor of a dimension whose entries lie `stride` apart."""

    dim: Dim
    stride: int


def find_groups(gm: fx.GraphModule) -> tuple[list[HiddenGroup], list[Refused]]:
    """Every group of hidden units of a captured graph, and what was refused; both in the order of the graph."""
    sites = find_sites(gm)
    ties = read_ties(gm, sites)
    graph = dependency_graph(ties)
    order = {vertex: index for index, vertex in enumerate(graph)}
    rows = {Dim(stored(s.paths[0]), 1 - _columns_axis(s)): s.name for s in sites if s.kind == "linear"}
    columns = {Dim(stored(s.paths[0]), _columns_axis(s)): s.name for s in sites if s.kind == "linear"}
    groups: list[HiddenGroup] = []
    refused: list[Refused] = []
    for component in nx.connected_components(graph):
        factors = sorted(component, key=order.__getitem__)
        producers, consumers = (_named(table, factors) for table in (rows, columns))
        if not producers or not consumers:
            continue
        why = next((graph.nodes[f]["why"] for f in factors if graph.nodes[f]["why"]), None)
        if why is None and len({f.dim for f in factors}) < len(factors):
            why = "two factors of one dimension are tied to each other"
        if why is not None:
            refused.append(Refused(producers, consumers, why))
        else:
            groups.append(_group(graph, factors, producers, consumers, columns, ties.sizes))
    return _apart(groups, refused)


def dependency_graph(ties: Ties) -> nx.Graph:
    """Factors of dimensions, joined where they are cut together; each vertex knows its `length`, and `why` not."""
    strides, unlike = factorise(ties)
    whys = dict(ties.refusals)
    for sides in ties.ties:
        if unlike.intersection(sides[0] + sides[1]):  # no factor of one side is a factor of the other
            whys.update(dict.fromkeys(sides[0] + sides[1], "its views cut it in ways that do not nest"))
    graph = nx.Graph()
    for dim, size in ties.sizes.items():
        chain = [*sorted(strides[dim]), size]
        for stride, end in itertools.pairwise(chain):
            graph.add_node(_Factor(dim, stride), length=end // stride, why=whys.get(dim))
    for sides in ties.ties:
        if not unlike.intersection(sides[0] + sides[1]):
            left, right = (_flattened(side, strides, ties.sizes) for side in sides)
            graph.add_edges_from((left[stride], right[stride]) for stride in left)
    return graph


def factorise(ties: Ties) -> tuple[dict[Dim, set[int]], set[Dim]]:
    """-> (the strides of every dimension, 1 among them; the dimensions whose views do not nest)."""
    strides: dict[Dim, set[int]] = {dim: {1} for dim in ties.sizes}
    unlike: set[Dim] = set()
    changed = True
    while changed:
        changed = False
        for sides in (*ties.ties, *reversed(ties.ties)):  # both ways: strides travel along and against the graph
            found = {f for side in sides for f in _flattened(side, strides, ties.sizes)}
            chain = [*sorted(found), math.prod(ties.sizes[dim] for dim in sides[0])]
            if any(above % below for below, above in itertools.pairwise(chain)):
                unlike.update(*sides)
                continue
            for side in sides:
                changed |= _learn(side, found, strides, ties.sizes)
    return strides, unlike


def _flattened(
    dims: Sequence[Dim], strides: Mapping[Dim, Iterable[int]], sizes: Mapping[Dim, int]
) -> dict[int, _Factor]:
    """The factors of several dimensions taken as one, by their stride in it."""
    found, inner = {}, 1
    for dim in reversed(dims):
        found.update({inner * stride: _Factor(dim, stride) for stride in strides[dim]})
        inner *= sizes[dim]
    return found


def _learn(dims: Sequence[Dim], flat: set[int], strides: dict[Dim, set[int]], sizes: Mapping[Dim, int]) -> bool:
    """Give each dimension its share of the flattened strides; True where one was new."""
    new, inner = False, 1
    for dim in reversed(dims):
        mine = {f // inner for f in flat if inner <= f < inner * sizes[dim] and f % inner == 0}
        new |= not mine <= strides[dim]
        strides[dim] |= mine
        inner *= sizes[dim]
    return new


def _named(table: Mapping[Dim, str], factors: Sequence[_Factor]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(table[f.dim] for f in factors if f.dim in table))


def _group(
    graph: nx.Graph,
    factors: Sequence[_Factor],
    producers: tuple[str, ...],
    consumers: tuple[str, ...],
    columns: Mapping[Dim, str],
    sizes: Mapping[Dim, int],
) -> HiddenGroup:
    cuts = []
    for factor in factors:
        units = graph.nodes[factor]["length"]
        span = Span(sizes[factor.dim] // (factor.stride * units), units, factor.stride)
        cuts.append(Cut(*factor.dim, span))
    own = stored("")
    tensors = tuple(c._replace(holder=c.holder.removeprefix(own)) for c in cuts if c.holder.startswith(own))
    values = tuple(c for c in cuts if not c.holder.startswith(own))
    units = cuts[0].span.units
    width = next(cut.span.size // units for factor, cut in zip(factors, cuts) if factor.dim in columns)
    return HiddenGroup(producers, consumers, units, width, tensors, values)


def _apart(groups: Sequence[HiddenGroup], refused: list[Refused]) -> tuple[list[HiddenGroup], list[Refused]]:
    """Two groups that cut one dimension, such as groups of heads and the heads within: the larger units stay."""
    taken: dict[tuple[str, int], HiddenGroup] = {}
    for group in sorted(groups, key=lambda g: -max(c.span.width for c in g.stored)):
        dims = [(c.holder, c.axis) for c in group.stored]
        other = next((taken[d] for d in dims if d in taken), None)
        if other is None:
            taken.update(dict.fromkeys(dims, group))
        else:
            why = f"its units lie within the larger ones of {other.name}"
            refused = [*refused, Refused(group.producers, group.consumers, why)]
    return [g for g in groups if g in taken.values()], refused


def _columns_axis(site: Site) -> int:
    return 0 if site.transposed else 1
