"""fxcompress.apply: the original module tree, with the numbers of the compiled graph, bit for bit."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress.core.errors import PlanError


class Net(nn.Module):
    """One leaf of each kind; `head` shares its weight with `table`."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table, self.up, self.down = nn.Embedding(64, 96), nn.Linear(96, 256), nn.Linear(256, 96, bias=False)
        self.wide, self.deep = nn.Conv1d(96, 64, 3, padding=1), nn.Conv1d(64, 96, 3, padding="same")
        self.head = nn.Linear(96, 64, bias=False)
        self.head.weight = self.table.weight
        for parameter in self.parameters():
            parameter.data.normal_(0, 0.2, generator=generator)

    def forward(self, ids):
        x = self.table(ids)
        x = x + self.down(self.up(x).relu())
        x = x + self.deep(self.wide(x.transpose(1, 2)).relu()).transpose(1, 2)
        return self.head(x)


IDS = torch.arange(4 * 24).reshape(4, 24) * 7 % 64


@pytest.fixture(scope="module")
def pair():
    net = Net().eval()
    return net, fxcompress.compile(net, "4x", calibration=calibration(), progress=False)


def calibration():
    return [((IDS * 5 + i) % 64,) for i in range(8)]


@pytest.mark.parametrize(
    "rewrites",
    [
        ["quantize"], ["low_rank"], ["low_rank", "quantize"], ["monarch"], ["block_low_rank", "quantize"],
        ["tensor_train"], ["quaternion"], ["prune"], ["prune_2_4"], ["prune_blocks", "quantize"], ["float8"],
        ["int8_dynamic"], ["quantize_residual"],
    ],
    ids="+".join,
)  # fmt: skip
def test_every_family_gives_the_numbers_of_the_graph(rewrites):
    net = Net().eval()
    size = "1.5x" if rewrites[0] != "float8" else "2x"
    compiled = compiled_or_smaller(net, size, rewrites)
    module = fxcompress.apply(net, compiled)
    chosen = [c.spec for c in compiled.plan.choices if c.spec != "keep"]
    assert chosen
    with torch.no_grad():
        assert torch.equal(module(IDS), compiled(IDS))
        assert not torch.equal(module(IDS), net(IDS))
    assert sum(getattr(m, "spec", None) is not None for m in module.modules()) >= len(chosen)


def compiled_or_smaller(net: nn.Module, size: str, rewrites: list[str], batches=None):
    """At `size`, or as small as these rewrites get it."""
    batches = batches or calibration()
    for budget in (size, "1.2x", "1.05x", "1.01x"):
        try:
            return fxcompress.compile(net, budget, calibration=batches, rewrites=rewrites, progress=False)
        except fxcompress.core.errors.InfeasibleBudgetError:
            continue
    raise AssertionError(f"{rewrites} save nothing")


def test_a_leaf_keeps_its_class_its_attributes_its_hooks_and_its_mode():
    net = Net().train()
    seen = []
    net.up.register_forward_hook(lambda module, args, y: seen.append(tuple(y.shape)))
    net.up.mine = "kept"
    module = fxcompress.apply(net, fxcompress.compile(net, "4x", calibration=calibration(), progress=False))
    assert isinstance(module.up, nn.Linear)
    assert isinstance(module.table, nn.Embedding)
    assert isinstance(module.wide, nn.Conv1d)
    assert (module.up.in_features, module.up.mine, module.training) == (96, "kept", True)
    seen.clear()  # of the capture
    module(IDS)
    assert seen == [(4, 24, 256)]
    assert "quantize" in repr(module.up)
    assert type(net.up) is nn.Linear
    assert net.up.weight.shape == (256, 96)


def test_one_weight_with_two_biases():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = nn.Linear(96, 96), nn.Linear(96, 96)
            self.two.weight = self.one.weight
            self.one.bias.data.add_(3)

        def forward(self, x):
            return self.two(x) + self.one(x).relu()

    net, x = Shared().eval(), torch.randn(32, 96, generator=torch.Generator().manual_seed(1))
    compiled = fxcompress.compile(net, "3x", calibration=[(x,)], rewrites="quantize", progress=False)
    with torch.no_grad():
        assert torch.equal(fxcompress.apply(net, compiled)(x), compiled(x))
        fast = torch.compile(net, backend="fxcompress", options={"plan": compiled, "lower": "eager"})
        assert torch.equal(fast(x), compiled(x))


