"""A site: one weight matrix, every node that reads it, and what calibration knows about its inputs.

    linear        y = x W^T + b        aten.linear, addmm, mm, matmul with a constant weight (Conv1D's is transposed)
    convolution   y[t] = W p[t] + b    aten.conv1d, conv2d, conv3d, convolution; p[t] the patch at output position t
                                       (fxcompress.core.convolution)
    embedding     y = W[ids]           aten.embedding
    experts       y[r] = W[e] x[r]     fxcompress.experts_linear; all experts are one matrix and one decision
                                       (fxcompress.core.experts)

A weight read by several nodes (tied embeddings, shared layers) is one site: one decision, one set of stored tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, TypeVar

import sympy
import torch
from torch import Tensor, fx

from fxcompress.core.convolution import TARGETS, Window
from fxcompress.core.cost import ZERO, Cost, linear_cost
from fxcompress.core.experts import EXPERTS
from fxcompress.core.held import Held

T = TypeVar("T")
aten = torch.ops.aten
_TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default)


@dataclass(frozen=True, eq=False)
class Use:
    """One node that reads the weight. x and bias are read off the node each time: surgery may have replaced them."""

    kind: Literal["linear", "embedding", "convolution", "experts"]
    node: fx.Node
    x_at: int  # position of x among the node's arguments
    bias_at: int | None = None
    window: Window | None = None  # of a convolution
    experts: int = 1
    key: str = ""  # names its inputs for calibration: x as it was found, and the window; Q, K and V have one in common

    @property
    def x(self) -> fx.Node:
        """(..., in) activations, sorted by expert where there are experts, (N, channels, *sizes) or (channels, *sizes)
        of a convolution, or (...) integer ids."""
        return self.node.args[self.x_at]  # type: ignore[return-value]

    @property
    def bias(self) -> fx.Node | None:
        if self.bias_at is None or self.bias_at >= len(self.node.args):
            return None
        return self.node.args[self.bias_at]  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class Statistics:
    """What calibration saw at a site; None where there was no data.

    second_moment: E[x x^T] (in, in) float64 over the inputs of its linear uses, or the patches of its convolutions
    mean: E[x] (in,) float64
    check: held-out inputs, in whose moments errors are judged (a fit to H flatters H)
    sample: a few of the inputs themselves (tokens, in) float32, for what no moment tells (ranges, rounding of x)
    row_weight: probability of each row (rows,) float64 over the ids of its embedding uses
    column_metric: (columns, columns) float64, how the output reacts to the looked-up row: E[g g^T] of its gradients
    """

    second_moment: Tensor | None = None
    mean: Tensor | None = None
    check: Held | None = None
    sample: Tensor | None = None
    row_weight: Tensor | None = None
    column_metric: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Site:
    """One weight (rows, columns): (out_features, in_features) of a linear, (vocabulary, features) of an embedding,
    (out_channels, in_channels prod(kernel)) of a convolution, (experts out_features, in_features) of experts.
    """

    name: str  # fully qualified name of the weight's owner, "encoder.layer.0.attention.self.query"
    paths: tuple[str, ...]  # every attribute of the GraphModule that is this tensor, "….query.weight"
    weight: Tensor  # W (rows, columns), a view in this orientation
    uses: tuple[Use, ...]
    transposed: bool = False  # the attribute itself is kept as (columns, rows)
    statistics: Statistics = Statistics()
    _analyses: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @property
    def rows(self) -> int:
        return self.weight.shape[0]

    @property
    def columns(self) -> int:
        return self.weight.shape[1]

    @property
    def kind(self) -> str:
        """linear, embedding, convolution, experts, or tied (linear and embedding)."""
        kinds = {use.kind for use in self.uses}
        return "tied" if len(kinds) > 1 else next(iter(kinds))

    @property
    def dense_bytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()

    @property
    def dense_cost(self) -> Cost:
        total = ZERO
        for use in self.uses:
            total += use_cost(use, self.rows, self.columns, self.dense_bytes, self.weight.element_size())
        return Cost(total.flops, total.bytes, self.dense_bytes, total.launches)  # stored once, however often it is read

    @property
    def correctable(self) -> bool:
        """True where a bias can absorb the mean of the error: the one use is a product with a bias of its own."""
        bias = self.uses[0].bias
        return len(self.uses) == 1 and self.kind != "embedding" and bias is not None and len(bias.users) == 1

    def stored(self, weight: Tensor) -> Tensor:
        """`weight` (rows, columns) in the shape of the attribute."""
        window = self.uses[0].window
        if window is not None:
            return weight.reshape(-1, window.channels, *window.kernel)
        if self.kind == "experts":
            return weight.reshape(self.uses[0].experts, -1, weight.shape[1])
        return weight.t() if self.transposed else weight

    def knowing(self, statistics: Statistics) -> Self:
        """The same site with other statistics, and nothing computed from the old ones."""
        return replace(self, statistics=statistics, _analyses={})

    def analysis(self, compute: Callable[[Site], T]) -> T:
        """`compute(self)`, once per site: all ranks read one SVD, all bit widths one Cholesky factor."""
        if compute not in self._analyses:
            self._analyses[compute] = compute(self)
        found: T = self._analyses[compute]
        return found

    def forget(self) -> None:
        """Drop the analyses; they are as large as the weight and are made again when asked for."""
        self._analyses.clear()


def use_cost(use: Use, rows: int, columns: int, weight_bytes: int, itemsize: int) -> Cost:
    """One use of a (rows, columns) weight kept in `weight_bytes`."""
    tokens = tokens_of(use)
    if use.kind == "linear":
        return linear_cost(tokens, rows, columns, weight_bytes, itemsize)
    if use.kind == "experts":  # each row meets one expert
        one = linear_cost(tokens, rows // use.experts, columns, weight_bytes, itemsize)
        return Cost(one.flops, one.bytes, weight_bytes, one.launches)
    if use.kind == "convolution":  # patches overlap: x is read once, however often its values are multiplied
        traffic = (_count(use.x) + tokens * rows) * itemsize + weight_bytes
        return Cost(2 * tokens * rows * columns, traffic, weight_bytes)
    gathered = tokens * columns * itemsize
    return Cost(sympy.Integer(0), 2 * gathered, weight_bytes)


def tokens_of(use: Use) -> sympy.Expr:
    """Rows of x (linear), output positions (convolution) or ids (embedding) in one forward, in the graph's symbols."""
    if use.window is not None:
        return _count(use.node, without=-1 - len(use.window.kernel))
    return _count(use.x, without=None if use.kind == "embedding" else -1)


