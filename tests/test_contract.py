"""What every rewrite promises (fxcompress/passes/__init__.py), held against every awkward weight of the market."""

import itertools
import re
from dataclasses import replace

import pytest
import torch
from torch import fx
from torch.utils._pytree import tree_map

from fxcompress.codegen.ops import OPS
from fxcompress.core.rewrite import Storage, Structure
from fxcompress.core.surgery import finish
from fxcompress.passes import REWRITES
from fxcompress.passes.hidden_units import HiddenUnits
from fxcompress.passes.recipe import Recipe, parse
from tests.market import NAMES, market

STALLS = {stall.name: stall for stall in market()}
ALONE = [r for r in REWRITES if r is not HiddenUnits]  # it acts on several weights at once: test_hidden_units*.py
EVERY = list(itertools.product(ALONE, NAMES))
each = pytest.mark.parametrize(("rewrite", "name"), EVERY, ids=[f"{r.name}-{n.replace(' ', '-')}" for r, n in EVERY])
structures = [(r, n) for r, n in EVERY if issubclass(r, Structure)]
each_structure = pytest.mark.parametrize(
    ("rewrite", "name"), structures, ids=[f"{r.name}-{n.replace(' ', '-')}" for r, n in structures]
)


def recipes(rewrite, site, storages=True):
    """The cheapest, a middling and the most exact instance, plain and with their factors at 8 bits."""
    space = list(rewrite.space(site))
    picked = [space[i] for i in sorted({0, len(space) // 2, len(space) - 1})] if space else []
    if issubclass(rewrite, Storage):
        return [Recipe(storage=s) for s in picked]
    found = [Recipe(s) for s in picked]
    eight = parse("quantize{bits=8, group_size=0}", REWRITES).storage
    return found + [Recipe(s, eight) for s in picked if storages and s.matrices(site)]


def served(rewrite, name):
    """The site, or a skip where the rewrite says why it does not act there; the reasons have a test of their own."""
    site = STALLS[name].site
    why = rewrite.refuses(site)
    if why is not None:
        pytest.skip(f"{rewrite.name} refuses: {why}")
    return site


def rewritten(stall, recipe, made):
    """The stall's graph with the recipe carried out."""
    work = stall.gm.copy()
    made.apply(work, replace(stall, gm=work).site)
    finish(work)
    return work


def machine(dtype):
    """How far the outputs of two orders of the same sums may differ, relative to their size."""
    return 16 * torch.finfo(dtype).eps


@each
def test_a_refusal_is_a_clause(rewrite, name):
    why = rewrite.refuses(STALLS[name].site)
    assert why is None or re.fullmatch(r"[^A-Z\n][^\n]*[^.\s]", why), why


@each
def test_the_spec_reads_back(rewrite, name):
    site = served(rewrite, name)
    for recipe in recipes(rewrite, site):
        assert parse(str(recipe), REWRITES) == recipe
        assert recipe.at(site) == recipe


@each
def test_bytes_claimed_are_bytes_stored(rewrite, name):
    site = served(rewrite, name)
    for recipe in recipes(rewrite, site):
        stored = sum(t.numel() * t.element_size() for t in recipe.make(site).tensors.values())
        assert recipe.stored_bytes(site) == stored, str(recipe)


@torch.no_grad()
@each
def test_the_error_claimed_is_the_error_measured(rewrite, name):
    site, stall = served(rewrite, name), STALLS[name]
    if not stall.calibrated:
        pytest.skip("without data an error is of the weight alone, and no inputs can confirm it")
    want, signal = stall.gm(stall.x).double(), stall.signal()
    for recipe in recipes(rewrite, site):
        made = recipe.make(site)
        assert bool(torch.isfinite(made.weight.float()).all()), str(recipe)
        got = rewritten(stall, recipe, made)(stall.x)
        assert got.dtype == stall.gm(stall.x).dtype
        size = float(signal.square().sum())
        if size == 0:  # nothing to be relative to: what comes out must be nothing, too
            assert float((got.double() - want).abs().max()) < 1e-9
            assert recipe.error(site, made.weight) < 1e-6
            continue
        measured = float((got.double() - want).square().sum()) / size
        claimed = recipe.error(site, made.weight)
        # Squared errors e and (e + d)^2 with d the roundings of the two outputs: 2 e d + d^2. The bias that is added
        # before rounding counts with its size; a moment accumulated in float64 has no error of its own to speak of.
        d = machine(want.to(site.weight.dtype).dtype) * max(1.0, float(want.norm()) / size**0.5)
        slack = 2 * claimed**0.5 * d + d * d
        if recipe.structure.input_error(site) > 0:  # rounding noise of activations is modelled, not exact
            assert measured <= 1.25 * claimed + slack, str(recipe)
            continue
        assert measured <= claimed * (1 + 1e-4) + slack, str(recipe)
        # Rounding codes are read back exactly as they were judged; 2 % is what the contract leaves for bounds.
        assert claimed <= 1.02 * measured + slack + 1e-6 * claimed, str(recipe)


@torch.no_grad()
@each
def test_the_op_is_the_product_with_the_dense_weight(rewrite, name):
    site, stall = served(rewrite, name), STALLS[name]
    for recipe in recipes(rewrite, site):
        if recipe.structure.input_error(site) > 0:
            continue  # rounds its inputs: tests/test_*_dynamic.py compare it with its own arithmetic
        made = recipe.make(site)
        got = rewritten(stall, recipe, made)(stall.x).double()
        weight = made.weight.double()
        product = weight[stall.x] if site.kind == "embedding" else stall.x.double() @ weight.T
        bias = made.bias if made.bias is not None else stall.gm.state_dict().get("0.bias")
        want = product if bias is None else product + bias.double()
        size = stall.x.double().norm() * weight.norm() if site.kind != "embedding" else weight.norm() * len(stall.x)
        room = machine(site.weight.dtype) * float(size + want.norm()) + 1e-30
        assert float((got - want).norm()) <= room, str(recipe)


@each
def test_the_space_runs_from_cheap_to_exact(rewrite, name):
    site = served(rewrite, name)
    space = list(rewrite.space(site))
    whole = [Recipe(storage=s) if issubclass(rewrite, Storage) else Recipe(s) for s in space]
    stored = [r.stored_bytes(site) for r in whole]
    assert stored == sorted(stored), [str(r) for r in whole]
    if len(whole) > 1 and float(STALLS[name].signal().norm()) > 0:
        first, last = (r.error(site, r.make(site).weight) for r in (whole[0], whole[-1]))
        assert last <= first * (1 + 1e-6) + machine(site.weight.dtype) ** 2


@each
def test_it_is_deterministic(rewrite, name):
    site = served(rewrite, name)
    for recipe in recipes(rewrite, site)[:2]:
        one, two = (recipe.make(STALLS[name].site).tensors for _ in range(2))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[k], two[k]) for k in one)


@each_structure
def test_a_random_start_has_the_same_shapes_and_spread(rewrite, name):
    site = served(rewrite, name)
    for recipe in recipes(rewrite, site, storages=False):
        made = recipe.make(site)
        drawn = recipe.draw(site, torch.Generator().manual_seed(0))
        assert {k: (t.shape, t.dtype) for k, t in made.tensors.items()} == {
            k: (t.shape, t.dtype) for k, t in drawn.tensors.items()
        }
        again = recipe.draw(site, torch.Generator().manual_seed(0))
        assert all(torch.equal(drawn.tensors[k], again.tensors[k]) for k in drawn.tensors)
        assert bool(torch.isfinite(drawn.weight.float()).all())


@pytest.mark.parametrize("rewrite", [r for r in ALONE if issubclass(r, Structure)], ids=lambda r: r.name)
@pytest.mark.parametrize("name", ["plain", "tall", "prime"])
def test_gradients_are_those_of_the_formula(rewrite, name):
    site, stall = served(rewrite, name), STALLS[name]
    for recipe in recipes(rewrite, site, storages=False)[:1]:
        if recipe.structure.input_error(site) > 0:
            continue  # straight-through: tests/test_*_dynamic.py
        made = recipe.make(site)
        signed = rewritten(stall, recipe, made)
        work = fx.GraphModule(signed, signed.graph).double()  # one that does not insist on float32
        floats = {k: v.detach().double().requires_grad_() for k, v in work.named_parameters()}
        x = stall.x[:3].double().requires_grad_()

        def run(x, *values, work=work, floats=floats):
            return torch.func.functional_call(work, dict(zip(floats, values)), (x,))

        assert torch.autograd.gradcheck(run, (x, *floats.values()), fast_mode=True), str(recipe)


class Checker(fx.Interpreter):
    """Runs a graph, and every fxcompress op in it through opcheck with the arguments it is really given."""

    def __init__(self, gm):
        super().__init__(gm)
        self.seen = set()

    def trains(self, argument):
        fixed = any(argument is buffer for buffer in self.module.buffers())
        return isinstance(argument, torch.Tensor) and argument.is_floating_point() and not fixed

    def call_function(self, target, args, kwargs):
        if getattr(target, "namespace", "") == "fxcompress":
            # Whatever can be trained is: x, and the matrices of a structure.
            given = tree_map(lambda a: a.detach().requires_grad_() if self.trains(a) else a, (args, kwargs))
            assert set(torch.library.opcheck(target, *given).values()) == {"SUCCESS"}
            self.seen.add(target._schema.name)
        return super().call_function(target, args, kwargs)


def checked(rewrite, name):
    """Names of the ops that the rewrite emits at that stall, all of them accepted by torch."""
    stall, seen = STALLS[name], set()
    if rewrite.refuses(stall.site) is None:
        for recipe in recipes(rewrite, stall.site, storages=False)[-1:]:
            checker = Checker(rewritten(stall, recipe, recipe.make(stall.site)))
            checker.run(stall.x[:3], enable_io_processing=False)
            seen |= checker.seen
    return seen


@pytest.mark.parametrize("rewrite", ALONE, ids=lambda r: r.name)
def test_torch_accepts_the_ops_it_emits(rewrite):
    # All of opcheck's tests: schema, autograd registration, fake tensors, and AOT dispatch with dynamic shapes.
    assert set().union(*(checked(rewrite, name) for name in ("plain", "without bias", "embedding", "vocabulary")))


def test_every_op_has_been_accepted():
    emitted = set().union(*(checked(r, n) for r in ALONE for n in ("plain", "embedding", "vocabulary")))
    # These have opcheck in files of their own.
    elsewhere = {f"fxcompress::{name}" for name in ("linformer_attention", "fused", "fused_parallel")}
    assert {op._qualname for op in OPS} == emitted | elsewhere


@pytest.mark.parametrize("rewrite", ALONE, ids=lambda r: r.name)
def test_no_rewrite_refuses_everything(rewrite):
    """Its contract would hold emptily."""
    assert any(rewrite.refuses(stall.site) is None for stall in STALLS.values())
