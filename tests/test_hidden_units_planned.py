"""Hidden units chosen by the planner: both sides of every layer agree, and what is promised is what is stored."""

import dataclasses
import re

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxcompress
from benchmarks.models import data as readers
from benchmarks.models import minilm
from fxcompress import Budget
from fxcompress.api import observe, plan_only
from fxcompress.core.capture import capture
from fxcompress.core.errors import InfeasibleBudgetError, PlanError
from fxcompress.core.plan import KEEP
from fxcompress.core.surgery import finish, stored_bytes
from fxcompress.core.ties import label_of
from fxcompress.passes import REWRITES
from fxcompress.passes.prune_hidden_units import prune_hidden_units
from fxcompress.passes.recipe import parse
from tests.hidden import (
    MODEL_IDS,
    MODELS,
    Gated,
    Named,
    Scaled,
    Twice,
    batches,
    bert,
    distance,
    layer,
    llama,
    outputs,
    vectors,
)

UNITS = ["hidden_units"]
BOTH = ["hidden_units", "quantize"]


def compiled(model, budget, calibration=None, **more):
    more = {"rewrites": UNITS, "progress": False, **more}
    return fxcompress.compile(model, budget, calibration=calibration or batches(), **more)


def counts(plan):
    """{first consumer: units kept} of every group that loses any."""
    kept = {c.site: label_of("units", c.spec) for c in plan.choices}
    return {
        tie.sites[-1]: parse(kept[tie.sites[0]], REWRITES).structure.kept
        for tie in plan.ties
        if tie.by == "units" and kept[tie.sites[0]]
    }


def agree(plan):
    """Every group has one label, and some group has one that is not empty."""
    labels = {c.site: label_of("units", c.spec) for c in plan.choices}
    ties = [tie for tie in plan.ties if tie.by == "units"]
    return all(len({labels.get(n, "") for n in tie.sites}) == 1 for tie in ties) and any(labels.values())


def freed(plan):
    """Bytes of tensors that the choices claim to save."""
    keep = {c.site: c.bytes for c in plan.candidates if c.spec == KEEP}
    return sum(keep[c.site] - c.bytes for c in plan.choices)


def whole_bytes(model, example):
    gm = capture(model, example)
    finish(gm)  # drops what the graph never reads
    return stored_bytes(gm)


@pytest.mark.parametrize("make", MODELS, ids=MODEL_IDS)
def test_a_flops_budget_makes_a_smaller_dense_model_the_same_as_pruning_by_hand(make):
    model = make()
    small = compiled(model, Budget(flops="80%"))
    assert agree(small.plan)
    kept = {c.site: c.flops for c in small.plan.candidates if c.spec == KEEP}
    assert sum(c.flops for c in small.plan.choices) <= 0.8 * sum(kept.values())
    gm, known = observe(model, None, batches(), False)
    pruned = prune_hidden_units(gm, known, counts(small.plan))
    # products of GPT-2 turn from addmm into linear, so its weights lie the other way round
    mine, theirs = (sorted(sorted(p.shape) for p in module.parameters()) for module in (small, pruned))
    assert mine == theirs
    assert whole_bytes(model, batches(1)[0]) - stored_bytes(small) == freed(small.plan)
    assert stored_bytes(small) == stored_bytes(pruned)
    assert all(site.measured_bytes == site.predicted_bytes for site in small.report.sites)
    for batch in (batches(1)[0], batches(1, length=7)[0]):
        assert distance(small, pruned, batch) < 1e-5  # the same products in another order
        assert distance(small, gm, batch) > 1e-3  # so it was no empty comparison


@pytest.mark.parametrize("kind", [Scaled, Twice, Named, Gated])
@pytest.mark.parametrize("storage", ["", " | quantize{bits=8, group_size=0}"], ids=["plain", "quantized"])
def test_biases_and_vectors_between_the_products_shrink_and_count(kind, storage):
    model, data = layer(kind), vectors()
    plan = plan_only(model, Budget(flops="51%"), calibration=data, rewrites=BOTH, progress=False)
    half = {c.site: c for c in plan.candidates if c.spec == f"hidden_units{{kept=32}}{storage}"}
    plan = dataclasses.replace(plan, choices=tuple(half[c.site] for c in plan.choices))
    small = compiled(model, None, data, plan=plan)
    gm, known = observe(model, None, data, False)
    pruned = prune_hidden_units(gm, known, 0.5)
    assert distance(small, pruned, data[0]) < (0.02 if storage else 1e-6)  # 8 bits lose a few parts in a thousand
    assert whole_bytes(model, (data[0],)) - stored_bytes(small) == freed(small.plan)
    assert all(site.measured_bytes == site.predicted_bytes for site in small.report.sites)


