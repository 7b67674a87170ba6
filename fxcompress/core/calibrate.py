"""What flows through each site, streamed: memory holds the statistics and one batch, never all activations.

    linear sites      H = E[x x^T],  mu = E[x]    over tokens; sites of one input share a pair (Q, K, V)
    convolutions      H = E[p p^T],  mu = E[p]    over patches (fxcompress.core.convolution): all of a batch, or an even
                                                  sample of them where they are more than `PATCHES`
    embedding sites   p_r                         how often row r will be read, smoothed from how often it was
                                                  (`row_probabilities`)
                      M = E[g g^T]                g the gradient of the model's loss at the looked-up row, a few batches

The last quarter of every batch (or every fourth batch, where batches hold fewer than four examples or the graph takes
one number of them alone) is held out: it
never enters H or p. Sensitivities are probed and predictions are checked on it. Padding, where an attention_mask says
so, is left out of everything.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from tqdm import tqdm

from fxcompress.core.capture import split_inputs
from fxcompress.core.convolution import Window
from fxcompress.core.divergence import kind_of, mask_of, named_outputs, unmasked
from fxcompress.core.errors import CalibrationError, InputError
from fxcompress.core.moment import HeldMoment, Moment, held, pooled, spread
from fxcompress.core.signature import SignedModule
from fxcompress.core.site import Site, Statistics, Use

log = logging.getLogger("fxcompress.calibrate")

HELD_OUT_SHARE = 4  # one example in four
HELD_OUT_EXAMPLES = 64  # at most, so that probing does not grow with the calibration set
STRETCHES = 128  # of ids, for the unseen rows of a table
UNSEEN_HEDGE = 1.5  # fresh text is further from the calibration text than its own halves are from each other
EVEN_SHARE = 0.1
# Of one batch and one convolution. Site errors of ResNet-20 told by 2^14 patches of 256 images, one in sixteen, are
# within 1 % of what all patches tell; neighbours overlap.
PATCHES = 2**14
PATCH_VALUES = 2**24  # numbers in all of those: 64 MB
TOGETHER = 4  # sentences in one call take two thirds of the time they take alone (BERT-base)
GRADIENT_BATCHES = 4  # M is a (features, features) mean over every token; a few batches settle it

Call = tuple[tuple[Any, ...], dict[str, Any]]
M = TypeVar("M", bound=Moment)


@dataclass
class Calibration:
    """The statistics of one model on one data set; serves any number of budgets."""

    moments: dict[str, Moment] = field(default_factory=dict)  # by the key of the use
    checks: dict[str, HeldMoment] = field(default_factory=dict)  # the same over the held-out examples
    counts: dict[str, Tensor] = field(default_factory=dict)  # by the key of the use: (rows,) float64
    gradients: dict[str, Tensor] = field(default_factory=dict)  # by the name of the lookup node: sum g g^T
    held_out: list[Call] = field(default_factory=list)
    fitted: list[Call] = field(default_factory=list)  # what the moments are of; kept for staged calibration alone
    examples: int = 0
    calibrated: bool = True  # False: there was no data, held_out are the example inputs
    has_held_out: bool = True  # False: too little data, held_out are part of what was calibrated on

    @property
    def held_out_examples(self) -> int:
        return sum(_examples(call) for call in self.held_out)

    def informed(self, site: Site) -> Site:
        """The site with what was seen at it; made when its turn comes: the moments of all at once are large."""
        return site.knowing(self.statistics(site))

    def statistics(self, site: Site) -> Statistics:
        """What was seen at `site`; uses that saw nothing add nothing."""
        second, mean = pooled(_seen(self.moments, site)) or (None, None)
        ids = [self.counts[u.key] for u in site.uses if u.kind == "embedding" and u.key in self.counts]
        rows = row_probabilities(torch.stack(ids).sum(0)) if ids else None
        grads = [self.gradients[u.node.name] for u in site.uses if u.node.name in self.gradients]
        metric = torch.stack(grads).sum(0) if grads else None
        samples = [m.sample for m in _seen(self.moments, site) if m.sample is not None]
        sample = torch.cat(samples) if samples else None
        return Statistics(second, mean, held(_seen(self.checks, site)), sample, rows, metric)


def _seen(moments: Mapping[str, M], site: Site) -> list[M]:
    """Of all uses of the site that multiply."""
    return [moments[use.key] for use in site.uses if use.kind != "embedding" and use.key in moments]


def row_probabilities(counts: Tensor) -> Tensor:
    """How often each row of a table will be read on fresh data, from how often it was: (rows,) float64, summing to 1.

    Absolute discounting d = N_1 / (N_1 + 2 N_2) with N_k the rows seen k times; what the seen rows give up goes to all
    rows of the same stretch of ids in proportion to the stretch's N_1, because vocabularies list tokens roughly by
    frequency (Good-Turing's estimate of the unseen, stretch by stretch; Good, Biometrika 1953; Ney, Essen & Kneser
    1994). A tenth is spread over all rows evenly: text longer or stranger than the calibration text will come, and no
    row may be thrown away for being absent from it.
    """
    rows, total = len(counts), float(counts.sum())
    even = torch.full_like(counts, 1 / rows)
    if total == 0:
        return even
    once, twice = float((counts == 1).sum()), float((counts == 2).sum())
    discount = min(0.95, max(0.5, once / (once + 2 * twice) if once else 0.5))
    freed = min(0.9, UNSEEN_HEDGE * discount * float((counts > 0).sum()) / total)
    stretch = torch.arange(rows) * min(STRETCHES, rows) // rows
    singles = torch.bincount(stretch[counts == 1], minlength=int(stretch.max()) + 1).double() + 0.1
    fresh = (singles / singles.sum() / torch.bincount(stretch))[stretch]
    seen = (counts - discount).clamp_min(0)
    known = seen / seen.sum() if float(seen.sum()) > 0 else even
    return (1 - EVEN_SHARE) * (known * (1 - freed) + fresh * freed) + EVEN_SHARE * even


def calibrate(
    gm: SignedModule, sites: Sequence[Site], batches: Iterable[Any], progress: bool = True, staged: bool = False
) -> Calibration:
    """Run every batch once; `staged` keeps them. Raises `CalibrationError` for empty data, a batch that does not fit,
    or NaN activations."""
    result = Calibration()
    observer = _Observer(gm, sites, result.moments, result.counts, Moment)
    total = len(batches) if isinstance(batches, Sized) else None
    gradient_batches: list[Call] = []
    whole = not is_divisible(gm)
    for index, batch in enumerate(tqdm(batches, "calibrate", total, unit="batch", disable=not progress, leave=False)):
        call = bind_batch(gm, batch, index)
        room = HELD_OUT_EXAMPLES - sum(_examples(c) for c in result.held_out)
        fit, held = _split(call, index, room, whole)
        if held is not None:
            result.held_out.append(held)
            result.examples += _examples(held)
        if fit is None:
            continue
        result.examples += _examples(fit)
        observer.observe(fit, index)
        if staged:
            result.fitted.append(fit)
        if len(gradient_batches) < GRADIENT_BATCHES:
            gradient_batches.append(fit)
    if result.examples == 0:
        raise CalibrationError(
            "calibration is empty: give at least one batch of inputs, or calibration=None to go without data."
        )
    if not result.held_out:
        log.warning("calibration holds too few examples to hold any out; predictions are checked on the same data.")
        result.held_out, result.has_held_out = gradient_batches[:1], False
    if not gradient_batches:
        observer.observe(result.held_out[0], 0)
    if result.has_held_out:
        checker = _Observer(gm, sites, result.checks, {}, HeldMoment)
        for call in result.held_out:
            checker.observe(call, 0)
    result.gradients = lookup_gradients(gm, sites, gradient_batches)
    return result


def bind_batch(gm: SignedModule, batch: Any, index: int) -> Call:
    """One batch in the captured form, checked."""
    try:
        args, kwargs = gm.signature.bind(*split_inputs(batch))
        gm.signature.check(args, kwargs)
    except InputError as error:
        raise CalibrationError(f"calibration batch {index} does not fit the model: {error}") from None
    return args, kwargs


class _Observer(fx.Interpreter, Generic[M]):
    """Adds every site's inputs to `moments` and `counts` as the graph runs; values are freed after their last use."""

    def __init__(
        self, gm: SignedModule, sites: Sequence[Site], moments: dict[str, M], counts: dict[str, Tensor], kind: type[M]
    ) -> None:
        super().__init__(gm)
        self.extra_traceback = False  # torch would add the graph to our messages
        uses = [(site, use) for site in sites for use in site.uses]
        self.products: dict[str, dict[str, tuple[Site, Use]]] = {}  # by input node, then by key
        for site, use in uses:
            if use.kind != "embedding":
                self.products.setdefault(use.x.name, {}).setdefault(use.key, (site, use))
        self.lookup = {use.x.name: site for site, use in uses if use.kind == "embedding"}
        self.moments, self.counts, self.kind = moments, counts, kind
        self.mask: Tensor | None = None
        self.index = 0

    def observe(self, call: Call, index: int) -> None:
        self.mask, self.index = mask_of(call[1]), index
        with torch.no_grad():
            self.run(*pytree.tree_leaves(call), enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for key, (site, use) in self.products.get(n.name, {}).items():
            moment = self.moments.setdefault(key, self.kind())
            moment.add(multiplied(use, value, self.mask))
            if not bool(torch.isfinite(moment.total).all()):  # type: ignore[arg-type]
                raise CalibrationError(
                    f"calibration batch {self.index} makes the input of {site.name} NaN or infinite; remove that batch."
                )
        if n.name in self.lookup:
            ids = value if self.mask is None or value.shape != self.mask.shape else value[self.mask.bool()]
            rows = self.lookup[n.name].rows
            outside = ids[(ids < 0) | (ids >= rows)]
            if outside.numel():
                raise CalibrationError(
                    f"calibration batch {self.index} reads id {int(outside[0])} of {self.lookup[n.name].name}, which "
                    f"has {rows} rows."
                )
            seen = torch.bincount(ids.reshape(-1), minlength=rows).double()
            self.counts[n.name] = self.counts.get(n.name, 0) + seen
        return value


def multiplied(use: Use, x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of x that the weight multiplies, padding left out but for experts, whose rows are in an order of their
    own."""
    if use.kind == "experts":
        return x
    return unmasked(x, mask) if use.window is None else patches(use.window, x, mask)


def patches(window: Window, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """What a convolution multiplies: (patches, columns), in the order of its flattened weight.

    All of the batch's where they are at most `PATCHES` and hold at most `PATCH_VALUES` numbers; else that many, spread
    evenly, and the moments are those of a sample. Positions that a mask of the output's shape (N, length) excludes are
    left out.
    """
    view = window.patches(x)
    sizes = view.shape[: len(window.kernel) + 1]
    wanted = torch.arange(math.prod(sizes))
    if mask is not None and mask.shape == sizes:
        wanted = wanted[mask.bool().reshape(-1)]
    most = max(1, min(PATCHES, PATCH_VALUES // window.columns))
    if len(wanted) > most:
        wanted = wanted[spread(len(wanted), most)]
    return view[torch.unravel_index(wanted, sizes)].flatten(1)


def lookup_gradients(gm: SignedModule, sites: Sequence[Site], calls: Sequence[Call]) -> dict[str, Tensor]:
    """sum g g^T (columns, columns) at every embedding lookup, g the gradient of a random direction of the output.

    With r ~ N(0, I) per output element, E[g g^T] = J^T J: how the squared output error reacts to an error of the row.
    For logits r is onehot(sample) - p, and E[g g^T] is the Fisher information, the second order of the KL.
    """
    lookups = [use.node.name for site in sites for use in site.uses if use.kind == "embedding"]
    sums: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for call in calls if lookups else ():
        runner = _LeafLookups(gm, lookups)
        with torch.enable_grad():
            outputs = named_outputs(runner.run_call(call), mask_of(call[1]))
            direction = sum(
                (_random_direction(y, kind_of(outputs), generator) * y).sum()
                for y in outputs.values()
                if y.requires_grad
            )
            if not isinstance(direction, Tensor):
                continue
            leaves = list(runner.leaves.items())
            grads = torch.autograd.grad(direction, [leaf for _, leaf in leaves], allow_unused=True)
        for (name, _), grad in zip(leaves, grads):
            if grad is not None:
                g = unmasked(grad, mask_of(call[1])).reshape(-1, grad.shape[-1]).double()
                sums[name] = sums.get(name, torch.zeros(g.shape[1], g.shape[1], dtype=torch.float64)) + g.T @ g
    return {
        name: total for name, total in sums.items() if bool(torch.isfinite(total).all()) and float(total.trace()) > 0
    }


class _LeafLookups(fx.Interpreter):
    """Runs the graph with every embedding lookup cut off from what is before it, and asked for its gradient."""

    def __init__(self, gm: SignedModule, lookups: Sequence[str]) -> None:
        super().__init__(gm)
        self.names, self.leaves = set(lookups), dict[str, Tensor]()

    def run_call(self, call: Call) -> Any:
        output = self.run(*pytree.tree_leaves(call), enable_io_processing=False)
        return pytree.tree_unflatten(list(output), self.module._out_spec)  # type: ignore[arg-type]

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "get_attr":
            return value.detach()
        if n.name in self.names:
            self.leaves[n.name] = value.detach().requires_grad_()
            return self.leaves[n.name].clone()  # what follows may write into it, and must not write into a leaf
        return value


def _random_direction(y: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    if kind == "kl":
        p = y.detach().float().softmax(-1)
        drawn = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator).reshape(p.shape[:-1])
        return torch.nn.functional.one_hot(drawn, p.shape[-1]).to(y.dtype) - p.to(y.dtype)
    noise = torch.randn(y.shape, generator=generator, dtype=torch.float32).to(y.dtype)
    norm: Tensor = y.detach().norm()
    return noise / norm.clamp_min(1e-30)


def is_divisible(gm: SignedModule) -> bool:
    """True if a batch may be cut: the graph was captured for any number of examples."""
    return all(not isinstance(slot.dims[0], int) for slot in gm.signature.slots if slot.dims)


def _split(call: Call, index: int, room: int, whole: bool) -> tuple[Call | None, Call | None]:
    """-> (for the statistics, held out); either may be None. `whole`: one of them is, always."""
    count = _examples(call)
    if room <= 0:
        return call, None
    if count < HELD_OUT_SHARE or whole:
        return (None, call) if index % HELD_OUT_SHARE == HELD_OUT_SHARE - 1 else (call, None)
    cut = count - min(room, count // HELD_OUT_SHARE)
    return _rows(call, slice(0, cut)), _rows(call, slice(cut, count))


def _examples(call: Call) -> int:
    """Rows of the batch; 1 where its tensors do not share a first dimension."""
    sizes = {t.shape[0] if t.dim() else 1 for t in pytree.tree_leaves(call) if isinstance(t, Tensor)}
    return sizes.pop() if len(sizes) == 1 else 1


def _rows(call: Call, rows: slice) -> Call:
    cut: Call = pytree.tree_map(lambda t: t[rows] if isinstance(t, Tensor) else t, call)
    return cut


def thinned(calls: Sequence[Call], share: float, whole: bool = False) -> list[Call]:
    """About `share` of the examples: the first TOGETHER or so of calls spread from end to end; or of the calls, the
    first, where each is one example or must stay `whole`."""
    if share >= 1:
        return list(calls)
    if whole or all(_examples(call) == 1 for call in calls):
        return list(calls[: math.ceil(share * len(calls))])
    wanted = max(1, round(share * sum(_examples(call) for call in calls)))
    some = [calls[i] for i in spread(len(calls), min(len(calls), max(1, round(wanted / TOGETHER))))]
    part = wanted / sum(_examples(call) for call in some)
    return [_rows(call, slice(0, max(1, round(part * _examples(call))))) for call in some]


def take(calls: Sequence[Call], examples: int) -> list[Call]:
    """Whole calls from the front until `examples` are reached."""
    sizes = itertools.accumulate(_examples(c) for c in calls)
    return [call for call, so_far in zip(calls, sizes) if so_far - _examples(call) < examples]
