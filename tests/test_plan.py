"""Plans: they print, explain, save, load, slice and replay, and say when they do not fit."""

import copy
import dataclasses
import json
import re

import pytest
import torch
import transformers as tf
from torch import nn

import fxcompress
from fxcompress import Plan
from fxcompress.core.errors import InfeasibleBudgetError, PlanError, SpecError
from fxcompress.core.plan import KEEP
from fxcompress.passes import REWRITES
from fxcompress.passes.recipe import parse


def tiny_bert(hidden=64):
    torch.manual_seed(0)
    return tf.BertModel(
        tf.BertConfig(
            vocab_size=200,
            hidden_size=hidden,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=2 * hidden,
            max_position_embeddings=32,
        )
    ).eval()


def batches():
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 200, (8, 12), generator=generator) for _ in range(2)]
    return [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]


def compile(model=None, budget="2x", **more):
    return fxcompress.compile(model or tiny_bert(), budget, calibration=batches(), progress=False, **more)


@pytest.fixture(scope="module")
def compiled():
    return compile()


@pytest.fixture(scope="module")
def plan(compiled):
    return compiled.plan


def same_tensors(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_the_table_names_every_site_with_its_shape_rewrite_and_bytes(plan):
    text = str(plan)
    lines = text.splitlines()
    assert lines[0] == "plan: size <= 2x"
    assert lines[2].split("  ")[0] == "site"
    for site, choice in zip(plan.sites, plan.choices):
        (line,) = [row for row in lines if row.split() and row.split()[0] == site.name]
        assert f"{site.rows} x {site.columns}" in line
        assert f" {choice.spec} " in line
    assert any(row.startswith("everything else") for row in lines)
    ratio = plan.original_bytes / plan.predicted_bytes
    assert f"({ratio:.2f}x), predicted relative output error {plan.predicted_error:.4g}, optimal within" in text


def test_the_plan_meets_the_size_and_the_report_agrees(compiled, plan):
    assert compiled.report.measured_bytes <= plan.original_bytes / 2
    assert compiled.report.predicted_bytes == plan.predicted_bytes
    # The files around the tensors are estimated, and the estimate is chosen again from where it falls short.
    assert plan.predicted_bytes == pytest.approx(compiled.report.measured_bytes, rel=0.1)


def test_bytes_of_every_choice_are_those_that_were_stored(compiled):
    for site in compiled.report.sites:
        assert site.measured_bytes == site.predicted_bytes, site.site


def test_an_uncalibrated_plan_says_so():
    made = fxcompress.compile(
        nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64)), "1x", example_inputs=(torch.ones(2, 64),), progress=False
    )
    assert "(not calibrated: errors are of the weights alone)" in str(made.plan).splitlines()[0]
    assert [c.spec for c in made.plan.choices] == [KEEP, KEEP]


def test_explain_lists_every_candidate_with_a_reason(plan):
    for site in plan.sites:
        text = plan.explain(site.name)
        mine = [c for c in plan.candidates if c.site == site.name]
        head, _, header, _, *rows = text.splitlines()
        assert head == f"{site.name}: {site.kind}, {site.rows} x {site.columns}"
        assert re.split(r"\s{2,}", header) == ["rewrite", "bytes", "site error", "model loss", "verdict"]
        listed = [re.split(r"\s{2,}", row) for row in rows if not row.startswith("refused: ")]
        assert sorted(row[0] for row in listed) == sorted(c.spec for c in mine)
        verdicts = {row[0]: row[4] for row in listed}
        assert [spec for spec, verdict in verdicts.items() if verdict == "chosen"] == [plan.spec_of(site.name)]
        assert all(verdicts.values())
        refused = [(name, why) for at, name, why in plan.refusals if at == site.name]
        assert [row for row in rows if row.startswith("refused: ")] == [f"refused: {n}: {w}" for n, w in refused]


def test_every_rewrite_is_either_tried_or_refused_at_every_site(plan):
    for site in plan.sites:
        mine = [c.spec for c in plan.candidates if c.site == site.name]
        tried = {part.split("{")[0].strip() for spec in mine for part in spec.split("|")}
        refused = {name for at, name, _ in plan.refusals if at == site.name}
        for rewrite in REWRITES:
            assert rewrite.name in refused | tried, (site.name, rewrite.name)


