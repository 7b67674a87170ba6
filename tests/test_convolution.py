"""Convolutions: patches against torch's own convolution, exact errors, bytes and work."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from fxcompress.core import calibrate as calibration
from fxcompress.core.calibrate import calibrate
from fxcompress.core.capture import capture
from fxcompress.core.convolution import Window
from fxcompress.core.errors import SpecError
from fxcompress.core.metric import local_error
from fxcompress.core.site import Statistics, find_sites, tokens_of
from fxcompress.core.surgery import finish
from fxcompress.passes.low_rank import LowRank
from fxcompress.passes.quantize import Quantize
from fxcompress.passes.recipe import Recipe

CASES = {
    "1d": (lambda: nn.Conv1d(6, 10, 5, stride=2, padding=3), (6, 23)),
    "1d dilated": (lambda: nn.Conv1d(6, 10, 3, dilation=4, bias=False), (6, 23)),
    "2d": (lambda: nn.Conv2d(6, 10, 3, padding=1), (6, 9, 8)),
    "2d strides": (lambda: nn.Conv2d(6, 10, (4, 3), stride=(3, 2), padding=(0, 2), bias=False), (6, 13, 9)),
    "2d dilated": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=2, dilation=(2, 1)), (6, 9, 12)),
    "2d same": (lambda: nn.Conv2d(6, 10, 3, padding="same", dilation=2), (6, 9, 8)),
    "2d same, even": (lambda: nn.Conv2d(6, 10, (2, 4), padding="same"), (6, 9, 8)),
    "2d valid": (lambda: nn.Conv2d(6, 10, 3, padding="valid", bias=False), (6, 9, 8)),
    "2d circular": (lambda: nn.Conv2d(6, 10, 3, padding=1, padding_mode="circular"), (6, 9, 8)),
    "1 x 1": (lambda: nn.Conv2d(12, 10, 1), (12, 5, 4)),
    "patches of an image": (lambda: nn.Conv2d(3, 10, 4, stride=4), (3, 16, 16)),
    "3d": (lambda: nn.Conv3d(3, 10, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 2)), (3, 5, 6, 4)),
}
RECIPES = {
    "quantize": Recipe(storage=Quantize(3, 0)),
    "groups": Recipe(storage=Quantize(4, 32)),
    "low rank": Recipe(LowRank(4)),
    "both": Recipe(LowRank(6), Quantize(8, 0)),
}
each_case = pytest.mark.parametrize("case", CASES)
each_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(shape, count=3, seed=1):
    """Neighbours are alike and the mean is not zero, as in what real convolutions see."""
    x = normal(count, *shape, seed=seed)
    return x + x.roll(1, -1) + x.roll(1, 1) + 0.5


def layer_of(case):
    """-> (a layer with a smooth random weight, inputs for it)."""
    torch.manual_seed(0)
    make, shape = CASES[case]
    return make().eval(), images(shape)


def captured(case):
    """-> (graph, its site with the moments of exactly `x`, x)."""
    layer, x = layer_of(case)
    return (*informed(nn.Sequential(layer), x), x)


def informed(model, x):
    """-> (graph, its only site); fewer than four examples are used whole, and nothing is held out."""
    gm = capture(model, (x,))
    known = calibrate(gm, find_sites(gm), [x], progress=False)
    assert not known.has_held_out
    (site,) = find_sites(gm)
    return gm, known.informed(site)


def carried_out(gm, recipe, statistics):
    """The graph with the recipe at its only site, and what it stored there."""
    work = gm.copy()
    (site,) = find_sites(work)
    made = recipe.make(replace(site, statistics=statistics))
    made.apply(work, site)
    finish(work)
    return work, made


@each_case
def test_patches_times_the_flattened_weight_are_the_convolution(case):
    _, site, x = captured(case)
    (use,) = site.uses
    assert site.kind == use.kind == "convolution"
    layer = layer_of(case)[0].double().requires_grad_(False)
    assert (site.rows, site.columns) == (10, layer.weight[0].numel())
    seen = F.pad(x, layer._reversed_padding_repeated_twice, "circular") if case == "2d circular" else x
    patches = use.window.patches(seen.double())
    got = patches.flatten(-1 - len(use.window.kernel)) @ layer.weight.flatten(1).T
    want = layer(x.double()) - (0 if layer.bias is None else layer.bias.reshape(-1, *[1] * len(use.window.kernel)))
    # Sums of at most 6 * 12 products in float64, in another order.
    torch.testing.assert_close(got.movedim(-1, 1), want, rtol=0, atol=72 * 2**-52 * float(want.abs().max()))


@each_case
def test_moments_are_those_of_all_patches(case):
    _, site, x = captured(case)
    window = site.uses[0].window
    if case == "2d circular":
        x = F.pad(x, (1, 1, 1, 1), "circular")
    if len(window.kernel) == 2 and all(before == after for before, after in window.padding):  # torch has these itself
        padding = [before for before, _ in window.padding]
        columns = F.unfold(x.double(), window.kernel, window.dilation, padding, window.stride)
    else:
        columns = window.patches(x.double()).flatten(-1 - len(window.kernel)).flatten(1, -2).mT
    p = columns.mT.reshape(-1, site.columns)
    known = site.statistics
    # Products are summed in float32, over at most 3 * 9 * 8 patches.
    tolerance = 3 * 72 * 2**-24
    want = p.T @ p / len(p)
    torch.testing.assert_close(known.second_moment, want, rtol=0, atol=tolerance * float(want.abs().max()))
    torch.testing.assert_close(known.mean, p.mean(0), rtol=0, atol=tolerance * float(p.abs().max()))
    assert known.sample.shape[1] == site.columns
    # Every row kept is a patch: some patch is no further than float32's rounding of it.
    assert float(torch.cdist(known.sample[:20].double(), p).amin(1).max()) < 1e-5


@each_recipe
@each_case
def test_the_predicted_error_is_the_measured_one(case, recipe):
    gm, site, x = captured(case)
    work, made = carried_out(gm, recipe, site.statistics)
    layer = layer_of(case)[0]
    bias = 0 if layer.bias is None else layer.bias.detach().reshape(-1, *[1] * len(site.uses[0].window.kernel))
    with torch.no_grad():
        want, got = gm(x), work(x)
    measured = float((want - got).double().square().sum() / (want - bias).double().square().sum())
    assert 1e-6 < measured < 0.5
    # Moments are float32 sums over up to 216 patches; taking mu mu^T off leaves their rounding, 2^-24 each, beside an
    # error of 1e-6 at least: 0.2 % there, and far less at most of these.
    assert local_error(site, made.weight) == pytest.approx(measured, rel=2e-3)


@each_recipe
@each_case
def test_the_graph_multiplies_by_the_dense_weight_the_recipe_amounts_to(case, recipe):
    gm, site, x = captured(case)
    work, made = carried_out(gm, recipe, site.statistics)
    twin = copy.deepcopy(layer_of(case)[0])
    with torch.no_grad():
        twin.weight.copy_(made.weight.reshape(twin.weight.shape))
        if made.bias is not None:
            twin.bias.copy_(made.bias)
        want = twin(x)
        # Two orders of sums over at most 72 products.
        assert float((work(x) - want).abs().max()) <= 72 * 2**-24 * float(want.abs().max())
        assert work(x[:1]).shape == want[:1].shape
        assert work(torch.cat([x, x])).shape[0] == 2 * len(x)


@each_recipe
@each_case
def test_the_bytes_and_the_work_claimed_are_those_of_the_graph(case, recipe):
    gm, site, x = captured(case)
    work, made = carried_out(gm, recipe, site.statistics)
    assert sum(t.numel() * t.element_size() for t in made.tensors.values()) == recipe.stored_bytes(site)
    stored = sum(t.numel() * t.element_size() for t in [*work.parameters(), *work.buffers()])
    bias = 0 if made.bias is None and site.uses[0].bias is None else 10 * 4
    assert stored == recipe.stored_bytes(site) + bias
    symbols = gm.signature.symbols((x,), {})
    for graph, cost in ((gm, site.dense_cost), (work, recipe.cost(site))):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            graph(x)
        assert cost.at(**symbols).flops == counter.get_total_flops()  # torch's own count, of what really ran
    (use,) = site.uses
    inputs, outputs = use.x.meta["val"].numel() // use.x.meta["val"].shape[0] * len(x), gm(x).numel()
    assert site.dense_cost.at(**symbols).bytes == 4 * (inputs + outputs + site.weight.numel())


class Zoo(nn.Module):
    """What is a site, and what is left alone."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.again = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 8, 3, padding=1)
        self.made = nn.Conv2d(8, 8, 1)
        self.looked_at = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.again(self.again(self.first(x)).relu())
        x = self.up(self.depthwise(self.grouped(x)))
        x = F.conv2d(x, self.made.weight * 2, self.made.bias)
        x = self.looked_at(x) * self.looked_at.weight.square().mean()
        return self.head(x.mean((2, 3)))


