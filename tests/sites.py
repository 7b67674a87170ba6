"""For the tests of rewrites: a graph around one weight, its site, weights and inputs of a known spectrum."""

from dataclasses import replace

import torch
from torch import fx, nn

from fxcompress.core.site import Statistics, find_sites


def graph_of(weight, kind="linear", bias=None, **statistics):
    """A graph that reads `weight` once, or twice where it is tied -> (graph module, its site).

    "mm" reads the weight transposed, as Conv1D does.
    """
    root, graph, aten = nn.Module(), fx.Graph(), torch.ops.aten
    root.weight = nn.Parameter(weight.t().contiguous() if kind == "mm" else weight, requires_grad=False)
    x, w = graph.placeholder("x"), graph.get_attr("weight")
    if kind in ("embedding", "tied"):
        x = graph.call_function(aten.embedding.default, (w, x))
    if kind in ("linear", "tied"):
        args = (x, w)
        if bias is not None:
            root.bias = nn.Parameter(bias, requires_grad=False)
            args = (*args, graph.get_attr("bias"))
            args[-1].meta["val"] = bias
        x = graph.call_function(aten.linear.default, args)
    elif kind == "mm":
        x = graph.call_function(aten.mm.default, (x, w))
    graph.output(x)
    gm = fx.GraphModule(root, graph)
    (site,) = find_sites(gm)
    return gm, replace(site, statistics=Statistics(**statistics), _analyses={})


def site_of(weight, kind="linear", bias=None, **statistics):
    """The site alone."""
    gm, site = graph_of(weight, kind, bias, **statistics)
    object.__setattr__(site.uses[0].node.graph, "_keep", gm)  # the graph alone does not keep its module alive
    return site


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_of(shape, seed=0):
    """Singular values that fall like 1, 1/2, 1/3, ...: no ties, nothing vanishes; blocks and digits mean nothing."""
    generator = torch.Generator().manual_seed(seed)
    u, _, vt = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    return (u / torch.arange(1, len(vt) + 1) @ vt).float()


def moment_of(columns, seed=1, spread=1.5):
    """E[x x^T] of correlated inputs whose directions differ by 10^`spread` in size, besides what mixing them does."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    mix = mix * torch.logspace(0, -spread, columns, dtype=torch.float64)
    x = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64) @ mix.T
    return x.T @ x / len(x)
