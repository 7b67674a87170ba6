"""restructure: published parameter totals to the unit, trainable graphs, patterns, refusals, errors by their text."""

import pytest
import torch
import transformers
from torch import nn

import fxcompress
from fxcompress.core.errors import SpecError

GREENFORMER = "low_rank{rank=256}"


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config())


def bert():
    return transformers.BertModel(transformers.BertConfig())


def parameters(module):
    return sum(p.numel() for p in module.parameters())


# Greenformer's notebooks (Cahyawijaya et al., arXiv 2109.06762) and table 4 of TTM GPT-2 (arXiv 2306.02697).
@pytest.mark.parametrize(
    ("make", "rewrites", "before", "after"),
    [
        (gpt2, {"transformer.h.*": GREENFORMER}, 124_439_808, 77_253_888),
        (gpt2, {"transformer.h.*": "low_rank{rank=0.4}"}, 124_439_808, 73_383_168),
        (bert, {"encoder.*": GREENFORMER, "pooler.*": GREENFORMER}, 109_482_240, 66_818_304),
    ],
    ids=["gpt2-256", "gpt2-0.4", "bert-256"],
)
def test_greenformers_totals(make, rewrites, before, after):
    model = make()
    assert parameters(model) == before
    small = fxcompress.restructure(model, rewrites, init="random", progress=False)
    assert parameters(small) == after == small.report.parameters_after
    assert small.report.parameters_before == before


# The paper counts R = 16, 32 and 64 without the biases of the MLPs, R = 80 with them.
@pytest.mark.parametrize(("rank", "total"), [(16, 68_085_504), (32, 71_756_544), (64, 83_606_784), (80, 107_698_944)])
def test_tensor_train_gpt2s_totals(rank, total):
    small = fxcompress.restructure(
        gpt2(), {"transformer.h.*.mlp.*": f"tensor_train{{rank={rank}}}"}, init="random", progress=False
    )
    biases = sum(p.numel() for name, p in small.named_parameters() if ".mlp." in name and name.endswith("bias"))
    assert biases == 12 * (3072 + 768)
    assert parameters(small) - (biases if rank < 80 else 0) == total


def tiny(**changes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=99, **changes))


IDS = torch.arange(14).reshape(2, 7)


def test_the_result_trains_and_leaves_the_model_alone():
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = fxcompress.restructure(model, {"encoder.*": "low_rank{rank=0.5}"}, progress=False)
    trained = {name for name, p in small.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in small.named_parameters()}
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2)
    losses = []
    small.train()
    for _ in range(20):
        loss = (small(input_ids=IDS).last_hidden_state - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(p.grad is not None for n, p in small.named_parameters() if "pooler" not in n)
    assert losses[-1] < 0.9 * losses[0]
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_train_turns_dropout_on_and_eval_off():
    small = fxcompress.restructure(tiny(), {"encoder.*": "low_rank{rank=0.5}"}, progress=False)
    run = lambda: small(input_ids=IDS).last_hidden_state  # noqa: E731
    assert torch.equal(run(), run())  # as it comes: eval
    small.train()
    assert not torch.equal(run(), run())
    small.eval()
    assert torch.equal(run(), run())


def test_batch_norm_learns_in_train_mode_only():
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.linspace(-2, 3, 40).reshape(5, 8)
    small = fxcompress.restructure(net, {"0": "low_rank{rank=2}"}, example_inputs=(x,), progress=False)
    small(x)
    assert torch.equal(small.get_buffer("1.running_mean"), torch.zeros(16))
    small.train()(x)
    assert not torch.equal(small.get_buffer("1.running_mean"), torch.zeros(16))
    assert torch.equal(net[1].running_mean, torch.zeros(16))


def test_a_state_dict_goes_from_one_restructured_model_to_another():
    rewrites = {"encoder.*": "low_rank{rank=3}"}
    one, two = (fxcompress.restructure(tiny(), rewrites, init="random", progress=False) for _ in range(2))
    assert not torch.equal(one(input_ids=IDS)[0], two(input_ids=IDS)[0])
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(input_ids=IDS)[0], two(input_ids=IDS)[0])


