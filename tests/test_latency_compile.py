"""compile under a budget of latency: candidates cost what their lowered graphs do, and reports are measured.

The device is made up (tests/profiling.py), so that no test depends on the speed of what runs it.
"""

import logging
import re

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress import Budget, profiling
from fxcompress.api import plan_only
from fxcompress.codegen.cpu.lower import lower_graph
from fxcompress.codegen.cpu.seconds import chain_seconds, seconds_of
from fxcompress.core.capture import capture
from fxcompress.core.errors import WorkloadError
from fxcompress.core.plan import KEEP
from fxcompress.core.site import find_sites
from fxcompress.core.workload import Workload
from fxcompress.passes import REWRITES
from fxcompress.passes.fuse import fuse
from fxcompress.passes.latency import Pricing, count_of, products_of
from fxcompress.passes.recipe import parse
from tests.profiling import profile


class Mixer(nn.Module):
    def __init__(self, width=128):
        super().__init__()
        self.table = nn.Embedding(50, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, ids):
        return self.down(torch.relu(self.up(self.table(ids))))


def mixer():
    torch.manual_seed(0)
    return Mixer().eval()


IDS = [torch.randint(0, 50, (8, 12), generator=torch.Generator().manual_seed(i)) for i in range(2)]


@pytest.fixture
def known(monkeypatch):
    made = profile()
    monkeypatch.setattr(profiling, "cached", lambda: made)
    return made


@pytest.mark.parametrize(
    ("spec", "products"),
    [
        ("keep", ((512, 128, False),)),
        ("quantize{bits=8, group_size=0}", ((512, 128, True),)),
        ("low_rank{rank=32}", ((32, 128, True), (512, 32, True))),
        ("low_rank{rank=120} | quantize{bits=8, group_size=0}", ((512, 128, True),)),  # decoded: fewer multiplications
        ("prune_2_4", ((512, 128, True),)),
        ("quaternion", ((512, 128, True),)),
    ],
)
@pytest.mark.parametrize("workload", [Workload("one", 1, 1), Workload("many", 16, 12)])
def test_a_candidate_takes_what_its_products_take_in_the_lowered_graph(spec, products, workload, known):
    """The graph is lowered with that rewrite; the difference to the graph as it is must be what was priced."""
    gm = capture(mixer(), (IDS[0],))
    pricing = Pricing.of(gm, [workload], known, "eager")
    up = next(s for s in find_sites(gm) if s.name == "up")
    recipe = parse(spec, REWRITES)
    assert products_of(recipe, up) == products
    (seconds,) = pricing.seconds(recipe, up)
    tokens = count_of(up.uses[0], pricing.sizes[0])
    assert tokens == workload.batch * workload.sequence
    assert seconds == pytest.approx(chain_seconds(products, tokens, known, target="eager"), rel=1e-6)
    rewritten = fxcompress.restructure(mixer(), {"up": spec, "*": "keep"}, example_inputs=(IDS[0],), progress=False)
    with torch.no_grad():
        lowered = [lower_graph(fuse(g), known, "eager") for g in (gm, rewritten)]
    kept, changed = (seconds_of(g, known, pricing.sizes[0], "eager").total for g in lowered)
    (as_it_is,) = pricing.seconds(parse(KEEP, REWRITES), up)
    assert changed - kept == pytest.approx(seconds - as_it_is, abs=1e-5)  # a bias, a view: a few passes of 1 us


def compiled(known, budget, workload=None, lower=None):
    """Priced for eager, where nothing is compiled for minutes."""
    given = {"calibration": IDS, "rewrites": ["quantize", "low_rank"], "progress": False}
    plan = plan_only(mixer(), budget, lower="eager", workload=workload, **given)
    return fxcompress.compile(mixer(), budget, plan=plan, lower=lower, **given)


def test_compile_predicts_and_measures_each_workload(known):
    made = compiled(known, Budget("2x", latency="1.2x"), workload=[("short", 1, 4), ("long", 32, 12, 0.1)])
    plan, report = made.plan, made.report
    assert [w.name for w in plan.workload] == ["short", "long"] == [w.name for w in report.workload]
    assert plan.target == report.target == "eager"
    assert plan.original_latency / plan.latency >= 1.2
    assert [s[0] for s in report.seconds] == pytest.approx(plan.predicted_seconds, rel=1e-3)
    assert [s[0] for s in report.original_seconds] == pytest.approx(plan.original_seconds, rel=1e-3)
    assert all(0 < s[1] < 1 for s in (*report.seconds, *report.original_seconds))
    assert report.measured_bytes <= plan.original_bytes / 2
    text = str(report)
    assert re.search(r"short \(1 x 4\) a call +\S+ us \(\S+x\) +\S+ [um]s \(\S+x\) +[+-]\S+%", text)
    assert "calls of the model lowered to eager; in brackets, against the original run the same way" in text
    for site in plan.sites:
        chosen, kept = (next(c for c in plan.candidates if c.site == site.name and c.spec == spec)
                        for spec in (plan.spec_of(site.name), KEEP))  # fmt: skip
        assert site.kind == "embedding" or plan.seconds_of(chosen) <= plan.seconds_of(kept)


