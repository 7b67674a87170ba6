"""Lottery tickets: the few weights of a network that would have trained as well had they been alone from the start.

    round 0      train all weights from their start
    round r      drop the `share` of the weights left that training made smallest, put the others back to their start,
                 train again: (1 - share)^r of the weights are left

    ticket = find_ticket(model, train, rounds=7)                    # 0.8^7 = 21 % are left
    with masked(model, ticket.rounds[-1].masks):                    # the same ticket, trained once more
        train(model)

`train(model)` is the caller's: it trains the model it is given, in place, and may return anything (an accuracy).
Magnitudes are compared over the whole network ("global") or within each parameter ("layer"); biases and embeddings
stay. It works on parameters, whatever they mean: weights of a module, factors, cores or quaternion components of a
restructured graph, where each component has masks of its own.

A mask holds through training because the masked weights start at 0 and their gradients are 0: the update of SGD,
momentum, weight decay and Adam is then 0 as well. An optimizer of another kind is found out after each training.

Papers: Frankle & Carbin, The lottery ticket hypothesis, ICLR 2019 (arXiv 1803.03635); Iqbal & Mishra, 2023
(arXiv 2308.06780), tickets of quaternion networks: global, 20 % a round, from the original start.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from fxcompress.core.errors import FxcompressError

_LOOKUPS = (torch.ops.aten.embedding.default, F.embedding)

Select = str | Iterable[str] | Callable[[str, nn.Parameter], bool]
Scope = Literal["global", "layer"]


class TicketError(FxcompressError, ValueError):
    """A search for a lottery ticket that cannot be carried out as asked."""


@dataclass(frozen=True, eq=False)
class Round:
    """One training."""

    left: float  # share of the selected weights that trained
    masks: dict[str, Tensor]  # bool by parameter name, True: trained
    outcome: Any  # what `train` returned


@dataclass(frozen=True, eq=False)
class Ticket:
    """The trainings, from all weights to the fewest, and the model as the last of them left it."""

    rounds: tuple[Round, ...]
    model: nn.Module


def find_ticket(
    model: nn.Module,
    train: Callable[[nn.Module], Any],
    rounds: int,
    *,
    share: float = 0.2,
    scope: Scope = "global",
    select: Select | None = None,
    rewind: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Ticket:
    """Iterative magnitude pruning with rewinding: `rounds` + 1 trainings, each of a fresh copy of `model`.

    share: of the weights left, dropped after each training but the last.
    scope: where magnitudes are compared. "global" may leave a layer with nothing; "layer" drops the share of each.
    select: which parameters are masked: a glob over their names (fnmatch), several, or a predicate of name and
        parameter. Default: every trainable floating-point one of two dimensions or more that is no embedding.
    rewind: a state dict to go back to after each round, such as one saved early in training. Default: the model's own.
    seed: torch's generators are seeded with it before every training, so that rounds differ in their masks alone.

    `model` and the caller's random state are left as they were. Raises `TicketError`.
    """
    _check(rounds, share, scope)
    names = selected(model, select)
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters() if name in names}
    history: list[Round] = []
    while True:
        runner = copy.deepcopy(model)
        if history and rewind is not None:
            _load(runner, rewind)
        with _seeded(runner, seed), masked(runner, masks):
            outcome = train(runner)
        left = sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
        trained = _weights(runner, masks, len(history))
        history.append(Round(left, masks, outcome))
        if len(history) > rounds:
            return Ticket(tuple(history), runner)
        masks = _shrunk(trained, masks, share, scope)


@contextlib.contextmanager
def masked(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Put zeros where `masks` (bool, by parameter name) are False, and hold them there through training in the block.

    Raises `TicketError` for a mask that fits no parameter, and afterwards where masked weights were changed all the
    same.
    """
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in parameters:
            raise TicketError(f"a mask is for {name!r}, and the model has no such parameter.")
        if mask.shape != parameters[name].shape or mask.dtype != torch.bool:
            raise TicketError(
                f"the mask of {name!r} is {mask.dtype} {tuple(mask.shape)}; wanted is torch.bool "
                f"{tuple(parameters[name].shape)}."
            )
    held = {name: (parameters[name], mask.to(parameters[name].device)) for name, mask in masks.items()}
    hooks = [_hold(parameter, mask) for parameter, mask in held.values()]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()
    now = dict(model.named_parameters())
    for name, (parameter, mask) in held.items():
        if now.get(name) is not parameter:
            raise TicketError(f"training replaced the parameter {name!r}; it must be trained in place.")
        if changed := int(parameter.detach()[~mask].count_nonzero()):
            raise TicketError(
                f"training changed {changed} masked weights of {name!r}; use an optimizer whose update is 0 where "
                "gradient and weight are 0, made anew in each training, and do not set weights."
            )


