"""Calibration: moments are those of the model's own inputs, padding and held-out examples stay out, memory is flat."""

import copy
import gc
from functools import cache

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxcompress
from fxcompress.core.calibrate import HELD_OUT_EXAMPLES, calibrate, spread
from fxcompress.core.capture import capture, example_of
from fxcompress.core.errors import CalibrationError, NonFiniteError
from fxcompress.core.site import find_sites
from fxcompress.passes.quantize import Quantize
from fxcompress.passes.recipe import Recipe

VOCABULARY = 150


@cache
def bert():
    """-> (model, graph, sites by name)."""
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    model = tf.BertModel(config).eval()
    gm = capture(model, example_of(model))
    return model, gm, {s.name: s for s in find_sites(gm)}


def batches(count=3, size=8, length=12, padded=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        mask = torch.ones(size, length, dtype=torch.int64)
        if padded:
            for row, keep in enumerate(torch.randint(3, length + 1, (size,), generator=generator)):
                mask[row, keep:] = 0
        made.append(
            {"input_ids": torch.randint(3, VOCABULARY, (size, length), generator=generator), "attention_mask": mask}
        )
    return made


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4)).eval()


def of(gm, data):
    return calibrate(gm, find_sites(gm), data, progress=False)


def direct_moments(model, name, calls):
    """E[x x^T] and E[x] of a layer's unpadded inputs, by a hook on the Hugging Face model, in float64."""
    seen = []
    mask = None
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0][mask.bool()].double())
    )
    try:
        for call in calls:
            mask = call["attention_mask"]
            with torch.no_grad():
                model(**call)
    finally:
        hook.remove()
    x = torch.cat(seen)
    return x.T @ x / len(x), x.mean(0)


