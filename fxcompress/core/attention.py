"""An attention site: one aten.scaled_dot_product_attention node, y = softmax(s q k^T + mask) v, and how to replace it.

    q (..., heads, m, head_dim)   k (..., heads, n, head_dim)   v (..., heads, n, d_v)   mask (..., m, n) or none

A rewrite that treats all queries alike may act where the mask is about keys alone (padding), which
fxcompress.core.key_mask proves from the graph. Any other mask is named for the refusal: causal, or one that depends on
the query in another way (a window, a bias by distance).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import sympy
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxcompress.core.calibrate import Call
from fxcompress.core.cost import Cost
from fxcompress.core.key_mask import ancestors, ignores_queries
from fxcompress.core.rewrite import Rewrite
from fxcompress.core.site import Site

_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_UNBOUNDED = 1 << 31  # no sequence is longer; torch.export writes "any size" as a number of that order

MaskKind = Literal["none", "keys", "causal", "queries"]


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """name: the module that owns the node, with "@1", "@2", ... where it is called again (shared layers)."""

    name: str
    owner: str  # path of that module; "" where the graph does not tell
    node: fx.Node
    mask_kind: MaskKind

    kind: ClassVar[str] = "attention"

    @property
    def q(self) -> fx.Node:
        """(..., heads, m, head_dim). Read off the node each time, as everything: surgery may have replaced it."""
        return self.node.args[0]  # type: ignore[return-value]

    @property
    def k(self) -> fx.Node:
        """(..., heads, n, head_dim)."""
        return self.node.args[1]  # type: ignore[return-value]

    @property
    def v(self) -> fx.Node:
        """(..., heads, n, d_v)."""
        return self.node.args[2]  # type: ignore[return-value]

    @property
    def mask(self) -> fx.Node | None:
        """(..., m, n), bool (True where the key is seen) or additive."""
        found: fx.Node | None = _argument(self.node, "attn_mask")
        return found

    @property
    def causal(self) -> bool:
        return self.mask_kind == "causal"

    @property
    def scale(self) -> float | None:
        """s; None is 1 / sqrt(head_dim)."""
        found: float | None = _argument(self.node, "scale")
        return found

    @property
    def dropout(self) -> float:
        return float(_argument(self.node, "dropout_p"))

    @property
    def heads(self) -> int:
        return int(self.shape("q")[-3]) if len(self.shape("q")) > 2 else 1

    @property
    def head_dim(self) -> int:
        return int(self.shape("q")[-1])

    @property
    def max_keys(self) -> int | None:
        """The longest n the graph takes; None where there is no limit."""
        size = self.shape("k")[-2]
        if isinstance(size, int):
            return size
        upper = size.node.shape_env.bound_sympy(size.node.expr).upper
        return int(upper) if upper.is_Integer and upper < _UNBOUNDED else None

    def shape(self, which: Literal["q", "k", "v"]) -> torch.Size:
        """Of q, k or v, in the graph's symbols."""
        shape: torch.Size = getattr(self, which).meta["val"].shape
        return shape

    def size(self, which: Literal["q", "k", "v"], dim: int) -> sympy.Expr:
        """One dimension of it, for a cost."""
        found = self.shape(which)[dim]
        return found.node.expr if isinstance(found, torch.SymInt) else sympy.Integer(found)

    @property
    def batch(self) -> sympy.Expr:
        """Sequences in one forward."""
        return sympy.prod([self.size("q", dim) for dim in range(len(self.shape("q")) - 3)], start=sympy.Integer(1))


@dataclass(frozen=True, eq=False)
class AttentionSample:
    """What flowed through a site in one batch, in float32 whatever the model computes in."""

    q: Tensor  # (..., heads, m, head_dim)
    k: Tensor  # (..., heads, n, head_dim)
    v: Tensor  # (..., heads, n, d_v)
    mask: Tensor | None  # (..., n), of the keys
    scale: float | None

    def rows(self, rows: slice) -> AttentionSample:
        """Some of the sequences."""
        mask = self.mask
        if mask is not None and mask.dim() == self.k.dim() - 1 and mask.shape[0] == len(self.k):
            mask = mask[rows]
        return AttentionSample(self.q[rows], self.k[rows], self.v[rows], mask, self.scale)


