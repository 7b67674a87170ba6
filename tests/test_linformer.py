"""Linformer in a model: its sites, what is refused, exact at full length, trained, saved and loaded."""

import copy
import warnings

import pytest
import torch
import transformers as tf
from torch import nn

import fxcompress
from benchmarks.models import data as readers
from benchmarks.models import minilm
from fxcompress.core.attention import AttentionSample, find_attention_sites, replace_attention
from fxcompress.core.capture import capture, example_of, recapture
from fxcompress.core.errors import InputError, SpecError
from fxcompress.core.rewrite import parse_spec
from fxcompress.core.site import find_sites
from fxcompress.core.surgery import finish
from fxcompress.passes.linformer import E_NAME, F_NAME, Linformer
from tests.attending import EPS, Attention, assert_close_answers, attend, exact, kinds, padding, rewrite, sharp
from tests.test_capture import HF, SMALL, TEXT, captured, seeded, text_batch


def test_sites_are_named_after_their_module_and_shared_layers_are_counted():
    assert list(kinds(captured("bert")[1])) == ["encoder.layer.0.attention.self", "encoder.layer.1.attention.self"]
    (site, _) = find_attention_sites(captured("bert")[1])
    assert (site.heads, site.head_dim, site.max_keys) == (4, 8, 64)  # 64 positions in the table
    albert = tf.AlbertConfig(**SMALL, **TEXT, embedding_size=16)
    model = seeded(lambda: tf.AlbertModel(albert)).eval()
    shared = "encoder.albert_layer_groups.0.albert_layers.0.attention"
    gm = capture(model, example_of(model))
    assert list(kinds(gm)) == [shared, f"{shared}@1"]
    rewritten = rewrite(gm, Linformer(64))
    assert {n for n, _ in rewritten.named_parameters() if "linformer" in n} == {
        f"{shared}.linformer_{which}{again}" for which in "ef" for again in ("", "_1")
    }
    assert_close_answers(rewritten, gm, text_batch(model, 2, 23))


def test_refusals_are_clauses_that_name_the_reason():
    sites = {name: find_attention_sites(captured(name)[1])[0] for name in ("bert", "gpt2", "llama", "t5", "vit")}
    causal = "its attention is causal: a landmark would show a query the positions after it"
    assert Linformer.refuses(sites["bert"]) is None
    assert Linformer.refuses(sites["vit"]) is None
    assert Linformer.refuses(sites["gpt2"]) == Linformer.refuses(sites["llama"]) == causal
    assert Linformer.refuses(sites["t5"]) == (
        "its mask differs between queries (a window, a bias by distance); all queries share the landmarks"
    )
    weight = find_sites(captured("bert")[1])[0]
    assert Linformer.refuses(weight) == "it acts on attention, not on weights"
    assert list(Linformer.space(weight)) == []


def test_grouped_heads_and_dropout_are_refused():
    class Grouped(nn.Module):
        def forward(self, q, k):
            return exact(q, k, k, enable_gqa=True)

    class Dropped(nn.Module):
        def forward(self, q, k):
            return exact(q, k, k, dropout_p=0.1)

    (grouped,) = find_attention_sites(capture(Grouped(), (torch.randn(3, 4, 6, 8), torch.randn(3, 2, 6, 8))))
    assert "are shared by groups of the heads of its queries" in Linformer.refuses(grouped)
    (dropped,) = find_attention_sites(capture(Dropped(), (torch.randn(3, 4, 6, 8), torch.randn(3, 4, 6, 8))))
    assert Linformer.refuses(dropped) == "it drops attention weights at random (p=0.1)"


def test_specs_parse_back():
    for made in (Linformer(128), Linformer(64, 512)):
        assert parse_spec(str(made), {"linformer": Linformer}) == made
    assert str(Linformer(128)) == "linformer{length=128}"
    assert str(Linformer(64, 512)) == "linformer{length=64, max_length=512}"
    site = find_attention_sites(captured("bert")[1])[0]
    assert str(Linformer(16).at(site)) == "linformer{length=16, max_length=64}"
    assert [made.length for made in Linformer.space(site)] == [4, 8, 16]