def test_reasons_that_differ_in_a_percentage_share_a_line(plan):
    names = [site.name for site in plan.sites[:3]]
    told = [(names[0], "fold", "it loses 26% of 10"), (names[1], "fold", "it loses 5% of 10"), (names[2], "cut", "no")]
    lines = str(dataclasses.replace(plan, refusals=tuple(told))).splitlines()
    assert [line for line in lines if line.startswith("refused: ")] == [
        "refused: fold at 2 sites: it loses 5% to 26% of 10",
        f"refused: cut at {names[2]}: no",
    ]


def test_explain_of_an_unknown_site_names_some_that_exist(plan):
    with pytest.raises(
        PlanError, match=rf"no site is called 'nonsense'; there are {len(plan.sites)}: embeddings.*, …\."
    ):
        plan.explain("nonsense")


def test_a_slice_keeps_the_first_choices_and_the_rest_as_it_is(plan):
    part = plan[:3]
    assert len(part) == 3
    assert part.choices == plan.choices[:3]
    assert part.candidates == plan.candidates
    assert part.spec_of(plan.sites[5].name) == KEEP
    assert plan[:0].predicted_bytes == plan.fixed_bytes + sum(c.bytes for c in plan.candidates if c.spec == KEEP)
    assert plan[:0].predicted_loss == 0
    assert plan[: len(plan)] == plan
    sizes = [plan[:n].predicted_bytes for n in range(len(plan) + 1)]
    assert sizes == sorted(sizes, reverse=True)


def test_a_sliced_plan_rewrites_the_first_sites_only(plan):
    made = compile(budget=None, plan=plan[:4])
    wanted = [c.site for c in plan.choices[:4] if c.spec != KEEP]
    assert [s.site for s in made.report.sites if s.spec != KEEP] == wanted
    marked = {n.meta["fxcompress"].split(" at ")[1] for n in made.graph.nodes if "fxcompress" in n.meta}
    assert marked == set(wanted)


def test_save_and_load_are_inverse_and_the_file_is_stable(plan, tmp_path):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    plan.save(first)
    loaded = Plan.load(first)
    loaded.save(second)
    assert first.read_bytes() == second.read_bytes()
    assert loaded.sites == plan.sites
    assert loaded.refusals == plan.refusals
    assert [(c.site, c.spec, c.bytes) for c in loaded.candidates] == [
        (c.site, c.spec, c.bytes) for c in plan.candidates
    ]
    assert str(loaded) == str(plan)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["a.json", "b.json"]