def _hold(parameter: nn.Parameter, mask: Tensor) -> RemovableHandle:
    with torch.no_grad():
        parameter.masked_fill_(~mask, 0)

    def masked_gradient(gradient: Tensor) -> Tensor:
        return torch.where(mask, gradient, 0)  # not times: 0 times infinity is no 0

    handle: RemovableHandle = parameter.register_hook(masked_gradient)  # type: ignore[no-untyped-call]
    return handle


def selected(model: nn.Module, select: Select | None = None) -> set[str]:
    """Names of the parameters `find_ticket` masks. Raises `TicketError` where there are none."""
    parameters = dict(model.named_parameters())
    if select is None:
        tables = _tables(model)
        found = {
            name
            for name, p in parameters.items()
            if p.dim() >= 2 and p.is_floating_point() and p.requires_grad and id(p) not in tables
        }
    elif callable(select):
        found = {name for name, p in parameters.items() if select(name, p)}
    else:
        patterns = [select] if isinstance(select, str) else list(select)
        for pattern in patterns:
            if not fnmatch.filter(parameters, pattern):
                raise TicketError(f"{pattern!r} matches no parameter; there are {_some(parameters)}.")
        found = {name for name in parameters if any(fnmatch.fnmatchcase(name, p) for p in patterns)}
    if not found:
        raise TicketError(f"no parameter is selected to be masked; there are {_some(parameters)}.")
    return found


def _tables(model: nn.Module) -> set[int]:
    """Ids of the parameters that are looked up, by a module or by a node of a graph."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            parameters = dict(module.named_parameters(remove_duplicate=False))
            reads = [node.args[0] for node in module.graph.nodes if node.target in _LOOKUPS]
            tables |= {id(parameters.get(str(r.target))) for r in reads if isinstance(r, fx.Node)}
    return tables


def _shrunk(weights: dict[str, Tensor], masks: dict[str, Tensor], share: float, scope: Scope) -> dict[str, Tensor]:
    """The masks without the smallest `share` of what they leave, of all together or of each."""
    if scope == "layer":
        return {name: _without_smallest(weights[name], m.flatten(), share).view_as(m) for name, m in masks.items()}
    every = torch.cat([m.flatten() for m in masks.values()])
    fewer = _without_smallest(torch.cat([weights[name] for name in masks]), every, share)
    parts = torch.split(fewer, [m.numel() for m in masks.values()])
    return {name: part.view_as(m) for (name, m), part in zip(masks.items(), parts)}


def _without_smallest(weights: Tensor, mask: Tensor, share: float) -> Tensor:
    """1-d: exactly round(share left) fewer, equal magnitudes from the front; one stays at least."""
    left = int(mask.sum())
    drop = min(round(share * left), left - 1)
    order = weights.abs().masked_fill(~mask, torch.inf).argsort(stable=True)
    mask = mask.clone()
    mask[order[: max(0, drop)]] = False
    return mask


def _weights(model: nn.Module, masks: Mapping[str, Tensor], turn: int) -> dict[str, Tensor]:
    """The masked parameters, flat and on the CPU; training must have left them finite."""
    found = {name: p.detach().float().cpu().flatten() for name, p in model.named_parameters() if name in masks}
    for name, weight in found.items():
        if not bool(torch.isfinite(weight).all()):
            raise TicketError(f"training {turn} left NaN or infinity in {name!r}; lower its learning rate.")
    return found


def _check(rounds: int, share: float, scope: str) -> None:
    if not isinstance(rounds, int) or rounds < 1:
        raise TicketError(f"rounds={rounds!r} must be a whole number of at least 1.")
    if not 0 < share < 1:
        raise TicketError(f"share={share!r} must be between 0 and 1: what each round drops of the weights left.")
    if scope not in ("global", "layer"):
        raise TicketError(f"scope={scope!r}: allowed are 'global' and 'layer'.")


def _load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:
        raise TicketError(f"rewind does not fit the model: {error}") from None


@contextlib.contextmanager
def _seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """torch's generators seeded inside, and as they were afterwards."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _some(parameters: Iterable[str]) -> str:
    names = list(parameters)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") or "none at all"