def test_parameters_that_do_not_fit_are_errors_that_name_the_site():
    bert, vit, encoder = (find_attention_sites(captured(n)[1])[0] for n in ("bert", "vit", "encoder"))
    with pytest.raises(SpecError, match=r"length=0 must be a whole number of at least 1"):
        Linformer(0)
    with pytest.raises(SpecError, match=r"max_length=-1 must be a whole number of at least 1"):
        Linformer(8, -1)
    with pytest.raises(SpecError, match=r"at encoder.layer.0.attention.self: the longest sequence has 64 keys, so len"):
        Linformer(65).check(bert)
    with pytest.raises(SpecError, match=r"at layers.0.self_attn: the graph sets no limit .* max_length=\.\.\.}"):
        Linformer(8).at(encoder)
    with pytest.raises(SpecError, match=r"at layers.0.attention: every sequence has 17 keys, so max_length must be 17"):
        Linformer(4, 16).at(vit)
    sample = AttentionSample(*(torch.randn(1, 4, 40, 8) for _ in range(3)), None, None)
    with pytest.raises(SpecError, match="the calibration holds a sequence of 40 keys, so max_length must be 40 at lea"):
        Linformer(8, 32).factor(bert, [sample])


@pytest.mark.parametrize(("size", "length"), [(2, 11), (1, 3), (3, 40), (5, 64)])
def test_at_full_length_the_model_is_exact(size, length):
    model, gm = sharp()
    assert_close_answers(rewrite(gm, Linformer(64)), gm, text_batch(model, size, length))


def test_at_a_fixed_length_too():
    model, gm = captured("vit")
    assert_close_answers(rewrite(gm, Linformer(17)), gm, text_batch(model, 3, 0))


def test_a_padded_batch_answers_as_its_sequences_alone():
    model, gm = sharp()
    small = rewrite(gm, Linformer(12))
    batch = text_batch(model, 3, 33)
    real = int(batch["attention_mask"][0].sum())
    assert real < 33
    alone = {name: value[:1, :real] for name, value in batch.items()}
    with torch.no_grad():
        together, single = small(**batch).last_hidden_state[:1, :real], small(**alone).last_hidden_state
        other = gm(**alone).last_hidden_state
    assert float((together - single).abs().max()) < 500 * EPS
    assert float((other - single).abs().max()) > 0.1  # it is no exact attention


def test_past_the_limit_is_an_error():
    model, gm = sharp()
    small = rewrite(gm, Linformer(8, 32))
    for length in (1, 8, 31, 32):
        assert small(**text_batch(model, 2, length)).last_hidden_state.shape == (2, length, 32)
    with pytest.raises(InputError, match="the sequence has 33 keys; e and f were made for at most 32"):
        small(**text_batch(model, 2, 33))


def test_cross_attention_with_an_additive_mask_is_rewritten():
    model, gm = captured("t5")
    work = gm.copy()
    crossing = [s for s in find_attention_sites(work) if s.name.endswith("EncDecAttention")]
    for site in crossing:
        Linformer(32, 32).apply(work, site, Linformer(32, 32).factor(site))
    finish(work)
    batch = text_batch(model, 2, 19)
    with torch.no_grad():
        got, want = work(**batch).logits, gm(**batch).logits
    assert len(crossing) == 2
    assert float((got - want).norm() / want.norm()) < 500 * EPS


def test_both_projections_are_trained():
    model, gm = sharp()
    small = rewrite(gm, Linformer(8))
    for parameter in small.parameters():
        parameter.requires_grad_(True)
    small(**text_batch(model, 3, 40)).last_hidden_state[..., 0].square().mean().backward()
    for layer in (0, 1):
        owner = small.get_submodule(f"encoder.layer.{layer}.attention.self")
        for key in (E_NAME, F_NAME):
            grad = owner.get_parameter(key).grad
            assert float(grad[:, :40].abs().max()) > 0
            assert bool(torch.isfinite(grad).all())
            # Past the batch: f has no part in it, e only in the norm of its rows.
            assert key == E_NAME or float(grad[:, 40:].abs().max()) == 0