def test_a_restructured_model_saves_and_loads_bit_for_bit(tmp_path):
    small = fxcompress.restructure(tiny(), {"encoder.*": "low_rank{rank=3}"}, init="random", progress=False)
    small.train()
    fxcompress.save(small, tmp_path / "small")
    assert small.training
    loaded = fxcompress.load(tmp_path / "small")
    assert torch.equal(loaded(input_ids=IDS)[0], small.eval()(input_ids=IDS)[0])
    assert loaded.report == small.report


def test_project_is_the_best_of_its_form_and_random_has_the_same_spread():
    model = tiny()
    full = fxcompress.restructure(model, {"*.query": "low_rank{rank=15}"}, progress=False)
    low = fxcompress.restructure(model, {"*.query": "low_rank{rank=2}"}, progress=False)
    drawn = fxcompress.restructure(model, {"*.query": "low_rank{rank=15}"}, init="random", progress=False)
    want = model.eval()(input_ids=IDS).last_hidden_state
    off = [float((m(input_ids=IDS).last_hidden_state - want).norm().detach()) for m in (full, low, drawn)]
    assert off[0] < off[1] < off[2]
    weight = model.encoder.layer[0].attention.self.query.weight
    made = drawn.get_parameter("encoder.layer.0.attention.self.query.u") @ drawn.get_parameter(
        "encoder.layer.0.attention.self.query.v"
    )
    assert float(made.detach().std()) == pytest.approx(float(weight.detach().std()), rel=1e-3)


def test_the_first_pattern_that_matches_wins_and_stars_cross_dots():
    rewrites = {"*layer.0*query": "keep", "*layer.0*": "low_rank{rank=3}", "*query": "low_rank{rank=5}"}
    report = fxcompress.restructure(tiny(), rewrites, progress=False).report
    specs = {s.site: s.spec for s in report.sites}
    assert specs["encoder.layer.0.attention.self.query"] == "keep"
    assert specs["encoder.layer.0.attention.self.key"] == "low_rank{rank=3}"
    assert specs["encoder.layer.1.attention.self.query"] == "low_rank{rank=5}"
    assert "encoder.layer.1.attention.self.key" not in specs


@pytest.mark.parametrize("init", ["project", "random"])
def test_every_structure_trains(init):
    rewrites = {
        "*.0.*query": "quaternion",
        "*.0.*key": "monarch{blocks=4, rank=2}",
        "*.0.*value": "block_low_rank{blocks=2, rank=4}",
        "*.0.attention.output.dense": "prune{sparsity=0.5}",
        "*.0.intermediate.dense": "tensor_train{rank=4}",
        "*.0.output.dense": "low_rank{rank=0.5}",
        "*.1.*query": "prune_2_4",
        "*.1.attention.self": "linformer{length=4, max_length=12}",
    }
    small = fxcompress.restructure(tiny(), rewrites, init=init, progress=False)
    assert {s.why for s in small.report.sites} == {""}
    loss = small(input_ids=IDS).last_hidden_state.square().sum()
    loss.backward()
    still = [n for n, p in small.named_parameters() if p.grad is None or not float(p.grad.abs().max()) > 0]
    assert all(n.startswith("pooler") or n.endswith("key.bias") for n in still), still
    optimizer = torch.optim.SGD(small.parameters(), lr=1e-3)
    optimizer.step()
    assert float(small(input_ids=IDS).last_hidden_state.square().sum().detach()) < float(loss.detach())


def test_a_causal_attention_is_kept_and_the_reason_reported():
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=99))
    ids = {"input_ids": IDS}
    report = fxcompress.restructure(
        model, {"transformer.*": "linformer{length=4, max_length=12}"}, example_inputs=ids, progress=False
    ).report
    (site,) = report.sites
    assert site.spec == "keep"
    assert site.why == "its attention is causal: a landmark would show a query the positions after it"


