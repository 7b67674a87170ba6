"""torch.compile(model, backend="fxcompress", options={"lower": "cpu"}): the kernels of `fxcompress.lower` in every
graph that torch.compile captures, each weight packed once.

A product rounds its inputs to 255 steps of their range: about 6 / 255 / sqrt(12) = .7 % of them, rms. Five in a row are
off by sqrt(5) times as much, 1.6 %: ROUNDED. Two ways to compute the same product differ in few of the steps: FLIPPED.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import fxcompress
from fxcompress.codegen.cpu import products
from fxcompress.core.errors import BackendError
from fxcompress.core.site import find_sites
from fxcompress.dynamo_cpu import Lowering
from fxcompress.parts import parts_of
from tests.test_cpu_lowering import relative, vnni

WIDE = 192
ROUNDED, FLIPPED = 0.02, 0.007
pytestmark = vnni


class Net(nn.Module):
    """A table tied to the head, attention, a GELU between two products, and a convolution."""

    def __init__(self, breaks=False):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.qkv, self.o = nn.Embedding(256, WIDE), nn.Linear(WIDE, 3 * WIDE), nn.Linear(WIDE, WIDE)
        self.up, self.down = nn.Linear(WIDE, 2 * WIDE), nn.Linear(2 * WIDE, WIDE)
        self.deep, self.norm = nn.Conv1d(WIDE, WIDE, 3, padding=1), nn.LayerNorm(WIDE)
        self.head, self.breaks = nn.Linear(WIDE, 256, bias=False), breaks
        self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids)
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = self.norm(x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        if self.breaks:
            torch._dynamo.graph_break()
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x + self.deep(x.transpose(1, 2)).transpose(1, 2))


def ids(batch=4, length=24):
    return torch.arange(batch * length).reshape(batch, length) * 7 % 256


CALIBRATION = [((ids() * 5 + i) % 256,) for i in range(8)]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """The static rule, whatever was measured on this machine; and no graph of another test."""
    monkeypatch.setattr(fxcompress.lowering, "cached", lambda: None)
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def pair():
    net = Net().eval()
    return net, fxcompress.compile(net, "4x", calibration=CALIBRATION, progress=False)


@pytest.fixture
def packings(monkeypatch):
    """The shapes of the weights that were packed."""
    seen, real = [], products.rounded_rows
    monkeypatch.setattr(products, "rounded_rows", lambda weight: seen.append(tuple(weight.shape)) or real(weight))
    return seen


def backend(model, **options):
    settings = {name: options.pop(name) for name in ("fullgraph", "dynamic") if name in options}
    return torch.compile(model, backend="fxcompress", options={"lower": "cpu", **options}, **settings)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_computes_what_lower_computes(pair, packings, mode):
    net, compiled = pair
    lowered = fxcompress.lower(compiled, to="eager")
    assert len(packings) >= 5
    packings.clear()
    with mode():
        mine = backend(net, plan=compiled, fullgraph=True)
        for length in (24, 9):
            found = mine(ids(length=length))
            assert relative(found, lowered(ids(length=length))) < FLIPPED
            assert 0 < relative(found, compiled(ids(length=length))) < ROUNDED
    assert len(packings) >= 5


@torch.no_grad()
@pytest.mark.parametrize("breaks", [False, True], ids=["whole", "broken"])
def test_ten_lengths_and_graph_breaks_pack_no_weight_twice(pair, packings, breaks):
    _, compiled = pair
    mine = backend(Net(breaks).eval(), plan=compiled)
    mine(ids())
    first = len(packings)
    for length in (3, 29, 5, 7, 11, 13, 17, 19, 23):
        assert relative(mine(ids(length=length)), compiled(ids(length=length))) < ROUNDED
    assert len(packings) == first


@torch.no_grad()
def test_one_weight_with_two_biases_and_a_transposed_one():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE)
            self.turned = Conv1D(WIDE, WIDE)
            self.two.weight = self.one.weight
            self.one.bias.add_(3)

        def forward(self, x):
            return self.turned(self.two(x) + self.one(x).relu())

    net, x = Shared().eval(), torch.randn(32, 7, WIDE, generator=torch.Generator().manual_seed(1))
    compiled = fxcompress.compile(net, "3.5x", calibration=[(x,)], rewrites="quantize", progress=False)
    assert {choice.spec.split("{")[0] for choice in compiled.plan.choices} == {"quantize"}
    assert relative(backend(net, plan=compiled)(x), compiled(x)) < ROUNDED


@torch.no_grad()
def test_the_first_calls_calibrate_the_rest(pair):
    net, compiled = pair
    mine = backend(net, budget="4x", warmup_batches=8)
    for (batch,) in CALIBRATION:
        assert torch.equal(mine(batch), net(batch))
    assert relative(mine(ids(length=9)), compiled(ids(length=9))) < ROUNDED


@torch.no_grad()
@pytest.mark.parametrize(
    ("budget", "rewrites"), [("1.2x", ["low_rank"]), ("1.1x", ["block_low_rank"]), ("1.8x", ["int8_dynamic"])]
)
def test_other_families(budget, rewrites):
    net = Net().eval()
    compiled = fxcompress.compile(net, budget, calibration=CALIBRATION, rewrites=rewrites, progress=False)
    assert any(choice.spec.startswith(rewrites[0]) for choice in compiled.plan.choices)
    assert relative(backend(net, plan=compiled)(ids()), compiled(ids())) < ROUNDED


@torch.no_grad()
def test_autocast_to_bfloat16(pair):
    """eps of bfloat16 is .0078, as large as a step of 8 bits."""
    net, compiled = pair
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = backend(net, plan=compiled)(ids()), compiled(ids())
    assert found.dtype == wanted.dtype
    assert relative(found.float(), wanted.float()) < 2 * ROUNDED


def test_weights_elsewhere_are_refused(pair):
    net, compiled = pair
    site = next(s for s in find_sites(fxcompress.compile(net, "1x", example_inputs=(ids(),))) if s.name == "up")
    part = next(p for p in parts_of(compiled) if p.site == "up")
    away = replace(part, tensors={name: tensor.to("meta") for name, tensor in part.tensors.items()})
    with pytest.raises(BackendError, match="option lower='cpu' packs weights for this CPU, and the model is on meta"):
        Lowering().put(None, site, away)