def test_flops_that_run_are_flops_that_were_budgeted():
    model, data = layer(), vectors()
    small = compiled(model, Budget(flops="51%"), data)
    spent = []
    for run in (model, small):
        with FlopCounterMode(display=False) as counter:
            run(data[0])
        spent.append(counter.get_total_flops())
    assert spent[1] == spent[0] // 2  # 32 of 64 units


@pytest.mark.parametrize("share", ["90%", "76%", "51%"])
def test_the_predicted_error_is_the_measured_one(share):
    report = compiled(layer(), Budget(flops=share), vectors()).report
    # one lossy site: a probe measured it, and only the last bits of sums in another order are left
    assert report.measured_error == pytest.approx(report.predicted_error, rel=0.15)
    assert report.measured_error > 1e-3


def test_errors_of_several_layers_add():
    report = compiled(bert(), Budget(flops="90%")).report
    assert report.measured_error == pytest.approx(report.predicted_error, rel=0.15)


def test_what_is_left_is_quantized():
    model = llama(2)
    budget = Budget(flops="80%", size="60%")
    small = compiled(model, budget, rewrites=BOTH)
    assert agree(small.plan)
    cut = [c.spec for c in small.plan.choices if c.spec.startswith("hidden_units")]
    assert any("| quantize" in spec for spec in cut)
    assert small.report.measured_bytes <= 0.6 * small.report.original_bytes
    assert all(site.measured_bytes == site.predicted_bytes for site in small.report.sites)
    assert small.report.measured_error == pytest.approx(small.report.predicted_error, rel=0.3)


@pytest.mark.parametrize("rewrites", [UNITS, BOTH, None], ids=["alone", "quantized", "all"])
def test_every_site_of_a_group_is_offered_the_same_numbers(rewrites):
    model, data = layer(), vectors()
    for budget in [Budget(flops="60%"), *([] if rewrites is None else ["60%"])]:
        plan = plan_only(model, budget, calibration=data, rewrites=rewrites, progress=False)
        offered = [{label_of("units", c.spec) for c in plan.candidates if c.site == n} for n in ("up", "down")]
        assert offered[0] == offered[1] != {""}


def test_a_size_budget_says_why_units_are_not_weighed():
    plan = plan_only(layer(), "2x", calibration=vectors(), progress=False)
    why = "for bytes alone quantized weights lose less; it is weighed where flops or time are bounded, or by name"
    assert [(site, said) for site, name, said in plan.refusals if name == "hidden_units"] == [
        ("up", why), ("down", why)
    ]  # fmt: skip
    assert not any(tie.by == "units" for tie in plan.ties)


def test_named_it_serves_a_size():
    small = compiled(llama(), "85%")
    assert agree(small.plan)
    assert small.report.measured_bytes <= 0.85 * small.report.original_bytes


def test_units_that_cost_their_maker_nothing_drive_no_rival_out():
    pair, offered = ["hidden_units", "low_rank"], []
    for rewrites in (pair, pair[::-1], ["low_rank"]):
        plan = plan_only(layer(), "60%", calibration=vectors(), rewrites=rewrites, progress=False)
        offered.append({c for c in plan.candidates if c.site == "up" and c.spec.startswith("low_rank")})
    assert offered[0] == offered[1] == offered[2] != set()


def test_a_flops_budget_weighs_it_unasked():
    plan = plan_only(layer(), Budget(flops="60%"), calibration=vectors(), progress=False)
    assert any(c.spec.startswith("hidden_units") for c in plan.candidates)
    assert sum(c.flops for c in plan.choices) <= 0.6 * sum(c.flops for c in plan.candidates if c.spec == KEEP)


def test_flops_out_of_reach_are_told_by_what_a_whole_group_reaches():
    message = "and from 100% to 12% of the flops"  # an eighth of the units
    with pytest.raises(InfeasibleBudgetError, match=message):
        compiled(layer(), Budget(flops="5%"), vectors())


