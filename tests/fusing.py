"""For the tests of fusion: models rewritten by hand, graphs compared bit by bit, what was fused."""

import fnmatch

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxcompress.codegen.spec import parse
from fxcompress.core.capture import capture
from fxcompress.core.show import show
from fxcompress.core.site import find_sites
from fxcompress.core.surgery import finish, own_tensors, stored_bytes
from fxcompress.passes import REWRITES, recipe
from fxcompress.passes.fuse import FUSED, PARALLEL, fuse

QUANTIZED = "quantize{bits=4, group_size=32}"
FACTORED = "low_rank{rank=4} | quantize{bits=8, group_size=0}"
D, H = 48, 80


def rewritten(model, inputs, specs=QUANTIZED):
    """The captured graph with a recipe at every site whose name matches (the first pattern wins, None keeps)."""
    gm = capture(model, inputs)
    for site in find_sites(gm):
        patterns = specs if isinstance(specs, dict) else {"*": specs}
        spec = next((s for pattern, s in patterns.items() if fnmatch.fnmatch(site.name, pattern)), None)
        if spec is not None:
            recipe.parse(spec, REWRITES).make(site).apply(gm, site)
    finish(gm)
    own_tensors(gm)
    return gm


def same(a, b):
    """Bits, dtypes, shapes and strides of every output; NaNs too."""
    left, right = pytree.tree_leaves(a), pytree.tree_leaves(b)
    assert len(left) == len(right)
    for x, y in zip(left, right):
        assert (x.dtype, x.shape, x.stride()) == (y.dtype, y.shape, y.stride())
        assert torch.equal(x.contiguous().flatten().view(torch.uint8), y.contiguous().flatten().view(torch.uint8))


def programs(gm):
    return [n.args[3] for n in gm.graph.nodes if n.target in (FUSED, PARALLEL)]


def steps(gm):
    """The names of the steps of every fused node."""
    return [[call.name for call in parse(text).steps] for text in programs(gm)]


def calls(gm):
    """Every other call, sizes left out."""
    names = [str(n.target).removeprefix("aten.") for n in gm.graph.nodes if n.op == "call_function"]
    return [n.split(".")[0] for n in names if not n.startswith(("fxcompress.fused", "sym_size", "<built-in"))]


class Net(nn.Module):
    """Linears a, b, c (D -> H), d (H -> D), e (H -> H), f (D -> 1) and `body(self, x, *others)`."""

    def __init__(self, body):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, D)
        self.e, self.f = nn.Linear(H, H, bias=False), nn.Linear(D, 1)
        self.norm, self.body = nn.LayerNorm(D), body

    def forward(self, x, y=None):
        return self.body(self, x) if y is None else self.body(self, x, y)


def both(body, *others, specs=QUANTIZED):
    """-> (graph, fused graph) of a Net, after checking them against each other at two sizes."""
    torch.manual_seed(0)
    inputs = (torch.randn(3, 5, D), *others)
    gm = rewritten(Net(body), inputs, specs)
    before, small = show(gm), tuple(t[:2, :4].contiguous() if t.dim() == 3 else t for t in inputs)
    done = fuse(gm)
    assert show(gm) == before
    with torch.no_grad():
        same(gm(*inputs), done(*inputs))
        same(gm(*small), done(*small))
    assert show(fuse(done)) == show(done)
    assert stored_bytes(gm) == stored_bytes(done)
    assert dict(gm.named_parameters()).keys() == dict(done.named_parameters()).keys()
    return gm, done