def _count(node: fx.Node, without: int | None = None) -> sympy.Expr:
    """Elements of the node's value, not counting along the dimension `without` (a negative number)."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return sympy.Symbol("tokens")
    product = sympy.Integer(1)
    for axis, size in enumerate(value.shape, start=-value.dim()):
        if axis != without:
            product *= size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))
    return product


def find_sites(gm: fx.GraphModule) -> list[Site]:
    """Every linear, embedding and convolution weight of the graph, in the order of first use."""
    found: dict[int, list[tuple[fx.Node, Tensor, bool, Use]]] = {}
    paths: dict[int, list[str]] = {}
    for name, parameter in gm.named_parameters(remove_duplicate=False):
        paths.setdefault(id(parameter), []).append(name)
    for node in gm.graph.nodes:
        match = _match(node)
        if match is None:
            continue
        read, transposed, use = match
        tensor = attribute(gm, str(read.target))
        shaped = tensor.dim() == 2 or use.kind in ("convolution", "experts")
        if shaped and tensor.is_floating_point() and id(tensor) in paths:
            found.setdefault(id(tensor), []).append((read, tensor, transposed, use))
    sites = []
    for key, reads in found.items():
        orientations = {transposed for _, _, transposed, _ in reads}
        if len(orientations) > 1:  # read both ways round: no single (rows, columns) describes it
            continue
        if _readers(gm, paths[key]) != {use.node for _, _, _, use in reads}:  # something else needs the weight as it is
            continue
        tensor, transposed = reads[0][1].detach(), reads[0][2]
        name = min(paths[key], key=lambda p: (p != str(reads[0][0].target), p)).removesuffix(".weight")
        weight = tensor.t() if transposed else _matrix(tensor, reads[0][3])
        sites.append(Site(name, tuple(paths[key]), weight, tuple(use for _, _, _, use in reads), transposed))
    return sites


def _matrix(tensor: Tensor, use: Use) -> Tensor:
    """(rows, columns)"""
    return tensor.flatten(0, 1) if use.kind == "experts" else tensor.flatten(1)


def _readers(gm: fx.GraphModule, paths: list[str]) -> set[fx.Node]:
    """Every node that reads the tensor, transposes looked through."""
    found: set[fx.Node] = set()
    waiting = [user for node in gm.graph.find_nodes(op="get_attr") if node.target in paths for user in node.users]
    while waiting:
        node = waiting.pop()
        if node.target in _TRANSPOSES:
            waiting += node.users
        else:
            found.add(node)
    return found


def attribute(gm: fx.GraphModule, path: str) -> Tensor:
    """The tensor a get_attr node reads."""
    owner: Any = gm
    for part in path.split("."):
        owner = getattr(owner, part)
    assert isinstance(owner, Tensor)
    return owner


def _match(node: fx.Node) -> tuple[fx.Node, bool, Use] | None:
    """-> (get_attr node, weight is stored (in, out), use)."""
    if node.op != "call_function":
        return None
    args = node.args
    if node.target is aten.embedding.default:
        return _read(args[0], False, Use("embedding", node, 1))
    if node.target is aten.linear.default and not node.kwargs:
        return _read(args[1], False, Use("linear", node, 0, 2))
    if node.target is aten.addmm.default and not node.kwargs:
        return _read(args[2], True, Use("linear", node, 1, 0))
    if node.target in (aten.mm.default, aten.matmul.default):
        return _read(args[1], True, Use("linear", node, 0))
    if node.target is EXPERTS and isinstance(args[1], fx.Node):
        return _read(args[1], False, Use("experts", node, 0, experts=_value(args[1]).shape[0]))
    if node.target in TARGETS and isinstance(args[1], fx.Node):
        window = Window.of(node, _value(args[1]).shape)
        return None if window is None else _read(args[1], False, Use("convolution", node, 0, 2, window))
    return None


def _read(weight: Any, transposed: bool, use: Use) -> tuple[fx.Node, bool, Use] | None:
    while isinstance(weight, fx.Node) and weight.target in _TRANSPOSES and len(_value(weight).shape) == 2:
        swaps = weight.target is not aten.permute.default or list(weight.args[1]) in ([1, 0], [-1, 0])  # type: ignore[arg-type]
        transposed ^= swaps
        weight = weight.args[0]
    if not (isinstance(weight, fx.Node) and weight.op == "get_attr" and isinstance(use.x, fx.Node)):
        return None
    if use.kind != "embedding" and use.bias is not None and not _is_vector(use.bias):
        return None
    key = use.x.name if use.window is None else f"{use.x.name} {use.window}"
    return weight, transposed, replace(use, key=key)


def _is_vector(bias: fx.Node) -> bool:
    return isinstance(bias, fx.Node) and bias.op == "get_attr" and _value(bias).dim() == 1


def _value(node: fx.Node) -> Tensor:
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else torch.empty(0)
