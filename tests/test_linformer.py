"""Linformer: the op against a plain one, exact at full length and under padding, which masks are proven to be padding,
what is refused, and the start it gets from data."""

import copy
import math
import warnings
from functools import cache

import pytest
import sympy
import torch
import transformers as tf
from torch import fx, nn

import fxcompress
from benchmarks.models import data as readers
from benchmarks.models import minilm
from fxcompress.codegen.ops import linformer_attention as op
from fxcompress.core.attention import (
    AttentionSample,
    find_attention_sites,
    key_mask,
    observe_attention,
    replace_attention,
)
from fxcompress.core.calibrate import bind_batch
from fxcompress.core.capture import capture, example_of, recapture
from fxcompress.core.errors import InputError, SpecError
from fxcompress.core.key_mask import ignores_queries
from fxcompress.core.rewrite import parse_spec
from fxcompress.core.site import find_sites
from fxcompress.core.surgery import finish, own_tensors
from fxcompress.passes.linformer import E_NAME, F_NAME, Linformer, attention_error, fitted, segments, strided
from tests.test_capture import HF, SMALL, TEXT, captured, seeded, text_batch

attend = torch.ops.fxcompress.linformer_attention.default
exact = torch.nn.functional.scaled_dot_product_attention
EPS = 2.0**-24