def test_measured_bytes_are_what_save_writes_and_seconds_come_back(known, tmp_path):
    made = compiled(known, Budget("2x", latency="1.2x"))
    fxcompress.save(made, tmp_path / "m")
    assert sum(f.stat().st_size for f in (tmp_path / "m").iterdir()) == made.report.measured_bytes
    loaded = fxcompress.load(tmp_path / "m")
    assert loaded.report == made.report
    assert loaded.plan.workload == made.plan.workload


def test_the_default_target_is_inductor(known):
    plan = plan_only(mixer(), Budget(latency="1.2x"), calibration=IDS, rewrites=["quantize"], progress=False)
    assert plan.target == "inductor"


def test_the_default_workload_is_one_call_of_the_example_inputs(known):
    plan = plan_only(mixer(), Budget(latency="1.2x"), example_inputs=(torch.zeros(3, 7, dtype=torch.long),),
                     calibration=IDS, rewrites=["quantize"], progress=False)  # fmt: skip
    assert plan.workload == (Workload("example", 3, 7),)


def test_a_workload_alone_is_predicted_and_bounds_nothing(known):
    plan = plan_only(mixer(), "2x", calibration=IDS, workload=[("one", 1, 1)], rewrites=["quantize"], progress=False)
    assert plan.workload == (Workload("one", 1, 1),)
    assert str(plan.budget) == "size <= 2x"


def test_a_plan_is_priced_anew_for_another_workload_and_replayed_without_a_profile(known, monkeypatch):
    plan = plan_only(mixer(), "2x", calibration=IDS, rewrites=["quantize"], progress=False)
    assert plan.workload == ()
    given = {"calibration": IDS, "progress": False}
    made = fxcompress.compile(
        mixer(), Budget("2x", latency="1.2x"), plan=plan, workload=[("some", 4, 12)], lower="eager", **given
    )
    assert made.plan.workload == (Workload("some", 4, 12),)
    assert {(c.site, c.spec) for c in made.plan.candidates} == {(c.site, c.spec) for c in plan.candidates}
    monkeypatch.setattr(profiling, "cached", lambda: pytest.fail("a plan that holds its seconds needs no profile"))
    monkeypatch.setattr(fxcompress.lowering, "cached", lambda: None)
    again = fxcompress.compile(mixer(), Budget("2x", latency="1.3x"), plan=made.plan, calibration=IDS, progress=False)
    assert again.plan.workload == made.plan.workload


def test_an_error_budget_is_kept_with_latency(known):
    made = compiled(known, Budget(error=0.02, latency="1.1x"))
    assert made.report.measured_error <= 0.02
    assert made.plan.original_latency / made.plan.latency >= 1.1


def test_a_latency_that_was_missed_is_said(caplog, monkeypatch):
    """The made-up device is faster than any that runs this."""
    slow = profile(float=1e6, bf16=1e6)  # int8 promises to be thousands of times faster
    monkeypatch.setattr(profiling, "cached", lambda: slow)
    with caplog.at_level(logging.WARNING, "fxcompress"):
        made = compiled(slow, Budget("2x", latency="1000x"))
    assert made.plan.original_latency / made.plan.latency > 1000
    assert re.search(r"latency <= 1000x was asked, .* a call predicted and .* measured", caplog.text)
    assert "run `fxcompress profile` anew" in caplog.text


def test_lower_returns_the_module_that_was_measured(known):
    made = compiled(known, Budget("2x", latency="1.2x"), lower="eager")
    assert made.report.seconds[0][1] > 0
    assert made(IDS[0]).shape == (8, 12, 128)


def test_compile_leaves_threads_and_the_random_state_alone(known):
    model = mixer()
    torch.manual_seed(3)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    budget = Budget("2x", latency="1.2x")
    fxcompress.compile(model, budget, calibration=IDS, rewrites=["quantize"], progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


def test_a_workload_outside_the_captured_range_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(profiling, "cached", lambda: pytest.fail("nothing must be measured"))
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    with pytest.raises(WorkloadError, match=r"has a sequence of 12, and input .* was captured for 64"):
        fxcompress.compile(model, "2x", example_inputs=(torch.ones(4, 64),), workload=[("w", 2, 12)], progress=False)