def test_a_few_steps_of_training_bring_a_random_start_nearer():
    model, gm = sharp()
    small = rewrite(gm, Linformer(8, 16), seed=3)
    batch = text_batch(model, 4, 16)
    with torch.no_grad():
        target = gm(**batch).last_hidden_state
    learned = [p.requires_grad_(True) for name, p in small.named_parameters() if "linformer" in name]
    optimizer = torch.optim.Adam(learned, lr=0.02)
    losses = []
    for _ in range(20):
        loss = (small(**batch).last_hidden_state - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_nodes_say_what_they_were_and_the_original_is_left_alone():
    _, gm = sharp()
    before = copy.copy(str(gm.graph))
    small = rewrite(gm, Linformer(8))
    nodes = [n for n in small.graph.nodes if n.target is attend]
    was = "linformer{length=8, max_length=64}, was aten.scaled_dot_product_attention at encoder.layer."
    assert [n.meta["fxcompress"] for n in nodes] == [f"{was}{i}.attention.self" for i in (0, 1)]
    assert all("val" in n.meta for n in small.graph.nodes if n.op != "output")
    assert str(gm.graph) == before
    assert not [name for name, _ in gm.named_parameters() if "linformer" in name]


def test_an_owner_without_tensors_is_made():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Attention(padding)

        def forward(self, x, pad):
            return self.inner(x, pad)

    x, pad = torch.randn(2, 7, 8), torch.rand(2, 7) > 0.3
    gm = capture(Outer().eval(), (x, pad))
    (site,) = find_attention_sites(gm)
    made = Linformer(7, 7)
    replace_attention(gm, site, made.factor(site), made.emit, str(made))
    finish(gm)
    assert {name for name, _ in gm.named_parameters()} == {"inner.linformer_e", "inner.linformer_f"}
    assert torch.allclose(gm(x, pad), Outer()(x, pad), rtol=0, atol=100 * EPS)


def test_it_is_captured_again_and_saved_and_loaded(tmp_path):
    model, _ = sharp()
    compiled = rewrite(fxcompress.compile(model, "2x", example_inputs=example_of(model), progress=False), Linformer(8))
    assert "linformer_attention" in str(recapture(compiled).graph)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fxcompress.save(compiled, tmp_path / "m")
    loaded = fxcompress.load(tmp_path / "m")
    for size, length in ((2, 11), (3, 40)):
        batch = text_batch(model, size, length)
        with torch.no_grad():
            assert torch.equal(loaded(**batch).last_hidden_state, compiled(**batch).last_hidden_state)
    assert [s.mask_kind for s in find_attention_sites(loaded)] == []


def test_minilm_runs_at_every_length_and_stops_past_its_limit(data):
    model = data(minilm.model)
    batches = minilm.batches([text for text, _ in data(readers.sst2, "dev")][:32])
    gm = capture(model, batches[0])
    small = rewrite(gm, Linformer(32, 128))
    with torch.no_grad():
        for batch in batches[:2]:
            got, want = small(**batch).last_hidden_state, gm(**batch).last_hidden_state
            assert got.shape == want.shape
        ids = torch.randint(1000, 2000, (1, 129), generator=torch.Generator().manual_seed(0))
        assert small(input_ids=ids[:, :128]).last_hidden_state.shape == (1, 128, 384)
        with pytest.raises(InputError, match="has 129 keys; e and f were made for at most 128"):
            small(input_ids=ids)


def test_every_model_of_the_capture_tests_is_accepted_or_refused():
    for name in HF:
        for site in find_attention_sites(captured(name)[1]):
            assert (Linformer.refuses(site) is None) == (site.mask_kind in ("none", "keys"))