def test_grouped_transposed_computed_and_otherwise_needed_weights_are_left_alone():
    gm = capture(Zoo().eval(), (normal(2, 4, 6, 6),))
    sites = {s.name: s for s in find_sites(gm)}
    assert {name: (s.kind, s.rows, s.columns, len(s.uses)) for name, s in sites.items()} == {
        "first": ("convolution", 8, 36, 1),
        "again": ("convolution", 8, 72, 2),
        "head": ("linear", 8 - 3, 8, 1),
    }
    assert sites["first"].correctable
    assert not sites["again"].correctable


def test_a_weight_shared_by_two_convolutions_is_one_decision_over_the_patches_of_both():
    torch.manual_seed(0)
    shared = nn.Conv2d(6, 6, 3, padding=1, bias=False)
    x = images((6, 7, 7))
    _, site = informed(nn.Sequential(shared, nn.ReLU(), shared), x)
    with torch.no_grad():
        p = torch.cat([F.unfold(t, 3, padding=1).mT.reshape(-1, 54) for t in (x, shared(x).relu())]).double()
    want = p.T @ p / len(p)
    torch.testing.assert_close(site.statistics.second_moment, want, rtol=0, atol=300 * 2**-24 * float(want.max()))
    gm = capture(nn.Sequential(shared, nn.ReLU(), shared), (x,))
    work, made = carried_out(gm, Recipe(LowRank(3)), site.statistics)
    assert len(list(work.named_parameters())) == 2
    twin = copy.deepcopy(shared)
    with torch.no_grad():
        twin.weight.copy_(made.weight.reshape(6, 6, 3, 3))
        want = twin(twin(x).relu())
        assert float((work(x) - want).abs().max()) <= 108 * 2**-24 * float(want.abs().max())