def test_no_leaf_holds_its_weight_and_each_reads_it_back_when_asked(pair):
    net, compiled = pair
    module = fxcompress.apply(net, compiled)
    for name, leaf in module.named_modules():
        if hasattr(leaf, "spec"):
            assert "weight" not in leaf._parameters
            dense = copy.deepcopy(net.get_submodule(name))
            assert leaf.weight.shape == dense.weight.shape
            dense.weight = nn.Parameter(leaf.weight)
            if getattr(dense, "bias", None) is not None:
                dense.bias = nn.Parameter(leaf.bias)
            size = (5, dense.weight.shape[1], *(8 for _ in dense.weight.shape[2:]))  # (tokens, in) or (N, in, length)
            x = torch.randn(size, generator=torch.Generator().manual_seed(1))
            x = IDS if isinstance(dense, nn.Embedding) else x
            with torch.no_grad():
                torch.testing.assert_close(leaf(x), dense(x))
    assert "quantize" in module.table.spec
    assert module.head.weight.equal(module.table.weight)


def test_copies_and_pickles_compute_the_same(pair):
    net, compiled = pair
    module = fxcompress.apply(net, compiled)
    with torch.no_grad():
        wanted = module(IDS)
        assert torch.equal(copy.deepcopy(module)(IDS), wanted)
        assert torch.equal(pickle.loads(pickle.dumps(module))(IDS), wanted)
        fresh = fxcompress.apply(Net().eval(), compiled)
        fresh.load_state_dict(module.state_dict())
        assert torch.equal(fresh(IDS), wanted)


def test_a_subclass_that_scales_its_lookups_still_does():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 7.0

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = Scaled(64, 32), nn.Linear(32, 8)

        def forward(self, ids):
            return self.out(self.table(ids))

    torch.manual_seed(0)
    net = Small().eval()
    compiled = fxcompress.compile(net, "1.6x", calibration=[(IDS,)], progress=False)
    module = fxcompress.apply(net, compiled)
    assert isinstance(module.table, Scaled)
    with torch.no_grad():
        assert torch.equal(module(IDS), compiled(IDS))


def test_a_head_with_a_bias_of_its_own_may_share_the_table():
    class Biased(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(96, 64)
            self.head.weight = self.table.weight

    net = Biased().eval()
    compiled = fxcompress.compile(net, "4x", calibration=calibration(), progress=False)
    module = fxcompress.apply(net, compiled)
    assert "quantize" in module.table.spec
    assert "quantize" in module.head.spec
    assert getattr(module.table, "bias", None) is None
    with torch.no_grad():
        assert torch.equal(module(IDS), compiled(IDS))


def test_a_plan_alone_is_carried_out_first(pair):
    net, compiled = pair
    module = fxcompress.apply(net, compiled.plan, calibration=calibration(), progress=False)
    with torch.no_grad():
        assert torch.equal(module(IDS), compiled(IDS))


def test_gradients_reach_what_comes_before_a_leaf(pair):
    net, compiled = pair
    module = fxcompress.apply(net, compiled)
    x = torch.randn(3, 96, requires_grad=True)
    module.up(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, module.up.weight.sum(0).expand(3, -1))


def test_what_cannot_be_swapped_is_refused_by_name(pair):
    net, compiled = pair

    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixed = nn.Parameter(torch.randn(64, 64))

        def forward(self, x):
            return x @ self.mixed

    raw = Raw().eval()
    graph = fxcompress.compile(raw, "3x", example_inputs=(torch.randn(4, 64),), progress=False)
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert torch.equal(fxcompress.apply(raw, graph)(x), graph(x))  # a bare parameter is read back
    with pytest.raises(PlanError, match=r"another model: it says .* at head, and Raw has no such weight"):
        fxcompress.apply(raw, compiled)
    other = Net()
    other.up = nn.Linear(96, 192)
    with pytest.raises(PlanError, match="another model: up is 256 x 96 in the plan and 192 x 96 here"):
        fxcompress.apply(other, compiled)
    with pytest.raises(PlanError, match="takes a Plan, or what compile or load returned, not a str"):
        fxcompress.apply(net, "plan.json")


def test_a_leaf_that_moves_leaves_nothing_behind(pair):
    net, compiled = pair
    leaf = fxcompress.apply(net, compiled).up
    before = [weakref.ref(tensor) for tensor in leaf.buffers()]
    leaf.to("meta")
    gc.collect()
    assert before
    assert all(ref() is None for ref in before)
    assert leaf(torch.empty(3, 96, device="meta")).shape == (3, 256)


def test_a_cast_is_refused_and_loses_nothing(pair):
    net, compiled = pair
    module = fxcompress.apply(net, compiled)
    with torch.no_grad():
        wanted = module.up(torch.ones(1, 96))
        with pytest.raises(PlanError, match=r"of a CompressedLinear cannot be cast from torch\.float32 to"):
            module.up.half()
        assert torch.equal(module.up(torch.ones(1, 96)), wanted)