def test_a_weight_in_the_middle_of_two_groups_is_not_cut():
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 3)).eval()
    plan = plan_only(chain, Budget(flops="100%"), calibration=vectors(), rewrites=UNITS, progress=False)
    why = "2 reads hidden units and makes others, and one choice cannot cut a weight twice"
    assert {(site, said) for site, _, said in plan.refusals} == {("0", why), ("2", why), ("4", why)}
    assert {c.spec for c in plan.candidates} == {KEEP}


@pytest.fixture(scope="module")
def small():
    return compiled(bert(), Budget(flops="70%"))


def test_a_plan_replays_and_survives_its_file(small, tmp_path):
    small.plan.save(tmp_path / "plan.json")
    again = compiled(bert(), None, plan=fxcompress.Plan.load(tmp_path / "plan.json"))
    for a, b in zip(outputs(small, batches(1)[0]), outputs(again, batches(1)[0]), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_gives_the_same_bits(small, tmp_path):
    fxcompress.save(small, tmp_path / "m")
    loaded = fxcompress.load(tmp_path / "m")
    assert sum(file.stat().st_size for file in (tmp_path / "m").iterdir()) == small.report.measured_bytes
    for batch in (batches(1)[0], batches(1, length=7)[0]):
        for a, b in zip(outputs(small, batch), outputs(loaded, batch), strict=True):
            assert torch.equal(a, b)


def test_no_slice_takes_a_hidden_layer_apart(small):
    plan, healed = small.plan, 0
    for n in range(len(plan) + 1):
        for part in (plan[:n], plan[n:]):
            labels = {c.site: label_of("units", c.spec) for c in part.choices}
            ties = [tie for tie in plan.ties if tie.by == "units"]
            assert all(len({labels.get(name, "") for name in tie.sites}) == 1 for tie in ties)
        cut = plan[:n]
        assert [c.site for c in cut.choices] == [c.site for c in plan.choices[:n]]
        healed += cut.choices != plan.choices[:n]
        assert all(c.spec in (KEEP, plan.spec_of(c.site)) for c in cut.choices)
    assert healed > 0
    assert plan[: len(plan)] == plan


def test_a_slice_runs(small):
    plan = small.plan
    cut = [i for i, c in enumerate(plan.choices) if c.spec != KEEP]
    half = compiled(bert(), None, plan=plan[: cut[-1]])  # the last consumer is missing
    gm, known = observe(bert(), None, batches(), False)
    assert len(counts(half.plan)) == len(counts(plan)) - 1
    assert distance(half, prune_hidden_units(gm, known, counts(half.plan)), batches(1)[0]) < 1e-5


def test_a_plan_that_disagrees_with_itself_is_refused(small):
    plan, (consumer, *_) = small.plan, counts(small.plan)
    keep = next(c for c in plan.candidates if c.site == consumer and c.spec == KEEP)
    bad = dataclasses.replace(plan, choices=tuple(keep if c.site == keep.site else c for c in plan.choices))
    with pytest.raises(PlanError, match=rf"the plan says hidden_units.* and keep at {keep.site}, which share their"):
        compiled(bert(), None, plan=bad)


def test_a_plan_for_a_model_that_shows_these_units_is_refused():
    class Shown(Scaled):
        def forward(self, x):
            return super().forward(x), self.up(x)

    plan = plan_only(layer(), Budget(flops="51%"), calibration=vectors(), rewrites=UNITS, progress=False)
    message = "made for another model: it says hidden_units{kept=32} at up, where it neither makes nor reads hidden"
    with pytest.raises(PlanError, match=re.escape(message)):
        compiled(Shown().eval(), None, vectors(), plan=plan)


def test_specs_parse_with_and_without_a_storage():
    for spec in ("hidden_units{kept=1152}", "hidden_units{kept=1152} | quantize{bits=4, group_size=64}"):
        assert str(parse(spec, REWRITES)) == spec


def test_a_layer_of_minilm_sheds_a_sixth_of_its_flops(data):
    model = data(minilm.model)
    model.encoder.layer = model.encoder.layer[:1]
    texts = [text for text, _ in data(readers.sst2, "dev")][:64]
    small = compiled(model, Budget(flops="84%"), minilm.batches(texts))
    assert agree(small.plan)
    report = small.report
    assert report.measured_error == pytest.approx(report.predicted_error, rel=0.15)
    assert whole_bytes(model, minilm.batches(texts[:1])[0]) - stored_bytes(small) == freed(small.plan)
    fresh = [text for text, _ in readers.sst2("train")][:32]
    assert minilm.mean_cosine(minilm.embed(small, fresh), minilm.embed(model, fresh)) > 0.99