def test_the_file_is_json_with_one_candidate_a_line(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text(encoding="utf-8")
    assert len(json.loads(text)["candidates"]) == len(plan.candidates)
    for c in plan.candidates:
        assert sum(line.strip().startswith(f'["{c.site}", "{c.spec}", {c.bytes},') for line in text.splitlines()) >= 1


def test_a_failed_save_leaves_the_old_file(plan, tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    plan[:1].save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        plan.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_two_compiles_of_the_same_inputs_give_the_same_plan_and_bits(compiled):
    again = compile()
    assert again.plan.to_text() == compiled.plan.to_text()
    assert same_tensors(again, compiled)


def test_a_loaded_plan_replays_to_identical_tensors(compiled, plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    again = compile(budget=None, plan=Plan.load(tmp_path / "plan.json"))
    assert same_tensors(again, compiled)


def test_a_plan_is_chosen_from_anew_for_another_budget(plan):
    smaller = compile(budget="3x", plan=plan)
    assert smaller.plan.candidates == plan.candidates
    assert str(smaller.plan.budget) == "size <= 3x"
    assert smaller.report.measured_bytes <= plan.original_bytes / 3
    assert smaller.plan.predicted_loss > plan.predicted_loss


def test_another_budget_out_of_reach_states_the_range(plan):
    with pytest.raises(InfeasibleBudgetError, match=r"budget size <= 1000x cannot be met: .* reach from 1x .* to \d"):
        compile(budget="1000x", plan=plan)


def test_a_plan_of_other_shapes_is_refused_with_both(plan):
    with pytest.raises(PlanError, match=r"made for another model: '.*' is \d+ x 64 in the plan and \d+ x 32 here"):
        compile(tiny_bert(hidden=32), budget=None, plan=plan)


def test_a_plan_with_a_site_the_model_lacks_is_refused_by_its_name(plan):
    renamed = dataclasses.replace(plan, sites=(dataclasses.replace(plan.sites[0], name="elsewhere"), *plan.sites[1:]))
    with pytest.raises(PlanError, match="it names 'elsewhere', and this model has no such site"):
        compile(budget=None, plan=renamed)


def test_an_unknown_rewrite_in_a_plans_spec_is_refused_with_the_known(plan):
    strange = dataclasses.replace(plan.choices[0], spec="fold{times=3}")
    with pytest.raises(SpecError, match="unknown rewrite 'fold'; known are quantize, quantize_rows, "):
        compile(budget=None, plan=dataclasses.replace(plan, choices=(strange, *plan.choices[1:])))


@pytest.mark.parametrize("rewrites", [["quantise"], "quantise", ["quantize", "quantise"]])
def test_an_unknown_rewrite_is_refused_before_anything_runs(rewrites):
    with pytest.raises(SpecError, match="unknown rewrite 'quantise'; known are quantize, quantize_rows, "):
        fxcompress.compile(object(), "2x", rewrites=rewrites)


def test_rewrites_restrict_what_is_tried():
    made = fxcompress.compile(
        nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64)),
        "1.5x",
        example_inputs=(torch.ones(2, 64),),
        rewrites=["quantize"],
        progress=False,
    )
    assert {c.spec.split("{")[0] for c in made.plan.candidates} == {KEEP, "quantize"}


DAMAGE = {
    "cut": (lambda text: text[: len(text) // 2], "cannot be read as a plan"),
    "empty": (lambda text: "", "cannot be read as a plan"),
    "a list": (lambda text: "[1, 2]", "is no plan written by Plan.save: it holds a list"),
    "no sites": (lambda text: text.replace('"sites"', '"places"'), "no plan written by Plan.save: KeyError 'sites'"),
    "another format": (
        lambda text: text.replace('"format": 3', '"format": 99'),
        "has format 99; this version reads format",
    ),
    "a bad budget": (lambda text: text.replace('"size": "2x"', '"size": "fast"'), "size='fast' is not understood"),
    "short candidate": (
        lambda text: text.replace('"candidates": [\n  [', '"candidates": [\n  ["x"],\n  ['),
        "TypeError",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_plan_is_refused(plan, tmp_path, kind):
    damage, message = DAMAGE[kind]
    damaged = damage(plan.to_text())
    assert damaged != plan.to_text()
    path = tmp_path / "plan.json"
    path.write_text(damaged, encoding="utf-8")
    with pytest.raises(PlanError, match=message):
        Plan.load(path)


def test_a_missing_or_binary_plan_is_refused_by_its_path(tmp_path):
    with pytest.raises(PlanError, match=r"nowhere\.json cannot be read as a plan"):
        Plan.load(tmp_path / "nowhere.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(PlanError, match=r"binary\.json cannot be read as a plan"):
        Plan.load(tmp_path / "binary.json")


def test_every_spec_a_plan_prints_parses_back_to_itself(plan):
    specs = {c.spec for c in plan.candidates}
    assert len(specs) > 5
    for spec in specs:
        assert str(parse(spec, REWRITES)) == spec
        assert parse(f"  {spec} ", REWRITES) == parse(spec, REWRITES)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "'' is no rewrite; write name{parameter=value}"),
        ("quantize{bits=4", "is no rewrite"),
        ("quantize{bits=4}", "missing 1 required positional argument: 'group_size'"),
        ("quantize{bits=4, size=64}", "quantize has no parameter 'size'; it takes bits, group_size"),
        ("quantize{bits=four, group_size=64}", "bits=four is no number"),
        ("quantize{bits=5, group_size=64}", "bits=5: allowed are 2, 3, 4, 8"),
        ("quantize{bits=4, group_size=64} | low_rank{rank=3}", "write at most one structure, then at most one storage"),
        ("low_rank{rank=3} | low_rank{rank=3}", "at most one structure"),
        ("fold{times=2}", "unknown rewrite 'fold'; known are quantize, quantize_rows, "),
    ],
)
def test_a_spec_that_does_not_parse_is_refused_with_what_is_wanted(spec, message):
    with pytest.raises(SpecError, match=re.escape(message)):
        parse(spec, REWRITES)


def test_a_plan_can_be_copied(plan):
    assert copy.deepcopy(plan) == plan
