"""Seconds of graphs against sums by hand, on a profile by formula."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxcompress
from fxcompress.codegen.cpu import pointwise
from fxcompress.codegen.cpu.seconds import chain_seconds, seconds_of
from fxcompress.core.capture import capture
from fxcompress.core.errors import InputError
from tests.profiling import by_formula, grid

WIDE = 192
vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="int8 products need VNNI")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDE, 2 * WIDE), nn.Linear(2 * WIDE, WIDE)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


def symbols(gm):
    (node,) = gm.graph.find_nodes(op="placeholder")
    return [str(size) for size in node.meta["val"].shape[:2]]


def captured():
    torch.manual_seed(0)
    return capture(Net().eval(), (torch.randn(3, 5, WIDE),))


def test_a_captured_graph_is_its_calls_passes_and_weights():
    gm, p = captured(), by_formula()
    batch, seq = symbols(gm)
    found = seconds_of(gm, p, {batch: 4, seq: 4}, "eager")
    products = 2 * p.bare_seconds("float", 16, WIDE, 2 * WIDE)
    passes = p.pass_seconds("gelu", 16, 2 * WIDE, "eager") + p.pass_seconds("add", 16, WIDE, "eager")
    assert found.total == pytest.approx(products + passes + 4e-6 + 1e-5)  # four weights, a call
    assert found.total == pytest.approx(found.calls + sum(found.nodes.values()))
    assert float(found) == found.total


def test_seconds_grow_with_the_sizes_given():
    gm, p = captured(), by_formula()
    batch, seq = symbols(gm)
    one, more = (seconds_of(gm, p, {batch: b, seq: 16}, "inductor").total for b in (2, 8))
    assert 3 < (more - 1e-5) / (one - 1e-5) <= 4
    with pytest.raises(InputError, match=rf"input x has a size {batch}, and no number is given for {batch}"):
        seconds_of(gm, p, {seq: 4})


@vnni
@pytest.mark.parametrize("target", ["eager", "inductor"])
def test_a_chain_is_what_the_lowered_graph_costs_more(target):
    """Two products of a lowered graph, and of the chain: the same kernels at the same prices."""
    small = fxcompress.restructure(
        Net().eval(), {"*": "quantize{bits=8, group_size=0}"}, example_inputs=(torch.randn(3, 5, WIDE),)
    )
    p = by_formula(few=("int8_weight",))
    fast = fxcompress.lower(small, to=target, profile=p)
    batch, seq = symbols(fast.graph_module)
    for tokens in (4, 16, 64):
        found = seconds_of(fast, p, {batch: 1, seq: tokens})
        linear = sum(s for name, s in found.nodes.items() if "linear" in name)
        launches = 2e-6 if target == "inductor" else 0.0
        chain = chain_seconds([(2 * WIDE, WIDE, True), (WIDE, 2 * WIDE, True)], tokens, p, target=target)
        assert chain == pytest.approx(linear + launches, rel=1e-6)


def test_a_chain_of_what_is_kept_has_the_kept_kernel():
    p = by_formula()
    kernel = "bf16" if torch.cpu._is_avx512_bf16_supported() else "float"
    kept = chain_seconds([(512, 512, False)], 16, p)
    assert kept == p.product_seconds(kernel, 16, 512, 512)
    assert chain_seconds([(64, 64, False)], 16, p) == p.product_seconds("float", 16, 64, 64)  # too small


@pytest.mark.parametrize("target", ["eager", "inductor"])
def test_attention_norms_and_lookups_are_priced(target):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.norm, self.qkv = nn.Embedding(50, 64), nn.LayerNorm(64), nn.Linear(64, 192)

        def forward(self, ids):
            q, k, v = self.qkv(self.norm(self.table(ids))).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    gm = capture(Encoder().eval(), (torch.zeros(3, 5, dtype=torch.long),))
    batch, seq = symbols(gm)
    found = seconds_of(gm, by_formula(), {batch: 2, seq: 16}, target).nodes
    for name in ("embedding", "layer_norm", "linear", "scaled_dot_product_attention"):
        assert any(name in node for node in found), name


@pytest.mark.parametrize(
    ("batch", "positions", "kind"), [(1, 32, "compiled_short"), (1, 33, "compiled"), (2, 32, "compiled")]
)
def test_attention_is_priced_in_the_form_it_runs_in(batch, positions, kind):
    graph = fx.Graph()
    q, k, v = (graph.placeholder(name) for name in "qkv")
    for node in (q, k, v):
        node.meta["val"] = torch.randn(batch, 4, positions, 16)
    graph.output((graph.call_function(pointwise.attention, (q, k, v, None, None)),))
    p = by_formula()
    table = grid(((1,), (1,), (16,)), lambda *_: 1.0)
    dear = dataclasses.replace(p, attention={**p.attention, kind: table})
    (found, more) = (seconds_of(fx.GraphModule(nn.Module(), graph), of, {}, "inductor").total for of in (p, dear))
    assert more > found + 0.9
