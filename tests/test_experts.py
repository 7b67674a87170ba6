"""Mixtures of experts: the stacked weight is a site, its product an op that saves and loads without transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fxcompress
from benchmarks.models.zoo import ZOO
from fxcompress.core.capture import capture
from fxcompress.core.experts import EXPERTS, experts_linear
from fxcompress.core.site import find_sites

ENTRIES = {entry.name: entry for entry in ZOO}


@pytest.fixture(scope="module")
def mixtral():
    entry = ENTRIES["Mixtral"]
    model = entry.build()
    compiled = fxcompress.compile(model, "3x", calibration=entry.batches(8), rewrites=["quantize"], progress=False)
    return model, compiled, entry.batches(1, seed=1)[0]


def case(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 16, generator=generator, dtype=dtype)
    weight = torch.randn(4, 32, 16, generator=generator, dtype=dtype)
    return x, weight, torch.tensor([3, 3, 7, 10], dtype=torch.int32)  # the second expert gets nothing


def by_hand(x, weight, offs):
    starts = [0, *offs.tolist()]
    return torch.cat([x[a:b] @ w.T for a, b, w in zip(starts, starts[1:], weight)])


def test_it_is_a_product_of_each_row_with_its_experts_weight():
    x, weight, offs = case(torch.float32)
    assert torch.equal(experts_linear(x, weight, offs), by_hand(x, weight, offs))


def test_its_gradients_are_those_of_the_products():
    x, weight, offs = case(torch.float32)
    direction = torch.randn(10, 32, generator=torch.Generator().manual_seed(1))
    grads = []
    for product in (experts_linear, by_hand):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        grads.append(torch.autograd.grad((product(*leaves, offs) * direction).sum(), leaves))
    for got, want in zip(*grads):
        bound = 32 * torch.finfo(torch.float32).eps  # sums of at most 32 float32 products, in two orders
        torch.testing.assert_close(got, want, rtol=0, atol=bound * float(want.abs().max()))


def test_every_expert_weight_of_a_mixture_is_a_site():
    entry = ENTRIES["Mixtral"]
    gm = capture(entry.build(), entry.batches(1)[0])
    stacked = {site.name: (site.rows, site.columns) for site in find_sites(gm) if site.kind == "experts"}
    assert stacked == {
        f"model.layers.{layer}.mlp.experts.{name}": size
        for layer in (0, 1) for name, size in (("gate_up_proj", (4 * 512, 128)), ("down_proj", (4 * 128, 256)))
    }  # fmt: skip
    assert not any("transformers" in str(node.target) for node in gm.graph.nodes)
    (use,) = next(site for site in find_sites(gm) if site.kind == "experts").uses
    assert use.node.target is EXPERTS


def test_work_is_that_of_the_experts_a_row_meets():
    entry = ENTRIES["Mixtral"]
    gm = capture(entry.build(), entry.batches(1)[0])
    site = next(site for site in find_sites(gm) if site.kind == "experts")
    symbols = gm.signature.symbols(*gm.signature.bind((), entry.batches(1)[0]))
    # 4 x 16 tokens meet 2 experts each, of 512 x 128
    assert site.dense_cost.at(**symbols).flops == 2 * (4 * 16 * 2) * 512 * 128


@torch.no_grad()
def test_experts_are_compressed_saved_and_loaded(mixtral, tmp_path):
    _, compiled, probe = mixtral
    specs = {choice.site: choice.spec for choice in compiled.plan.choices}
    assert all("quantize" in specs[f"model.layers.{layer}.mlp.experts.gate_up_proj"] for layer in (0, 1))
    assert compiled.report.ratio >= 3
    fxcompress.save(compiled, tmp_path / "m")
    assert torch.equal(fxcompress.load(tmp_path / "m")(**probe).logits, compiled(**probe).logits)


def test_a_saved_mixture_runs_where_transformers_is_not(mixtral, tmp_path):
    _, compiled, probe = mixtral
    fxcompress.save(compiled, tmp_path / "m")
    with torch.no_grad():
        torch.save({"probe": probe, "want": compiled(**probe).logits}, tmp_path / "probe.pt")
    program = """
import sys
sys.modules["transformers"] = None
import logging, torch, fxcompress
logging.disable()
told = torch.load(sys.argv[1] + "/probe.pt")
with torch.no_grad():
    got = fxcompress.load(sys.argv[1] + "/m")(**told["probe"])
print(torch.equal(got["logits"], told["want"]))
"""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, cwd=root, timeout=300
    )
    assert done.stdout.strip() == "True", done.stderr