class AttentionRewrite(Rewrite):
    """Another way to compute an attention node: the sibling of a `Structure`, which expresses a weight.

    A driver asks `refuses(site)`, then `at(site)`, then takes tensors from `factor` or `draw` to `apply`, and calls
    fxcompress.core.surgery.finish once after its last site.
    """

    kinds: ClassVar[tuple[str, ...]] = ("attention",)

    @classmethod
    @abstractmethod
    def refuses(cls, site: Site | AttentionSite) -> str | None: ...

    @classmethod
    @abstractmethod
    def space(cls, site: Site | AttentionSite) -> Iterator[Self]: ...

    def at(self, site: Site | AttentionSite) -> Self:
        """With every parameter that was left open settled for `site`. Raises `SpecError` as `check` does."""
        self.check(site)
        return self

    def check(self, site: Site | AttentionSite) -> None:
        """Raise a `SpecError` that names the site, what was found and what is allowed, if the parameters do not fit."""

    @abstractmethod
    def factor(self, site: AttentionSite, samples: Sequence[AttentionSample] = ()) -> dict[str, Tensor]:
        """The tensors of the replacement that is nearest to exact attention, as far as `samples` tell."""

    @abstractmethod
    def draw(self, site: AttentionSite, generator: torch.Generator) -> dict[str, Tensor]:
        """A random start in place of `factor`."""

    @abstractmethod
    def emit(self, graph: fx.Graph, site: AttentionSite, operands: Mapping[str, fx.Node]) -> fx.Node:
        """Insert the replacement and return it. Must not erase or rewire anything."""

    @abstractmethod
    def cost(self, site: AttentionSite) -> Cost:
        """Work of one forward, in the graph's symbols."""

    def apply(self, gm: fx.GraphModule, site: AttentionSite, tensors: Mapping[str, Tensor]) -> None:
        """Put the replacement into the graph. fxcompress.core.surgery.finish must follow."""
        replace_attention(gm, site, tensors, self.emit, str(self))


def find_attention_sites(gm: fx.GraphModule) -> list[AttentionSite]:
    """Every attention node of the graph, in its order."""
    sites: list[AttentionSite] = []
    calls: dict[str, int] = {}
    kinds: dict[fx.Node | None, MaskKind] = {}  # layers share a mask
    for node in gm.graph.find_nodes(op="call_function", target=_SDPA):
        owner = _owner(node)
        again = calls[owner] = calls.get(owner, -1) + 1
        name = (f"{owner}@{again}" if again else owner) if owner else node.name
        mask = _argument(node, "attn_mask")
        if _argument(node, "is_causal") is not False:
            kind: MaskKind = "causal"
        else:
            kind = kinds[mask] = kinds.get(mask) or _mask_kind(gm, mask)
        sites.append(AttentionSite(name, owner, node, kind))
    return sites


def observe_attention(
    gm: fx.GraphModule, site: AttentionSite, calls: Iterable[Call], tokens: int = 4096
) -> list[AttentionSample]:
    """What flows through `site` for `calls`, from the first to the one that completes `tokens` keys.

    One site at a time: q, k and v of all layers together are as large as the model's activations.
    """
    wanted = [n for n in (site.q, site.k, site.v, site.mask) if n is not None]
    samples: list[AttentionSample] = []
    for call in calls:
        values = _evaluate(gm, wanted, pytree.tree_leaves(call))
        q, k, v, *mask = [value.float() if value.is_floating_point() else value for value in values]
        samples.append(AttentionSample(q, k, v, key_mask(mask[0]) if mask else None, site.scale))
        tokens -= k.shape[-2] * k.shape[:-3].numel()
        if tokens <= 0:
            break
    return samples