def test_hidden_units_are_cut_before_the_rest_is_done(tmp_path):
    batches = [{"input_ids": (torch.arange(56).reshape(8, 7) * 5 + i) % 99} for i in range(4)]
    rewrites = {
        "*output.dense": "hidden_units{kept=0.5}",
        "*.0.attention.self": "linformer{length=5, max_length=12}",
        "*.1.intermediate.dense": "low_rank{rank=3}",
    }
    model = tiny()
    small = fxcompress.restructure(model, rewrites, calibration=iter(batches), progress=False)
    shapes = {name: tuple(p.shape) for name, p in small.named_parameters()}
    assert shapes["encoder.layer.0.intermediate.dense.weight"] == (32, 32)
    assert shapes["encoder.layer.0.intermediate.dense.bias"] == (32,)
    assert shapes["encoder.layer.0.output.dense.weight"] == (32, 32)
    assert shapes["encoder.layer.0.attention.self.query.weight"] == (16, 32)  # one head of two
    assert shapes["encoder.layer.1.intermediate.dense.u"] == (32, 3)
    assert small.report.parameters_after == parameters(small)
    want = model.eval()(input_ids=IDS).last_hidden_state
    got = small(input_ids=IDS).last_hidden_state
    assert float((got - want).norm().detach() / want.norm().detach()) < 0.6  # untrained weights: half of them matter
    fxcompress.save(small, tmp_path / "small")
    assert torch.equal(fxcompress.load(tmp_path / "small")(input_ids=IDS)[0], got)


def test_frozen_parameters_stay_frozen():
    model = tiny()
    model.embeddings.requires_grad_(False)
    small = fxcompress.restructure(model, {"encoder.*": "low_rank{rank=3}"}, progress=False)
    free = {name.startswith("embeddings.") for name, p in small.named_parameters() if not p.requires_grad}
    assert free == {True}
    assert all(p.requires_grad for name, p in small.named_parameters() if not name.startswith("embeddings."))


def test_the_same_seed_draws_the_same_weights_and_the_callers_random_state_is_his_own():
    state = torch.random.get_rng_state()
    model, rewrites = tiny(), {"encoder.*": "low_rank{rank=3}"}
    state = torch.random.get_rng_state()
    made = [fxcompress.restructure(model, rewrites, init="random", seed=s, progress=False) for s in (0, 0, 1)]
    assert torch.equal(state, torch.random.get_rng_state())
    outputs = [m(input_ids=IDS).last_hidden_state for m in made]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_a_site_that_would_not_shrink_is_kept_and_reported(golden):
    both = "low_rank{rank=4} | quantize{bits=8, group_size=0}"
    rewrites = {"*intermediate.dense": "low_rank{rank=30}", "*.query": both}
    small = fxcompress.restructure(tiny(), rewrites, progress=False)
    assert "encoder.layer.0.intermediate.dense.weight" in dict(small.named_parameters())
    golden(str(small.report))


@pytest.mark.parametrize(
    ("rewrites", "said"),
    [
        ({"decoder.*": "keep"}, r"the pattern 'decoder\.\*' matches none of the 16 sites: embeddings\.wor.*…"),
        ({"nothing": "linformer{length=4}"}, r"the pattern 'nothing' matches none of the 2 attentions: encoder\.la"),
        ({"*query": "low_rank{rank=0}"}, "low_rank rank=0 must be a whole number of at least 1"),
        (
            {"*query": "low_rank{rank=33}"},
            r"low_rank\{rank=33\} at encoder\.layer\.0\.attention\.self\.query: the weight is 32 x 32, so rank must be "
            "1 to 32",
        ),
        ({"*query": "quantize{bits=5, group_size=64}"}, "quantize bits=5: allowed are 2, 3, 4, 8"),
        ({"*query": "kronecker"}, "unknown rewrite 'kronecker'; known are quantize, "),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_it(rewrites, said):
    with pytest.raises(SpecError, match=said):
        fxcompress.restructure(tiny(), rewrites, progress=False)


def test_an_unknown_start_is_an_error():
    with pytest.raises(SpecError, match="init='svd': allowed are 'project' and 'random'"):
        fxcompress.restructure(tiny(), {"*query": "keep"}, init="svd")
