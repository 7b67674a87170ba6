"""Products of a mixture of experts: rows sorted by expert, one weight for all experts.

    y[r] = W[e] x[r]     for offs[e-1] <= r < offs[e]      x (rows, in), W (experts, out, in), offs int32 (experts,)

transformers calls `torch.nn.functional.grouped_mm` for it, or, while it is traced, an op of its own that gives the same
bits. A graph that names that op could not be loaded where transformers is not; `spell_out` puts this one in its place.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx

_THEIRS = "transformers.grouped_mm_fallback"  # (input, weight transposed, offs)


@torch.library.custom_op("fxcompress::experts_linear", mutates_args=())
def experts_linear(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """The formula above, (rows, out); rows behind the last of `offs` are nobody's, and not computed."""
    return torch.nn.functional.grouped_mm(x, weight.transpose(-2, -1), offs=offs)


@experts_linear.register_fake
def _(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    """dx[r] = W[e]^T g[r], dW[e] = sum g[r] x[r]^T."""
    x, weight, offs = ctx.saved_tensors
    grad = grad.contiguous()
    by_expert = torch.nn.functional.grouped_mm(grad.t(), x, offs=offs)  # (experts, out, in)
    return experts_linear(grad, weight.transpose(-2, -1), offs), by_expert, None


experts_linear.register_autograd(_backward, setup_context=_save)
EXPERTS = experts_linear._opoverload


def spell_out(graph: fx.Graph) -> None:
    """This op in place of transformers', where the weight is stored (experts, out, in)."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not str(node.target).startswith(_THEIRS):
            continue
        found = dict(zip(("input", "weight", "offs"), node.args)) | node.kwargs
        turned = found["weight"]
        if _is_transpose(turned):
            with graph.inserting_before(node):
                new = graph.call_function(EXPERTS, (found["input"], turned.args[0], found["offs"]))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)


def _is_transpose(node: Any) -> bool:
    """Of the last two dimensions of three."""
    if not isinstance(node, fx.Node) or node.target not in (torch.ops.aten.transpose.int, "transpose"):
        return False
    return {cast(int, axis) % 3 for axis in node.args[1:]} == {1, 2}