def fit_part(batch):
    return {k: v[: len(v) - len(v) // 4] for k, v in batch.items()}


def held_part(batch):
    return {k: v[len(v) - len(v) // 4 :] for k, v in batch.items()}


@pytest.mark.parametrize(
    "name",
    ["encoder.layer.0.attention.self.query", "encoder.layer.0.output.dense", "encoder.layer.1.intermediate.dense"],
)
def test_moments_are_those_of_the_models_own_inputs(name):
    model, gm, sites = bert()
    data = batches()
    statistics = of(gm, data).statistics(sites[name])
    second, mean = direct_moments(model, name, [fit_part(b) for b in data])
    check_second, check_mean = direct_moments(model, name, [held_part(b) for b in data])
    # Products are summed in float32 over at most 8 * 12 tokens a batch: 96 roundings of 2^-24 of the largest entry.
    for got, want in ((statistics.second_moment, second), (statistics.mean, mean)):
        assert got.dtype == torch.float64
        assert float((got - want).abs().max()) <= 96 * 2**-24 * float(want.abs().max())
    for got, want in ((statistics.check.second, check_second), (statistics.check.mean, check_mean)):
        assert float((got - want).abs().max()) <= 96 * 2**-24 * float(want.abs().max())


def test_queries_keys_and_values_share_one_moment():
    _, gm, sites = bert()
    known = of(gm, batches(1))
    first, *rest = (sites[f"encoder.layer.0.attention.self.{n}"].uses[0].key for n in ("query", "key", "value"))
    assert rest == [first, first]
    assert first in known.moments


def test_a_layer_fed_by_a_rewritten_layer_keeps_what_calibration_saw():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    x = torch.randn(256, 64) * torch.logspace(0, -2, 64)
    gm = capture(model, (x,))
    known = of(gm, [x])
    work = gm.copy()
    for index, site in enumerate(find_sites(work)):
        site = known.informed(site)  # by now its input is the call that an earlier rewrite put in
        assert site.statistics.second_moment is not None, index
        Recipe(storage=Quantize(8, 0)).make(site).apply(work, site)


@given(st.integers(0, 300), st.integers(0, 300))
def test_spread_picks_one_of_every_stretch(count, room):
    room = min(count, room)
    picked = spread(count, room)
    stretch = [(i * count // room, (i + 1) * count // room) for i in range(room)]
    assert all(low <= p < high for p, (low, high) in zip(picked.tolist(), stretch, strict=True))
    assert room < count or torch.equal(picked, torch.arange(count))


def test_the_sample_is_not_the_same_position_of_every_sentence():
    model = nn.Sequential(nn.Linear(1, 4)).eval()
    positions = torch.arange(16.0).repeat(64).reshape(-1, 1)  # 64 sentences of 16; 64 of these 1024 rows are kept
    gm = capture(model, (positions,))
    (moment,) = of(gm, [positions, positions]).moments.values()
    assert len(moment.sample) == 128
    seen = torch.bincount(moment.sample[:, 0].long(), minlength=16)
    assert int(seen.min()) >= 4  # 8 of each if spread perfectly; equal steps would have found one position only
    assert int(seen.max()) <= 12


def test_what_stands_in_the_padding_changes_nothing():
    _, gm, sites = bert()
    data = batches()
    other = copy.deepcopy(data)
    for batch in other:
        batch["input_ids"][batch["attention_mask"] == 0] = 7
    one, two = of(gm, data), of(gm, other)
    for name, site in sites.items():
        a, b = one.statistics(site), two.statistics(site)
        if a.second_moment is not None:
            # Attention gives padding a weight of exactly 0 in float32, so only the order of sums could differ.
            assert float((a.second_moment - b.second_moment).abs().max()) <= 1e-6 * float(
                a.second_moment.abs().max()
            ), name
    table = sites["embeddings.word_embeddings"].uses[0].key
    assert torch.equal(one.counts[table], two.counts[table])


def test_only_unpadded_ids_of_the_fit_part_are_counted():
    _, gm, sites = bert()
    data = batches()
    known = of(gm, data)
    ids = torch.cat([b["input_ids"][b["attention_mask"].bool()] for b in map(fit_part, data)])
    want = torch.bincount(ids, minlength=VOCABULARY).double()
    assert torch.equal(known.counts[sites["embeddings.word_embeddings"].uses[0].key], want)


def test_the_held_out_examples_are_the_last_quarter_and_never_in_the_fit():
    _, gm, _ = bert()
    data = batches(count=2)
    known = of(gm, data)
    assert known.examples == 16
    assert known.held_out_examples == 4
    assert known.has_held_out
    for call, batch in zip(known.held_out, data):
        assert torch.equal(call[1]["input_ids"], batch["input_ids"][6:])
    poisoned = copy.deepcopy(data)
    for batch in poisoned:
        batch["input_ids"][6:] = 5
    again = of(gm, poisoned)
    assert known.moments.keys() == again.moments.keys()
    for name, moment in known.moments.items():
        assert moment.count == again.moments[name].count
        assert torch.equal(moment.second, again.moments[name].second)
    assert any(not torch.equal(m.total, again.checks[n].total) for n, m in known.checks.items())


def test_small_batches_hold_out_every_fourth():
    gm = capture(mlp(), (torch.randn(2, 8),))
    data = [torch.randn(1, 8, generator=torch.Generator().manual_seed(i)) for i in range(9)]
    known = of(gm, data)
    assert [torch.equal(call[0][0], data[i]) for call, i in zip(known.held_out, (3, 7))] == [True, True]
    assert len(known.held_out) == 2
    assert {m.count for m in known.moments.values()} == {7}


def test_at_most_sixty_four_examples_are_held_out():
    gm = capture(mlp(), (torch.randn(2, 8),))
    known = of(gm, [torch.randn(100, 8) for _ in range(6)])
    assert known.held_out_examples == HELD_OUT_EXAMPLES == 64
    assert {m.count for m in known.moments.values()} == {600 - 64}


def test_too_little_data_is_used_twice_and_says_so(caplog):
    gm = capture(mlp(), (torch.randn(2, 8),))
    with caplog.at_level("WARNING", "fxcompress.calibrate"):
        known = of(gm, [torch.randn(3, 8)])
    assert not known.has_held_out
    assert known.held_out_examples == 3
    assert "too few examples to hold any out" in caplog.text


def test_a_one_shot_generator_gives_what_a_list_gives():
    model = mlp()
    data = [torch.randn(8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    served = []

    def once():
        for i, batch in enumerate(data):
            served.append(i)
            yield batch

    made = [fxcompress.compile(model, Budget60, calibration=c, progress=False) for c in (data, once())]
    assert served == [0, 1, 2]
    assert made[0].plan.to_text() == made[1].plan.to_text()
    assert all(torch.equal(a, b) for a, b in zip(made[0].state_dict().values(), made[1].state_dict().values()))


Budget60 = fxcompress.Budget(error=0.05)  # the little MLP has more overhead than weights, so no size is asked of it


def test_tuples_dicts_and_tensors_are_the_same_batch():
    gm = capture(mlp(), (torch.randn(2, 8),))
    x = torch.randn(8, 8)
    texts = [{n: m.second for n, m in of(gm, [b]).moments.items()} for b in (x, (x,), [x], {"input": x})]
    for other in texts[1:]:
        assert all(torch.equal(texts[0][n], other[n]) for n in texts[0])


def test_the_tensors_kept_do_not_grow_with_the_batches():
    gm = capture(mlp(), (torch.randn(2, 8),))
    sites = find_sites(gm)

    def alive():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    counts = []

    def stream(number):
        for i in range(number):
            if i >= 12:  # by then the held-out examples are full and the gradient batches kept
                counts.append(alive())
            yield torch.randn(32, 8)

    calibrate(gm, sites, stream(20), progress=False)
    assert len(counts) == 8
    assert max(counts) == min(counts)


def test_lookup_gradients_are_symmetric_positive_and_deterministic():
    _, gm, sites = bert()
    metrics = [of(gm, batches(1)).statistics(sites["embeddings.word_embeddings"]).column_metric for _ in range(2)]
    assert torch.equal(*metrics)
    assert torch.equal(metrics[0], metrics[0].T)
    # Sums of g g^T in float64: eigenvalues are above -32 * 2^-52 of the largest.
    eigenvalues = torch.linalg.eigvalsh(metrics[0])
    assert float(eigenvalues.min()) >= -1e-13 * float(eigenvalues.max())


def test_a_calibration_leaves_no_gradients_behind():
    model, gm, _ = bert()
    of(gm, batches(1))
    assert all(p.grad is None for p in [*gm.parameters(), *model.parameters()])


def refused(data, message, model=None, **more):
    with pytest.raises(CalibrationError, match=message):
        fxcompress.compile(model or mlp(), "2x", calibration=data, progress=False, **more)


@pytest.mark.parametrize("data", [[], iter([]), (x for x in ())], ids=["list", "iterator", "generator"])
def test_empty_calibration_is_refused(data):
    refused(
        data,
        "calibration is empty: give at least one batch of inputs, or calibration=None",
        example_inputs=(torch.randn(2, 8),),
    )


def test_a_dict_in_place_of_a_list_of_batches_is_refused():
    refused(
        {"input": torch.randn(4, 8)},
        "calibration is a dict; give an iterable of batches, such as a list of input dicts",
    )


@pytest.mark.parametrize("data", [torch.randn(4, 8), "texts.txt", 7], ids=["tensor", "text", "number"])
def test_what_is_no_iterable_of_batches_is_refused_by_its_type(data):
    refused(data, f"calibration is a {type(data).__name__}; give an iterable of batches")


def test_a_batch_of_the_wrong_shape_is_named_by_its_index():
    data = [torch.randn(4, 8), torch.randn(4, 8), torch.randn(4, 9)]
    refused(data, "calibration batch 2 does not fit the model: input 'input.*' has size 9 in dimension 1")


def test_a_batch_of_the_wrong_dtype_is_named_by_its_index():
    refused(
        [torch.randn(4, 8), torch.randn(4, 8).double()], "calibration batch 1 does not fit.*float64; float32 is wanted"
    )


def test_a_batch_with_a_keyword_the_model_lacks_is_named_by_its_index():
    model, _, _ = bert()
    data = batches(2)
    data[1]["labels"] = torch.ones(8)
    refused(data, "calibration batch 1 does not fit the model: the call has no place for labels", model)


def test_a_batch_that_makes_activations_nan_is_named_with_the_site():
    bad = torch.randn(4, 8)
    bad[0, 0] = float("nan")
    refused([torch.randn(4, 8), bad], "calibration batch 1 makes the input of 0 NaN or infinite; remove that batch")


def test_a_held_out_example_that_makes_activations_nan_is_refused():
    bad = torch.randn(4, 8)
    bad[3, 0] = float("inf")  # the last of four is held out
    refused([torch.randn(4, 8), bad], "NaN or infinite")


@pytest.mark.parametrize("bad", [VOCABULARY, 10_000, -1])
def test_an_id_outside_the_vocabulary_is_refused_with_the_table(bad):
    model, _, _ = bert()
    data = batches(2, padded=False)
    data[1]["input_ids"][0, 0] = bad
    refused(data, f"calibration batch 1 reads id {bad} of embeddings.word_embeddings, which has 150 rows.$", model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_before_anything_runs(value):
    model = mlp()
    with torch.no_grad():
        model[2].weight[3, 4] = value
    with pytest.raises(NonFiniteError, match=r"weight '2\.weight' holds 1 NaN or infinite of 256 values"):
        fxcompress.compile(model, "2x", calibration=[torch.randn(8, 8)], progress=False)


def test_batches_of_a_graph_for_one_number_of_examples_stay_whole():
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(64, 96)

        def forward(self, x):
            return torch.cat([row.relu() for row in self.up(x)])  # as many rows as the example had

    seen = [torch.randn(4, 6, 64, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    gm = capture(Listed().eval(), (seen[0],))
    assert isinstance(gm.signature.slots[0].dims[0], int)
    known = calibrate(gm, find_sites(gm), seen, progress=False)
    assert [len(call[0][0]) for call in known.held_out] == [4, 4]  # every fourth batch
    assert known.moments[find_sites(gm)[0].uses[0].key].count == 6 * 4 * 6


def test_a_lookup_that_is_written_into_has_gradients():
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(64, 16), nn.Linear(16, 8)

        def forward(self, ids):
            x = self.table(ids)
            x += 1.0
            return self.head(x)

    ids = torch.arange(32).reshape(4, 8)
    gm = capture(Shifted().eval(), (ids,))
    sites = find_sites(gm)
    known = calibrate(gm, sites, [ids], progress=False)
    metric = known.statistics(next(site for site in sites if site.kind == "embedding")).column_metric
    assert float(metric.trace()) > 0