def test_convolutions_of_one_input_share_moments_only_where_their_windows_agree():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1)
            self.c, self.d = nn.Conv2d(6, 4, 5, padding=2), nn.Conv2d(6, 4, 3, padding=1, stride=2)

        def forward(self, x):
            return self.a(x), self.b(x), self.c(x), self.d(x)

    x = images((6, 8, 8))
    gm = capture(Fork().eval(), (x,))
    sites = find_sites(gm)
    known = calibrate(gm, sites, [x], progress=False)
    a, b, c, d = (known.statistics(s).second_moment for s in sites)
    assert len(known.moments) == 3
    assert torch.equal(a, b)
    assert c.shape == (150, 150)
    assert not torch.equal(a, d)


def test_padding_by_an_attention_mask_is_left_out_at_the_positions_of_the_output():
    window = Window(4, (3,), (1,), ((1, 1),), (1,))
    x, mask = normal(2, 4, 5), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    every = window.patches(x).flatten(2)
    assert torch.equal(calibration.patches(window, x, mask), every[mask.bool()])
    assert torch.equal(calibration.patches(window, x, mask[:, :4]), every.flatten(0, 1))  # of other positions: no use
    assert calibration.patches(window, x[:0]).shape == (0, 12)


def test_more_patches_than_the_cap_are_sampled_evenly(monkeypatch):
    window = Window(2, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    x = torch.arange(32.0).repeat(8, 2, 32, 1) + 1  # every pixel is the number of its column, from 1
    every = calibration.patches(window, x)
    assert every.shape == (8 * 32 * 32, 18)
    monkeypatch.setattr(calibration, "PATCHES", 512)
    some = calibration.patches(window, x)
    assert some.shape == (512, 18)
    centres = torch.bincount(some[:, 4].long() - 1, minlength=32)
    # 16 of every column of the image if spread perfectly; equal steps of 16 would have found two columns only.
    assert int(centres.min()) >= 8
    assert int(centres.max()) <= 24
    monkeypatch.setattr(calibration, "PATCH_VALUES", 18 * 100)
    assert calibration.patches(window, x).shape == (100, 18)


def test_inputs_without_a_batch_dimension():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(6, 10, 3, padding=1).eval(), images((6, 9, 8), count=1)[0]

    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x[0])

    gm, site = informed(Alone(), torch.stack([x, x]))
    assert tokens_of(site.uses[0]) == 72
    p = F.unfold(x.unsqueeze(0), 3, padding=1)[0].double()
    want = p @ p.T / 72
    torch.testing.assert_close(site.statistics.second_moment, want, rtol=0, atol=72 * 2**-24 * float(want.max()))
    for recipe in RECIPES.values():
        work, made = carried_out(gm, recipe, site.statistics)
        with torch.no_grad():
            want = F.conv2d(x, made.weight.reshape(10, 6, 3, 3), made.bias, padding=1)
            assert float((work(torch.stack([x, x])) - want).abs().max()) <= 54 * 2**-24 * float(want.abs().max())


