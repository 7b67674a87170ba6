"""torch.vmap over the ops: the new dimension becomes one more leading dimension of x.

Every product here takes x (..., in) and every lookup ids (...), so a batch of either is a larger call of the same op.
Where anything else is batched as well (weights of an ensemble, a key for every example), or a program flattens x by
itself, the op is called once for each element and the results are stacked: slower, and right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_LEADING = ("x", "ids")  # first arguments that may have any leading dimensions


def register(op: Any) -> None:
    """Give a custom op its rule."""
    leading = op._opoverload._schema.arguments[0].name in _LEADING

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        first, *rest = args
        alone = all(dim is None for dim in pytree.tree_leaves(in_dims[1:], _is_none))
        if leading and alone and not any(isinstance(a, str) and "rows" in a for a in rest):
            result = op(first.movedim(in_dims[0], 0), *rest)
            return result, pytree.tree_map(lambda _: 0, result)
        dims, spec = pytree.tree_flatten(in_dims, _is_none)
        leaves = _leaves(args, in_dims)
        results = [
            op(*pytree.tree_unflatten([_at(leaf, dim, i) for leaf, dim in zip(leaves, dims)], spec))
            for i in range(info.batch_size)
        ]
        stacked = pytree.tree_map(lambda *parts: torch.stack(parts), *results)
        return stacked, pytree.tree_map(lambda _: 0, stacked)

    op.register_vmap(rule)


def _is_none(value: Any) -> bool:
    return value is None


def _leaves(args: Any, dims: Any) -> list[Any]:
    """The arguments that the leaves of `dims` belong to."""
    if isinstance(dims, list | tuple):
        return [leaf for arg, dim in zip(args, dims) for leaf in _leaves(arg, dim)]
    return [args]


def _at(leaf: Any, dim: int | None, index: int) -> Any:
    return leaf if dim is None or not isinstance(leaf, Tensor) else leaf.select(dim, index)