def inputs(lead=(2, 3), m=5, n=6, length=3, longest=8, mask=None, dtype=torch.float32, grad=False):
    """q, k, v, e, f, mask, scale; the values of v are one wider than a head."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_(grad)

    made = draw(*lead, m, 4), draw(*lead, n, 4), draw(*lead, n, 5), draw(length, longest), draw(length, longest)
    masks = {
        None: lambda: None,
        "rows": lambda: (torch.arange(n) < torch.arange(n - lead[0] + 1, n + 1).unsqueeze(1)).unsqueeze(1),
        "heads": lambda: torch.rand(*lead, n, generator=generator) > 0.3,
        "all": lambda: torch.arange(n) > 0,
        "additive": lambda: draw(lead[0], 1, n),
    }
    return *made, masks[mask](), 0.4


SAMPLES = [
    {},
    {"mask": "rows"},
    {"mask": "heads"},
    {"mask": "all"},
    {"mask": "additive"},
    {"n": 8},
    {"lead": ()},
    {"lead": (), "mask": "all"},
    {"lead": (3,)},
    {"lead": (2, 2, 3), "mask": "heads"},
    {"lead": (1, 1)},
    {"lead": (0, 3)},
]


def slowly(q, k, v, e, f, mask, scale):
    """The formulas of the op, one query at a time, float64."""
    q, k, v, e, f = (t.double() for t in (q, k, v, e, f))
    n, out = k.shape[-2], torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    w = torch.ones(n) if mask is None else mask.double() if mask.dtype == torch.bool else mask.double().exp()
    w = w.broadcast_to(k.shape[:-1]).double()
    for at in torch.cartesian_prod(*(torch.arange(s) for s in q.shape[:-1])).reshape(-1, q.dim() - 1).tolist():
        lead, query = tuple(at[:-1]), q[tuple(at)]
        logits, values = [], []
        for i in range(len(e)):
            mass = sum(abs(float(x)) for x in e[i])
            r = sum(abs(float(e[i, j])) * float(w[(*lead, j)]) for j in range(n)) / mass
            key = sum(e[i, j] * w[(*lead, j)] / r * k[(*lead, j)] for j in range(n))
            logits.append(scale * float(query @ key) + math.log(r))
            values.append(sum(f[i, j] * w[(*lead, j)] / r * v[(*lead, j)] for j in range(n)))
        weights = torch.softmax(torch.tensor(logits, dtype=torch.float64), 0)
        out[tuple(at)] = sum(weight * value for weight, value in zip(weights, values))
    return out


@pytest.mark.parametrize("case", [c for c in SAMPLES if 0 not in c.get("lead", ())], ids=str)
def test_the_op_is_the_formula(case):
    args = inputs(**case, dtype=torch.float64)
    assert torch.allclose(attend(*args), slowly(*args), rtol=1e-11, atol=1e-11)  # sums of at most 8 terms, float64


@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_torch_accepts_the_op(case):
    for grad in (False, True):
        assert set(torch.library.opcheck(attend, inputs(**case, grad=grad)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("case", [c for c in SAMPLES if 0 not in c.get("lead", ())], ids=str)
def test_the_gradients_are_those_of_the_formula(case):
    assert torch.autograd.gradcheck(attend, inputs(**case, dtype=torch.float64, grad=True))


def test_a_landmark_without_keys_leaves_gradients_as_they_are():
    q, k, v, _, f, mask, scale = inputs(n=4, length=4, mask="rows", dtype=torch.float64, grad=True)
    e = segments(4, 8).double()  # landmarks 2 and 3 begin after the fourth key
    # e itself is left out: |e| has no derivative at the zeros of the averages.
    assert torch.autograd.gradcheck(lambda *t: attend(*t[:3], e, t[3], mask, scale), (q, k, v, f))
    (grad,) = torch.autograd.grad(attend(q, k, v, e.requires_grad_(True), f, mask, scale).sum(), e)
    assert bool(torch.isfinite(grad).all())
    assert bool((grad[2:] == 0).all())


@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_the_fake_answer_has_the_shape_dtype_and_strides_of_the_real_one(case):
    args = inputs(**case)
    fake = attend(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
    real = attend(*args)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
    assert real.is_contiguous()


@pytest.mark.parametrize("case", [{}, {"mask": "rows"}, {"mask": "heads"}, {"mask": "all"}, {"mask": "additive"}],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("n", [4, 6, 8])
def test_with_identities_it_is_exact_attention_at_every_length_and_under_every_mask(case, n):
    q, k, v, _, _, mask, scale = inputs(**case, n=n, dtype=torch.float64)
    got = attend(q, k, v, torch.eye(8).double(), torch.eye(8).double(), mask, scale)
    want = exact(q, k, v, None if mask is None else mask.unsqueeze(-2), scale=scale)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [segments, strided])
def test_strides_are_exact_up_to_their_number_and_segments_are_not(make):
    q, k, v, *_ = inputs(n=4)
    e = make(4, 8)
    off = (attend(q, k, v, e, e) - exact(q, k, v)).abs().max()
    assert (float(off) < 1e-5) == (make is strided)
    assert torch.allclose(e.sum(1), torch.ones(4))  # averages


def test_a_whole_sequence_is_the_linformer_of_the_paper():
    q, k, v, e, f, _, scale = inputs(n=8, dtype=torch.float64)
    want = torch.softmax(scale * q @ (e @ k).mT, -1) @ (f @ v)
    assert torch.allclose(attend(q, k, v, e, f, None, scale), want, rtol=1e-12, atol=1e-12)
    padded = torch.ones(8, dtype=torch.bool)
    assert torch.allclose(attend(q, k, v, e, f, padded, scale), want, rtol=1e-12, atol=1e-12)


def test_padding_changes_nothing_and_a_row_of_padding_is_zero():
    q, k, v, e, f, _, scale = inputs(n=8)
    alone = attend(q[:1], k[:1, :, :5], v[:1, :, :5], e, f, None, scale)
    mask = torch.tensor([[True] * 5 + [False] * 3, [False] * 8]).unsqueeze(1)
    got = attend(q, k, v, e, f, mask, scale)
    # The same sums of 8 terms in another order, through a softmax: some 40 roundings of values below 10.
    assert torch.allclose(got[:1], alone, rtol=0, atol=40 * EPS * 10)
    assert bool((got[1] == 0).all())
    additive = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    assert torch.equal(attend(q, k, v, e, f, additive, scale), got)
    lowest = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[:1]
    assert torch.allclose(attend(q[:1], k[:1], v[:1], e, f, lowest, scale), alone, rtol=0, atol=40 * EPS * 10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_a_whole_sequence_whole(dtype):
    q, k, v, e, f, _, scale = (t.to(dtype) if isinstance(t, torch.Tensor) else t for t in inputs(n=8))
    got = attend(q, k, v, e, f, None, scale)
    want = attend(*(t.double() for t in (q, k, v, e, f)), None, scale)
    # Keys, values, logits and weights are rounded to the dtype; logits of up to 30 turn that into their error.
    assert got.dtype == dtype
    assert float((got - want).norm() / want.norm()) < 30 * torch.finfo(dtype).eps


def test_a_sequence_past_the_limit_is_an_error_that_says_what_to_do():
    with pytest.raises(InputError, match=r"has 9 keys; e and f were made for at most 8\. Shorten the inputs, or "):
        attend(*inputs(n=9))
    assert attend(*inputs(n=8)).shape == (2, 3, 5, 5)


# Which masks are about keys alone.


def kinds(gm):
    return {site.name: site.mask_kind for site in find_attention_sites(gm)}


def test_padding_masks_are_proven_and_others_are_not():
    for name in ("bert", "vit"):
        assert set(kinds(captured(name)[1]).values()) == {"keys"}
    for name in ("gpt2", "llama", "qwen3"):
        assert set(kinds(captured(name)[1]).values()) == {"causal"}
    assert set(kinds(captured("encoder")[1]).values()) == {"none"}
    assert kinds(captured("t5")[1]) == {
        "encoder.block.0.layer.0.SelfAttention": "queries",  # a bias by distance
        "encoder.block.1.layer.0.SelfAttention": "queries",
        "decoder.block.0.layer.0.SelfAttention": "causal",
        "decoder.block.0.layer.1.EncDecAttention": "keys",
        "decoder.block.1.layer.0.SelfAttention": "causal",
        "decoder.block.1.layer.1.EncDecAttention": "keys",
    }


def test_a_window_wider_than_the_example_is_still_no_padding_mask():
    config = tf.ModernBertConfig(**SMALL, **TEXT, local_attention=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                                 cls_token_id=1, sep_token_id=2)  # fmt: skip
    model = seeded(lambda: tf.ModernBertModel(config)).eval()
    example = example_of(model)
    assert example["input_ids"].shape[1] < 16  # every query sees every key here
    assert list(kinds(capture(model, example)).values()) == ["keys", "queries"]


@pytest.mark.parametrize("name", ["bert", "vit", "t5"])
def test_a_proven_mask_has_equal_rows_on_padded_batches(name):
    model, gm = captured(name)
    for site in find_attention_sites(gm):
        args, kwargs = bind_batch(gm, text_batch(model, 3, 17), 0)
        seen = {}

        class Reader(fx.Interpreter):
            def run_node(self, n, seen=seen, wanted=site.mask):
                value = super().run_node(n)
                if n is wanted:
                    seen[n] = value
                return value

        with torch.no_grad():
            Reader(gm).run(*torch.utils._pytree.tree_leaves((args, kwargs)), enable_io_processing=False)
        mask = seen[site.mask]
        same = torch.equal(mask, key_mask(mask).unsqueeze(-2).expand_as(mask))
        assert same == (site.mask_kind == "keys")


class Attention(nn.Module):
    """One attention over x (batch, n, 8) with the mask `mask(x, pad)`."""

    def __init__(self, mask, **options):
        super().__init__()
        self.mask, self.options = mask, options

    def forward(self, x, pad):
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        return exact(heads, heads, heads, self.mask(x, pad), **self.options).transpose(1, 2).flatten(2)


def padding(x, pad):
    return pad[:, None, None, :]


def filled_in_place(x, pad):
    return torch.zeros_like(pad, dtype=x.dtype).masked_fill_(~pad, -math.inf)[:, None, None]


def as_number(x, pad):
    return (1 - pad[:, None, None].to(x.dtype)) * -1e9


def future_written_in_place(x, pad):
    mask = torch.zeros(x.shape[1], x.shape[1])
    mask.masked_fill_(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1), -math.inf)
    return mask


def future_written_into_a_view(x, pad):
    mask = torch.zeros(x.shape[1], x.shape[1])
    mask[:1].masked_fill_(torch.ones(1, x.shape[1], dtype=torch.bool).triu(1), -math.inf)
    return mask


def same_segment(x, pad):
    return pad[:, None, :, None] == pad[:, None, None, :]


def from_the_input(x, pad):
    return x @ x.mT > 0


MASKS = {
    padding: "keys",
    filled_in_place: "keys",
    as_number: "keys",
    future_written_in_place: "causal",
    future_written_into_a_view: "queries",
    same_segment: "queries",
    from_the_input: "queries",
}


@pytest.mark.parametrize("mask", MASKS, ids=lambda m: m.__name__)
def test_hand_made_masks_are_told_apart(mask):
    gm = capture(Attention(mask).eval(), (torch.randn(2, 7, 8), torch.rand(2, 7) > 0.3))
    assert list(kinds(gm).values()) == [MASKS[mask]]


def test_is_causal_is_causal_without_a_mask():
    gm = capture(Attention(lambda x, pad: None, is_causal=True).eval(), (torch.randn(2, 7, 8), torch.ones(2, 7)))
    (site,) = find_attention_sites(gm)
    assert site.causal
    assert Linformer.refuses(site) == "its attention is causal: a landmark would show a query the positions after it"


def test_what_is_drawn_or_computed_by_the_row_is_not_proven():
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 4, 4, device="meta")
    for target, args in ((torch.ops.aten.bernoulli.default, (x,)), (torch.ops.aten.cumsum.default, (x, 1))):
        node = graph.call_function(target, args)
        node.meta["val"] = torch.empty(2, 4, 4, device="meta")
        assert not ignores_queries(node)


# Sites and refusals.


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


# In a model.


@cache
def sharp():
    """A BERT whose attention picks a few keys -> (model, graph). Freshly initialised, it looks at all of them alike."""
    config = tf.BertConfig(**SMALL, **TEXT, initializer_range=0.3)
    model = seeded(lambda: tf.BertModel(config)).eval()
    return model, capture(model, example_of(model))


def rewrite(gm, spec, calls=(), seed=None):
    """A copy of the graph with every attention rewritten."""
    work = gm.copy()
    for site in find_attention_sites(work):
        assert Linformer.refuses(site) is None
        if seed is None:
            tensors = spec.factor(site, observe_attention(work, site, calls))
        else:
            tensors = spec.draw(site, torch.Generator().manual_seed(seed))
        spec.at(site).apply(work, site, tensors)
    finish(work)
    own_tensors(work)
    return work


def assert_close_answers(got, want, batch):
    with torch.no_grad():
        a, b = got(**batch).last_hidden_state, want(**batch).last_hidden_state
    # Two layers of float32 sums over at most 64 terms, normalised to about 1: a few hundred roundings.
    assert float((a - b).abs().max()) < 500 * EPS


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


# The start it gets from data.


def test_the_fitted_f_is_the_least_squares_answer():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 4, generator=generator, dtype=torch.float64) for n in (12, 6, 6))
    mask = torch.tensor([[[True] * 6], [[True] * 5 + [False]]])
    samples = [AttentionSample(q, k, v, mask, None)]
    e = segments(2, 6).double()
    e_real, _, share = op.normalised(e, e, 6, mask)
    p = torch.softmax(q @ op.project(e_real, k).mT / 2 + share.log().unsqueeze(-2), -1) / share.unsqueeze(-2)
    # y = P F (w V) is linear in F: one column of the system for each of its 2 x 6 entries.
    wv = v * mask.double().unsqueeze(-1)
    system = torch.stack([(p[..., i : i + 1] * wv[..., j : j + 1, :]).flatten() for i in range(2) for j in range(6)], 1)
    target = exact(q, k, v, mask.unsqueeze(-2)).flatten()
    best = torch.linalg.lstsq(system, target.unsqueeze(1)).solution.reshape(2, 6)
    lowest = float((system @ best.flatten() - target).square().sum() / target.square().sum())
    got = fitted(e, samples, samples)
    # 12 unknowns and 16 steps: conjugate gradients are at the answer up to rounding.
    assert got.error == pytest.approx(lowest, rel=1e-9)
    assert attention_error(samples, got.e, got.f) == pytest.approx(lowest, rel=1e-9)
    assert got.error < 0.9 * attention_error(samples, e, e)


def test_data_decides_between_segments_and_strides():
    site = find_attention_sites(captured("bert")[1])[0]
    generator = torch.Generator().manual_seed(0)
    short = [AttentionSample(*(torch.randn(4, 4, 8, 8, generator=generator) for _ in range(3)), None, None)]
    made = Linformer(8).factor(site, short)
    assert torch.equal(made[E_NAME], strided(8, 64))  # exact up to 8 keys
    assert attention_error(short, made[E_NAME], made[F_NAME]) < 1e-10
    walk = torch.randn(8, 4, 64, 8, generator=generator).cumsum(-2) / 8  # neighbours are alike
    made = Linformer(8).factor(site, [AttentionSample(walk, walk, walk, None, None)])
    assert torch.equal(made[E_NAME], segments(8, 64))
    alone = Linformer(8).factor(site)
    assert torch.equal(alone[E_NAME], segments(8, 64))
    assert torch.equal(alone[F_NAME], segments(8, 64))


def test_a_full_length_stays_the_identity_whatever_the_data():
    site = find_attention_sites(captured("bert")[1])[0]
    generator = torch.Generator().manual_seed(0)
    sample = AttentionSample(*(torch.randn(4, 4, 64, 8, generator=generator) for _ in range(3)), None, None)
    made = Linformer(64).factor(site, [sample])
    assert attention_error([sample], made[E_NAME], made[F_NAME]) < (100 * EPS) ** 2


def test_a_draw_is_the_random_projection_of_the_paper():
    site = find_attention_sites(captured("bert")[1])[0]
    e, f = Linformer(16).draw(site, torch.Generator().manual_seed(0)).values()
    again, _ = Linformer(16).draw(site, torch.Generator().manual_seed(0)).values()
    assert e.shape == f.shape == (16, 64)
    assert torch.equal(e, again)
    assert not torch.equal(e, f)
    # 1024 entries: the variance is off by sqrt(2 / 1024) of itself, four of those.
    assert float(e.square().mean()) == pytest.approx(1 / 16, rel=4 * math.sqrt(2 / 1024))


def test_the_cost_grows_with_the_sequence_and_not_with_its_square():
    site = find_attention_sites(captured("bert")[1])[0]
    cost = Linformer(16).cost(site)
    batch, n = site.batch, site.size("k", -2)
    assert sympy.simplify(cost.flops - 2 * batch * 4 * 2 * n * 16 * 16) == 0
    assert cost.weight_bytes == 2 * 16 * 64 * 4
    made = Linformer(16).factor(site)
    assert sum(t.numel() * t.element_size() for t in made.values()) == cost.weight_bytes


def test_only_real_text_is_measured_and_padding_is_not():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 8, 4, generator=generator) for _ in range(3))
    mask = (torch.arange(8) < 5).expand(2, 1, 8)
    e = segments(3, 8)
    padded = attention_error([AttentionSample(q, k, v, mask, None)], e, e)
    alone = attention_error([AttentionSample(q[:, :, :5], k[:, :, :5], v[:, :, :5], None, None)], e, e)
    assert padded == pytest.approx(alone, rel=1e-5)  # float32 sums in another order


@pytest.fixture(scope="module")
def joined():
    """Sixteen sentences to a sequence: 256 tokens each, no padding."""

    def make(first, last):
        sentences = [text for text, _ in readers.sst2("train")]
        return minilm.batches([" ".join(sentences[i * 16 : i * 16 + 16]) for i in range(first, last)], 8, 256)

    return make


def test_on_minilm_the_calibrated_start_beats_segments_strides_and_chance(data, joined):
    model = data(minilm.model)
    calibration, fresh = data(joined, 0, 16), joined(100, 108)
    gm = capture(model, calibration[0])
    sites = find_attention_sites(gm)
    assert [s.max_keys for s in sites] == [512] * 6
    site, spec = sites[3], Linformer(128, 256)
    sample = observe_attention(gm, site, [bind_batch(gm, b, 0) for b in calibration])
    test = observe_attention(gm, site, [bind_batch(gm, b, 0) for b in fresh])
    made, drawn = spec.factor(site, sample), spec.draw(site, torch.Generator().manual_seed(0))
    starts = {"segments": (segments(128, 256),) * 2, "strided": (strided(128, 256),) * 2}
    starts |= {"calibrated": tuple(made.values()), "random": tuple(drawn.values())}
    errors = {name: attention_error(test, *pair) for name, pair in starts.items()}
    assert errors["calibrated"] < 0.8 * errors["segments"]
    assert errors["segments"] < errors["strided"] < errors["random"]


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
