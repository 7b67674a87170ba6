"""One node for a product, the way its weights are kept, and everything pointwise that follows.

    x (..., in)    tensors: the constants    extras: other activations    spec: fxcompress.codegen.spec
    name: of the modules it stands for, for messages. No extras are None too: AOTInductor makes that of an empty list.

    fused                one output                fused_parallel    several: products that share their input

The body calls what the spec says, the same ops in the same order as the graph it was printed from: same bits. Outputs
are contiguous, so several do not share one buffer: what reads them sees the strides it saw before.

On a GPU it is generated kernels (fxcompress.codegen.triton.launch), Triton being imported at the first call. Without
Triton the body serves there too.

The backward runs the body again with gradients on: nothing but the inputs is kept, and each op brings its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from fxcompress.codegen.spec import UNROWS, Argument, Call, Constant, Extra, Input, Spec, Value, op_of, parse, type_of
from fxcompress.core.errors import SpecError

Calling = Callable[..., Tensor]  # (op, *args, **kwargs)
_TAKES = "(Tensor x, Tensor[] tensors, Tensor[]? extras, str spec, str name='') -> "


@torch.library.custom_op("fxcompress::fused", mutates_args=(), schema=f"{_TAKES}Tensor")
def fused(x: Tensor, tensors: list[Tensor], extras: list[Tensor] | None, spec: str, name: str = "") -> Tensor:
    """The meaning of the op, and its implementation wherever no kernel is registered."""
    (output,) = evaluate(parse(spec), x, tensors, extras or [])
    return output


@torch.library.custom_op("fxcompress::fused_parallel", mutates_args=(), schema=f"{_TAKES}Tensor[]")
def fused_parallel(
    x: Tensor, tensors: list[Tensor], extras: list[Tensor] | None, spec: str, name: str = ""
) -> list[Tensor]:
    """The same with the several outputs of `spec`."""
    return evaluate(parse(spec), x, tensors, extras or [])


@fused.register_fake
def _(x: Tensor, tensors: list[Tensor], extras: list[Tensor] | None, spec: str, name: str = "") -> Tensor:
    (output,) = evaluate(parse(spec), x, tensors, extras or [])
    return output


@fused_parallel.register_fake
def _(x: Tensor, tensors: list[Tensor], extras: list[Tensor] | None, spec: str, name: str = "") -> list[Tensor]:
    return evaluate(parse(spec), x, tensors, extras or [])


@fused.register_kernel("cuda")
def _(x: Tensor, tensors: list[Tensor], extras: list[Tensor] | None, spec: str, name: str = "") -> Tensor:
    (output,) = _on_gpu(x, tensors, extras or [], spec, name)
    return output


@fused_parallel.register_kernel("cuda")
def _(x: Tensor, tensors: list[Tensor], extras: list[Tensor] | None, spec: str, name: str = "") -> list[Tensor]:
    return _on_gpu(x, tensors, extras or [], spec, name)


def _on_gpu(x: Tensor, tensors: list[Tensor], extras: list[Tensor], spec: str, name: str) -> list[Tensor]:
    from fxcompress.codegen.triton.card import card_of
    from fxcompress.codegen.triton.launch import run

    if any(t.device != x.device for t in (*tensors, *extras)):
        return evaluate(parse(spec), x, tensors, extras)  # torch says what is wrong with it
    with torch.cuda.device(x.device):
        return run(parse(spec), x, tensors, extras, card_of(x.device), name)


def evaluate(spec: Spec, x: Tensor, tensors: Sequence[Tensor], extras: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of `spec`, contiguous. Raises `SpecError` where the tensors are not those it names."""
    check(spec, tensors, extras)
    made = run(spec, x, tensors, extras, _call)
    return [made[i].contiguous() for i in spec.outputs]


def run(spec: Spec, x: Tensor, tensors: Sequence[Tensor], extras: Sequence[Tensor], call: Calling) -> list[Tensor]:
    """What each step makes, with `call(op, *args, **kwargs)` to make it."""
    constants, made = iter(tensors), list[Tensor]()
    for step in spec.steps:
        made.append(_apply(step, x, constants, extras, made, call))
    return made


def _call(op: OpOverload, *args: Any, **kwargs: Any) -> Tensor:
    return op(*args, **kwargs)  # type: ignore[no-any-return]


def check(spec: Spec, tensors: Sequence[Tensor], extras: Sequence[Tensor]) -> None:
    """Raises `SpecError` where the tensors are not those `spec` names."""
    if (len(tensors), len(extras)) != (len(spec.constants), spec.extras):
        raise SpecError(
            f"the program takes {len(spec.constants)} constants and {spec.extras} extras; "
            f"{len(tensors)} and {len(extras)} were given: {spec}"
        )
    for index, (tensor, wanted) in enumerate(zip(tensors, spec.constants)):
        if type_of(tensor) != wanted:
            found = type_of(tensor)
            raise SpecError(
                f"tensors[{index}] is {found.dtype} {list(found.shape)}; the program was made for {wanted.dtype} "
                f"{list(wanted.shape)}. Convert a model before it is fused."
            )


def _apply(
    step: Call, x: Tensor, constants: Iterator[Tensor], extras: Sequence[Tensor], made: list[Tensor], call: Calling
) -> Tensor:
    def value(argument: Argument) -> Any:
        match argument:
            case Value(index):
                return made[index]
            case Constant():
                return next(constants)
            case Extra(index):
                return extras[index]
            case Input(rows):
                return x.reshape(-1, x.shape[-1]) if rows else x
            case Call():
                return _apply(argument, x, constants, extras, made, call)
            case tuple():
                return [value(a) for a in argument]
        return argument

    args = [value(a) for a in step.args]
    named = {name: value(a) for name, a in step.named}
    if step.name == UNROWS:
        return args[0].reshape(*x.shape[:-1], args[0].shape[-1])  # type: ignore[no-any-return]
    return call(op_of(step.name), *args, **named)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, tensors, extras, ctx.spec, _ = inputs
    ctx.constants = len(tensors)
    ctx.save_for_backward(x, *tensors, *(extras or []))


def _backward(ctx: Any, dy: Tensor | list[Tensor | None]) -> tuple[Any, ...]:
    tensors = ctx.constants
    need_x, need_tensors, need_extras, *texts = ctx.needs_input_grad
    needed = [need_x, *need_tensors, *(need_extras if isinstance(need_extras, list | tuple) else [])]
    inputs = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needed)]
    with torch.enable_grad():
        outputs = evaluate(parse(ctx.spec), inputs[0], inputs[1 : 1 + tensors], inputs[1 + tensors :])
    pairs = [(y, d) for y, d in zip(outputs, dy if isinstance(dy, list) else [dy]) if d is not None]
    wanted = [t for t, need in zip(inputs, needed) if need]
    made = torch.autograd.grad([y for y, _ in pairs], wanted, [d for _, d in pairs], allow_unused=True)
    found = iter(made)
    gradients = [next(found) if need else None for need in needed]
    own = gradients[1 + tensors :] if isinstance(need_extras, list | tuple) else None
    # a name that was left out is no input
    return gradients[0], gradients[1 : 1 + tensors], own, *(None for _ in texts)


fused.register_autograd(_backward, setup_context=_setup_context)
fused_parallel.register_autograd(_backward, setup_context=_setup_context)
