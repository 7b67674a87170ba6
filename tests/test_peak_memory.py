"""Peak activation memory against what torch allocates, and whose memory is whose."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fxcompress.codegen.costs import cost_of
from fxcompress.core.capture import capture
from fxcompress.cost_model.storages import storages
from fxcompress.cost_model.values import values_of
from tests.costing import MODELS, captured, sizes_of


def allocated(gm, inputs):
    """The most bytes that are allocated at once during a call, above what was there before."""
    with torch.no_grad():
        gm(*inputs)  # what is made once is made
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            gm(*inputs)
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("size", [(8, 32), (3, 17)])
@pytest.mark.parametrize("name", MODELS)
def test_the_peak_is_what_is_allocated(name, size):
    gm, inputs = captured(name), MODELS[name][1](*size)
    peak = cost_of(gm).peak.at(**sizes_of(gm, inputs))
    # byte for byte, but for attention's tiles of scores: 6,400 bytes a thread here
    assert int(peak.bytes) == pytest.approx(allocated(gm, inputs.values()), rel=0.04)


class Body(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x)


def traced(body, x):
    gm = capture(Body(body), (x,))
    return gm, cost_of(gm).peak.at(**sizes_of(gm, {"x": x}))


X = torch.ones(16, 10, 100)


@pytest.mark.parametrize(
    ("body", "live"),
    [
        (lambda x: (x + 1).relu().exp(), 2),  # each is freed as soon as the next is there
        (lambda x: ((y := x + 1).transpose(0, 1)[:2], y * 2)[0], 1),  # the view alone keeps all of y; y * 2 is dead
        (lambda x: (a := x + 1, b := a.transpose(1, 2), (b.exp() + b).sin())[2], 3),  # b is a, beside exp and the sum
        (lambda x: (x + 1, x + 2, x + 3), 3),  # outputs stay
        (lambda x: torch.stack([half * 2 for half in (x + 1).split(8)]), 2),
    ],
)
def test_views_keep_their_base_and_take_nothing(body, live):
    gm, peak = traced(body, X)
    assert peak.bytes == live * X.numel() * 4
    assert peak.bytes == pytest.approx(allocated(gm, (X,)), rel=0.01)


def test_memory_is_named_after_who_allocates_it():
    gm, _ = traced(lambda x: (x.flatten(1).reshape(-1, 5), *(x + 1).split(8)), X)
    places = [where for node, where in storages(gm, values_of(gm.graph)).items() if node.op == "call_function"]
    named = {name for where in places for name in where}
    assert named & {"x", "add"} == {"x", "add"}
    assert not any(name.startswith(("split", "reshape", "flatten", "getitem")) for name in named)


def test_only_moments_that_can_be_the_worst_are_kept():
    peak = cost_of(captured("llama")).peak
    assert len(peak.moments) == 2  # attention of long sequences, the feed-forward layer of short ones
    batch, length = sorted(peak.bytes.free_symbols, key=lambda s: -int(s.name[1:]))
    at = [peak.at(**{batch.name: 2, length.name: n}) for n in (8, 2000)]
    assert ["attention" in at[i].moments[0][0] for i in (0, 1)] == [False, True]