@pytest.mark.parametrize(("transposed", "groups"), [(False, 1), (True, 1), (False, 2)])
def test_a_bare_aten_convolution_is_a_site_too(transposed, groups):
    root, graph = nn.Module(), fx.Graph()
    root.weight = nn.Parameter(normal(10, 6, 3, 3), requires_grad=False)
    x, w = graph.placeholder("x"), graph.get_attr("weight")
    w.meta["val"] = root.weight
    args = (x, w, None, [2, 1], [1, 1], [1, 1], transposed, [0, 0], groups)
    graph.output(graph.call_function(torch.ops.aten.convolution.default, args))
    gm = fx.GraphModule(root, graph)
    if transposed or groups > 1:
        assert find_sites(gm) == []
        return
    (site,) = find_sites(gm)
    made = Recipe(LowRank(4)).make(site)
    made.apply(gm, site)
    finish(gm)
    x = images((6, 9, 8))
    want = F.conv2d(x, made.weight.reshape(10, 6, 3, 3), None, (2, 1), 1)
    assert float((gm(x) - want).abs().max()) <= 54 * 2**-24 * float(want.abs().max())


AWKWARD = {
    "all zero": torch.zeros(8, 6, 3, 3),
    "rank deficient": (normal(8, 2, seed=3) @ normal(2, 54, seed=4)).reshape(8, 6, 3, 3),
    "prime": normal(7, 5, 3, 3),
    "one channel": normal(8, 1, 3, 3),
    "one of one": normal(8, 1, 1, 1),
    "huge range": normal(8, 6, 3, 3) * torch.logspace(-6, 3, 8).reshape(-1, 1, 1, 1),
    "channels last": normal(8, 6, 3, 3).to(memory_format=torch.channels_last),
    "not contiguous": normal(6, 8, 3, 3).transpose(0, 1),
    "bfloat16": normal(8, 6, 3, 3).bfloat16(),
    "float16": normal(8, 6, 3, 3).half(),
}


@pytest.mark.parametrize("dead", [False, True], ids=["", "dead-channel"])
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_weights(name, dead):
    weight = AWKWARD[name]
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], padding=weight.shape[2] // 2).eval()
    with torch.no_grad():
        layer.to(weight.dtype).weight = nn.Parameter(weight)
    x = images((weight.shape[1], 7, 7)).to(weight.dtype)
    if dead:
        x[:, 0] = 0
    gm, site = informed(nn.Sequential(layer), x)
    assert torch.equal(site.weight, weight.flatten(1))
    eps = torch.finfo(weight.dtype).eps
    for kind in (LowRank, Quantize):
        if kind.refuses(site) is not None:
            assert min(site.rows, site.columns) < 2 or weight.numel() < 64
            continue
        space = list(kind.space(site))
        for one in (space[0], space[-1]):
            recipe = Recipe(one) if kind is LowRank else Recipe(storage=one)
            work, made = carried_out(gm, recipe, site.statistics)
            stored = sum(t.numel() * t.element_size() for t in made.tensors.values())
            assert stored == recipe.stored_bytes(site)
            with torch.no_grad():
                got = work(x)
                want = F.conv2d(x, made.weight.reshape(weight.shape), made.bias, padding=weight.shape[2] // 2)
            assert got.dtype == weight.dtype
            assert bool(torch.isfinite(got).all())
            # In half precision the factors' product is never rounded to a weight, and the channels in between are:
            # a few roundings of the largest value that is summed.
            terms = float(x.abs().max()) * float(weight.abs().flatten(1).sum(1).max()) + 1
            assert float((got - want).abs().max()) <= 4 * eps * terms


def test_a_share_of_the_rank_counts_channels_alone():
    _, site, _ = captured("2d")  # 10 x 54, 6 channels: floor(10 * 6 / 16) = 3
    assert LowRank(0.7).at(site) == LowRank(2)
    assert LowRank(0.1).at(site) == LowRank(1)
    with pytest.raises(SpecError, match=r"low_rank\{rank=11\} at 0: the weight is 10 x 54, so rank must be 1 to 10"):
        LowRank(11).at(site)


def test_the_metric_of_the_patches_beats_the_plain_svd_at_every_rank():
    _, site, _ = captured("2d")
    blind = replace(site, statistics=Statistics(), _analyses={})
    for rank in range(1, 10):
        assert local_error(site, LowRank(rank).unstored(site)) < local_error(site, LowRank(rank).unstored(blind))
