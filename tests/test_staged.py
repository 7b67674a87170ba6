"""Staged calibration: statistics are those of the activations that the compressed prefix really makes."""

import pytest
import torch
from torch import nn

import fxcompress
from benchmarks.models import stories
from benchmarks.models.data import tinystories
from fxcompress.core.calibrate import calibrate
from fxcompress.core.capture import capture
from fxcompress.core.errors import CalibrationError
from fxcompress.core.frontier import Frontier, put
from fxcompress.core.site import find_sites
from fxcompress.passes import REWRITES
from fxcompress.passes.recipe import parse
from fxcompress.staged import Fixed, Staged, watched


class Net(nn.Module):
    """Two products of one input, a table, a convolution's output read as rows."""

    def __init__(self):
        super().__init__()
        self.table, self.first = nn.Embedding(20, 32), nn.Linear(32, 48)
        self.left, self.right, self.last = nn.Linear(48, 32), nn.Linear(48, 32), nn.Linear(32, 8)

    def forward(self, ids):
        h = self.first(self.table(ids)).relu()
        return self.last(self.left(h) * self.right(h).tanh())


def calibrated(model, batches):
    gm = capture(model, batches[0])
    sites = {site.name: site for site in find_sites(gm)}
    return gm, sites, calibrate(gm, list(sites.values()), batches, progress=False, staged=True)


def ids(count=6):
    torch.manual_seed(0)
    return [(torch.randint(20, (8, 5)),) for _ in range(count)]


def test_statistics_are_those_behind_the_compressed_prefix():
    torch.manual_seed(1)
    model = Net().eval()
    gm, sites, known = calibrated(model, ids())
    staged, recipe = watched(gm, known), parse("quantize{bits=2, group_size=0}", REWRITES)
    for name in ("table", "first", "left"):
        seen = staged.informed(sites[name])
        made = recipe.make(seen)
        staged.rewritten(sites[name], made)
        layer = model.get_submodule(name)
        layer.weight.data = made.weight
        if made.bias is not None:
            layer.bias.data = made.bias
    for name, module in (("left", model.left), ("right", model.right), ("last", model.last)):
        inputs = []
        hook = module.register_forward_pre_hook(lambda _, given, inputs=inputs: inputs.append(given[0].detach()))
        for call in known.fitted:
            model(*call[0])
        hook.remove()
        x = torch.cat([x.flatten(0, -2) for x in inputs]).double()
        found = staged.informed(sites[name]).statistics
        torch.testing.assert_close(found.second_moment, x.T @ x / len(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-5, atol=1e-6)
    before = known.statistics(sites["last"]).second_moment
    assert (before - staged.informed(sites["last"]).statistics.second_moment).norm() > 0.05 * before.norm()
    assert known.statistics(sites["last"]).second_moment is not None  # what was known is as it was
    torch.testing.assert_close(known.statistics(sites["last"]).second_moment, before, rtol=0, atol=0)


def test_held_out_statistics_move_too():
    gm, sites, known = calibrated(Net().eval(), ids())
    staged = Staged(gm, known)
    made = parse("quantize{bits=2, group_size=0}", REWRITES).make(staged.informed(sites["first"]))
    staged.rewritten(sites["first"], made)
    check = staged.informed(sites["left"]).statistics.check
    assert check is not None
    assert not torch.allclose(check.second, known.statistics(sites["left"]).check.second)


def test_weights_read_before_their_inputs_are_known_keep_the_originals(data):
    model = data(stories.model)
    batches = [{"input_ids": ids} for ids in stories.batches(data(tinystories))][:2]
    gm = capture(model, batches[0])
    (tied,) = [site for site in find_sites(gm) if site.kind == "tied"]
    known = calibrate(gm, find_sites(gm), batches, progress=False, staged=True)
    found = Staged(gm, known).informed(tied).statistics
    torch.testing.assert_close(found.second_moment, known.statistics(tied).second_moment, rtol=0, atol=0)


def test_nothing_is_kept_without_being_asked_for():
    gm = capture(Net().eval(), ids()[0])
    known = calibrate(gm, find_sites(gm), ids(), progress=False)
    assert not known.fitted
    assert type(watched(gm, known)) is Fixed


def test_compile_staged_keeps_the_promise_of_the_budget():
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.Tanh())]).eval()
    batches = [(torch.randn(64, 64),) for _ in range(8)]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    plain = fxcompress.compile(model, "6x", calibration=batches, progress=False)
    staged = fxcompress.compile(model, "6x", calibration=batches, progress=False, staged=True)
    assert staged.report.measured_bytes <= staged.report.original_bytes / 6
    again = fxcompress.compile(model, "6x", calibration=batches, progress=False, staged=True)
    for name, tensor in staged.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert any(not torch.equal(t, plain.state_dict()[n]) for n, t in staged.state_dict().items()
               if n in plain.state_dict() and plain.state_dict()[n].shape == t.shape)  # fmt: skip
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.items())


def test_cut_units_are_left_to_the_original():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 32)).eval()
    batches = [(torch.randn(64, 32),) for _ in range(4)]
    small = fxcompress.compile(
        model, fxcompress.Budget(flops="50%"), calibration=batches, progress=False, staged=True,
        rewrites=["hidden_units"],
    )  # fmt: skip
    assert any("hidden_units" in choice.spec for choice in small.plan.choices)
    assert small(batches[0][0]).shape == (64, 32)


def test_without_calibration_there_is_nothing_to_collect():
    with pytest.raises(CalibrationError, match="staged=True collects statistics anew, and there are none: give calib"):
        fxcompress.compile(Net().eval(), "2x", example_inputs=ids()[0], staged=True, progress=False)


def test_a_frontier_runs_on_with_another_weight():
    model, calls = Net().eval(), [(call, {}) for call in ids(2)]
    gm = capture(model, calls[0][0])
    sites = {site.name: site for site in find_sites(gm)}
    frontier = Frontier(gm, calls)
    frontier.advance(frontier.first_use(sites["last"]))
    zero = torch.zeros_like(sites["last"].weight)
    for env in frontier.values:
        held = len(env)
        fork = dict(env)
        put(fork, gm, sites["last"], zero, torch.ones(8))
        (y,) = frontier.run(fork, frontier.done, len(frontier.nodes))
        assert torch.equal(y, torch.ones_like(y))
        assert len(env) == held < 8  # what is behind is gone
    for env, (call, _) in zip(frontier.values, calls):
        (y,) = frontier.run(env, frontier.done, len(frontier.nodes))
        torch.testing.assert_close(y, model(*call))


