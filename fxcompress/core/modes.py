"""train() and eval() of a captured graph: dropout and batch norm carry their mode as an argument.

    dropout(x, p, train)    batch_norm(x, w, b, mean, var, training, …)    scaled_dot_product_attention(q, k, v, m, p)

A graph captured in training mode remembers each such node's arguments; `switch` writes them in, or the eval ones.
"""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten
_IN_EVAL = {  # op -> (position of the argument, its value in eval mode)
    aten.dropout.default: (2, False),
    aten.feature_dropout.default: (2, False),
    aten.alpha_dropout.default: (2, False),
    aten.batch_norm.default: (5, False),
    aten.scaled_dot_product_attention.default: (4, 0.0),
}
_KEY = "train_args"


def remember(graph: fx.Graph) -> None:
    """Note what the nodes of a graph captured in training mode look like; counters of batches seen are dropped."""
    for node in list(graph.nodes):
        place = _IN_EVAL.get(node.target)
        if place is not None and len(node.args) > place[0]:
            node.meta[_KEY] = node.args
        counts = node.op == "call_function" and isinstance(node.args[0] if node.args else None, fx.Node)
        if counts and not node.users and str(node.args[0].target).endswith("num_batches_tracked"):
            graph.erase_node(node)


def switch(graph: fx.Graph, training: bool) -> bool:
    """Put every remembered node into that mode; True if any was changed. Other arguments stay as they are."""
    changed = False
    for node in graph.nodes:
        if _KEY in node.meta:
            at, off = _IN_EVAL[node.target]
            wanted = node.meta[_KEY][at] if training else off
            changed |= node.args[at] != wanted
            node.update_arg(at, wanted)
    return changed


def forget(graph: fx.Graph) -> None:
    """Eval mode for good: nothing is remembered."""
    switch(graph, training=False)
    for node in graph.nodes:
        node.meta.pop(_KEY, None)