def key_mask(mask: Tensor) -> Tensor:
    """(..., m, n), all rows the same -> (..., n)."""
    return mask if mask.dim() < 2 else mask.select(-2, 0)


def replace_attention(
    gm: fx.GraphModule,
    site: AttentionSite,
    tensors: Mapping[str, Tensor],
    emit: Callable[[fx.Graph, AttentionSite, Mapping[str, fx.Node]], fx.Node],
    note: str,
) -> None:
    """`emit`'s call in place of the site's node, `tensors` as parameters of its module. `finish` must follow.

    The conventions of fxcompress.core.surgery, for a node that owns no weight.
    """
    if site.owner not in dict(gm.named_modules()):  # it held no tensor, so it was not captured
        gm.add_submodule(site.owner, nn.Module())
    owner, (_, _, again) = gm.get_submodule(site.owner), site.name.partition("@")
    graph, old = gm.graph, site.node
    before = set(graph.nodes)
    with graph.inserting_before(old):
        operands = {}
        for key, tensor in tensors.items():
            attribute = f"{key}_{again}" if again else key
            owner.register_parameter(attribute, nn.Parameter(tensor, requires_grad=False))
            operands[key] = graph.get_attr(f"{site.owner}.{attribute}".lstrip("."))
            operands[key].meta["val"] = torch.empty_like(tensor, device="meta")
        new = emit(graph, site, operands)
    for key in ("val", "tensor_meta", "nn_module_stack", "stack_trace", "from_node"):
        if key in old.meta:
            new.meta[key] = old.meta[key]
    new.meta["fxcompress"] = f"{note}, was {str(old.target).removesuffix('.default')} at {site.name}"
    for node in set(graph.nodes) - before:
        if "val" not in node.meta:
            node.meta["val"] = node.target(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in node.args))
    old.replace_all_uses_with(new)
    graph.erase_node(old)


def _mask_kind(gm: fx.GraphModule, mask: fx.Node | None) -> MaskKind:
    if mask is None:
        return "none"
    if ignores_queries(mask):
        return "keys"
    return "causal" if _hides_the_future(gm, mask) else "queries"


def _hides_the_future(gm: fx.GraphModule, mask: fx.Node) -> bool:
    """For the wording of a refusal only: at the captured sizes, with inputs of ones, no query sees a later key."""
    if "signature" not in gm.meta:
        return False
    slots = gm.meta["signature"].slots
    leaves = [s.example() for s in slots]
    with torch.no_grad():
        (value,) = _evaluate(gm, [mask], [torch.ones_like(x) if isinstance(x, Tensor) else x for x in leaves])
    seen = value if value.dtype == torch.bool else value > torch.finfo(value.dtype).min / 2
    return bool(seen.any()) and not bool(seen.triu(1).any())


def _evaluate(gm: fx.GraphModule, wanted: Sequence[fx.Node], leaves: Sequence[Any]) -> list[Any]:
    """The values of some nodes; what they do not need is not run."""
    reader = _Reader(gm, wanted)
    with torch.no_grad():
        reader.run(*leaves, enable_io_processing=False)
    return [reader.seen[node] for node in wanted]


class _Reader(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, wanted: Sequence[fx.Node]) -> None:
        super().__init__(gm)
        self.needed = set[fx.Node]().union(*(ancestors(node) for node in wanted))
        self.wanted, self.seen = set(wanted), dict[fx.Node, Any]()

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "placeholder" and n not in self.needed:
            return None
        value = super().run_node(n)
        if n in self.wanted:
            self.seen[n] = value
        return value


def _owner(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def _argument(node: fx.Node, name: str) -> Any:
    """By name, wherever it was given; its default where it was not."""
    for at, argument in enumerate(_SDPA._schema.arguments):
        if argument.name == name:
            given = node.args[at] if at < len(node.args) else argument.default_value
            return node.kwargs.get(name, given)
    raise AssertionError(name)
