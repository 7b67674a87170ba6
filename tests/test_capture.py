"""Capture: the graph says bit for bit what the model says, takes the calls the model takes, and leaves it alone."""

import copy
import inspect
import itertools
from functools import cache

import pytest
import torch
import transformers as tf
from torch import nn

import fxcompress
from fxcompress.core.capture import capture, example_of
from fxcompress.core.errors import CaptureError, InputError
from fxcompress.core.site import find_sites

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"vocab_size": 120, "max_position_embeddings": 64}
NO_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

HF = {
    "bert": lambda: tf.BertModel(tf.BertConfig(**SMALL, **TEXT)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=120, n_embd=32, n_layer=2, n_head=4, n_positions=64, **NO_IDS)
    ),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, **TEXT, num_key_value_heads=2, **NO_IDS)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SMALL, **TEXT, num_key_value_heads=2, head_dim=8, **NO_IDS)),
    "vit": lambda: tf.ViTModel(tf.ViTConfig(**SMALL, image_size=16, patch_size=4)),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=120, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    ),
}


class SmallConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(16, 12), nn.Linear(8, 12)

    def forward(self, a, b):
        return self.left(a) - self.right(b)


PLAIN = {
    "mlp": (lambda: nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)), lambda n, _: torch.randn(n, 16)),
    "conv": (SmallConv, lambda n, _: torch.randn(n, 3, 12, 12)),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2),
        lambda n, length: torch.randn(n, length, 32),
    ),
}


def seeded(make):
    torch.manual_seed(0)
    return make()


@cache
def captured(name):
    """-> (model in eval mode, its graph)."""
    torch.manual_seed(0)
    if name in HF:
        model = HF[name]().eval()
        return model, capture(model, example_of(model))
    make, inputs = PLAIN[name]
    model = make().eval()
    return model, capture(model, (inputs(2, 7),))


def text_batch(model, size, length):
    """What `example_of` gives, at another size, with padding at the end of the first row."""
    generator = torch.Generator().manual_seed(size * 100 + length)
    made = {}
    for name, value in example_of(model).items():
        if name == "pixel_values":
            made[name] = torch.randn(size, *value.shape[1:], generator=generator)
        elif name == "attention_mask":
            made[name] = torch.ones(size, length, dtype=torch.int64)
            made[name][0, length - length // 3 :] = 0
        elif name == "token_type_ids":
            made[name] = torch.randint(0, 2, (size, length), generator=generator)
        else:
            made[name] = torch.randint(3, 120, (size, length), generator=generator)
    return made


def answer(model, batch):
    """The model's own output with the key-value cache off, as capture promises it."""
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        return model(**batch, **extra)


def assert_same_output(got, want):
    assert type(got) is type(want)
    assert list(got.keys()) == list(want.keys())
    for key in want:
        assert torch.equal(got[key], want[key]), key


@pytest.mark.parametrize("name", HF)
def test_a_hugging_face_graph_is_bit_identical_at_the_captured_size(name):
    model, gm = captured(name)
    batch = example_of(model)
    with torch.no_grad():
        assert_same_output(gm(**batch), answer(model, batch))


@pytest.mark.parametrize(("size", "length"), [(1, 11), (3, 11), (2, 5), (1, 23), (5, 17)])
@pytest.mark.parametrize("name", HF)
def test_a_hugging_face_graph_is_bit_identical_at_other_sizes(name, size, length):
    model, gm = captured(name)
    batch = text_batch(model, size, length)
    with torch.no_grad():
        assert_same_output(gm(**batch), answer(model, batch))


@pytest.mark.parametrize(("size", "length"), [(2, 7), (1, 7), (5, 7), (1, 3), (4, 19)])
@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_graph_is_bit_identical_at_every_size(name, size, length):
    model, gm = captured(name)
    torch.manual_seed(size)
    x = PLAIN[name][1](size, length)
    want = model(x)  # with gradients on: without, nn.TransformerEncoder takes a fused path of its own (next test)
    got = gm(x)
    assert torch.equal(got, want)
    assert type(got) is type(want)


def test_the_fused_fast_path_of_the_encoder_differs_by_rounding_only():
    model, gm = captured("encoder")
    torch.manual_seed(3)
    x = PLAIN["encoder"][1](3, 7)
    with torch.no_grad():
        fast, got = model(x), gm(x)
    # Outputs are layer-normed; two layers of sums of at most 64 terms, each 64 roundings of 2^-24 at worst.
    torch.testing.assert_close(got, fast, rtol=0, atol=2 * 64 * 2**-24 * float(fast.abs().max()))


def test_a_single_example_still_gives_a_dynamic_batch():
    model = seeded(PLAIN["mlp"][0]).eval()
    gm = capture(model, (torch.randn(1, 16),))
    x = torch.randn(6, 16)
    with torch.no_grad():
        assert torch.equal(gm(x), model(x))


def test_gpt2_conv1d_weights_are_sites_read_transposed():
    model, gm = captured("gpt2")
    sites = {s.name: s for s in find_sites(gm)}
    for layer, (name, rows) in itertools.product(
        range(2), [("attn.c_attn", 96), ("attn.c_proj", 32), ("mlp.c_fc", 128)]
    ):
        site = sites[f"transformer.h.{layer}.{name}"]
        own = model.get_submodule(f"transformer.h.{layer}.{name}").weight
        assert (site.rows, site.columns, site.transposed) == (rows, 32, True)
        assert torch.equal(site.weight, own.t())


def test_a_tied_weight_is_one_site_with_two_kinds_of_use():
    _, gm = captured("gpt2")
    tied = [s for s in find_sites(gm) if s.kind == "tied"]
    assert len(tied) == 1
    assert {use.kind for use in tied[0].uses} == {"embedding", "linear"}
    assert (tied[0].rows, tied[0].columns) == (120, 32)


@pytest.mark.parametrize("name", HF)
def test_every_linear_weight_of_a_hugging_face_model_is_a_site(name):
    model, gm = captured(name)
    kinds = (nn.Linear, nn.Embedding, nn.Conv2d, tf.pytorch_utils.Conv1D)
    owned = {id(m.weight) for m in model.modules() if isinstance(m, kinds)}
    found = {id(p) for s in find_sites(gm) for p in [dict(gm.named_parameters(remove_duplicate=False))[s.paths[0]]]}
    assert found == owned


def test_positional_keyword_and_mixed_calls_in_any_order_agree():
    model = seeded(TwoInputs).eval()
    a, b = torch.randn(3, 16), torch.randn(3, 8)
    want = model(a, b)
    for gm in (capture(model, (a, b)), capture(model, {"a": a, "b": b}), capture(model, {"b": b, "a": a})):
        for got in (gm(a, b), gm(a=a, b=b), gm(b=b, a=a), gm(a, b=b)):
            assert torch.equal(got, want)


def test_bert_takes_positions_in_the_order_of_its_own_forward():
    model, gm = captured("bert")
    batch = text_batch(model, 3, 9)
    want = answer(model, batch)
    with torch.no_grad():
        positional = gm(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
        assert_same_output(positional, want)
        for order in itertools.permutations(batch):
            assert_same_output(gm(**{name: batch[name] for name in order}), want)


def test_a_missing_attention_mask_means_all_ones_and_missing_segments_zeros():
    model, gm = captured("bert")
    ids = text_batch(model, 3, 9)["input_ids"]
    with torch.no_grad():
        want = model(input_ids=ids)
        assert_same_output(gm(input_ids=ids), want)
        assert_same_output(gm(ids), want)
        assert_same_output(gm(ids, attention_mask=None), want)


def test_a_deep_copy_keeps_the_call_checks_and_the_bits():
    model, gm = captured("bert")
    twin = copy.deepcopy(gm)
    ids = text_batch(model, 2, 9)["input_ids"]
    with torch.no_grad():
        assert_same_output(twin(ids), gm(ids))
    with pytest.raises(InputError, match="'input_ids' is float32; int64 is wanted"):
        twin(ids.float())


def test_a_copy_shares_the_tensors_and_not_the_graph():
    _, gm = captured("mlp")
    twin = gm.copy()
    assert twin.graph is not gm.graph
    assert [id(p) for p in twin.parameters()] == [id(p) for p in gm.parameters()]


IDS = torch.ones(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"input_ids": torch.ones(2, 5)}, "'input_ids' is float32; int64 is wanted"),
        ({"input_ids": torch.ones(5, dtype=torch.int64)}, r"'input_ids' has shape \(5,\); 2 dimensions are wanted"),
        ({"input_ids": torch.ones(2, 65, dtype=torch.int64)}, "size 65 in dimension 1; it was captured for 1 to 64"),
        (
            {"input_ids": "text", "attention_mask": IDS, "token_type_ids": IDS},
            "'input_ids' is a str; a int64 tensor is wanted",
        ),
        (
            {"input_ids": [[1, 2]], "attention_mask": IDS, "token_type_ids": IDS},
            "inputs hold 4 values.*captured with 3",
        ),
        ({"input_ids": IDS, "labels": torch.ones(2)}, "has no place for labels"),
        ({"attention_mask": IDS}, "lacks input_ids, token_type_ids"),
    ],
    ids=["dtype", "rank", "length", "text", "list", "unknown keyword", "missing"],
)
def test_a_call_that_does_not_fit_is_refused_by_name(call, message):
    _, gm = captured("bert")
    with pytest.raises(InputError, match=message):
        gm(**call)


def test_too_many_positions_are_refused():
    _, gm = captured("mlp")
    x = torch.randn(2, 16)
    with pytest.raises(InputError, match="2 positional inputs were given"):
        gm(x, x)


def test_a_fixed_dimension_states_what_was_captured():
    _, gm = captured("mlp")
    with pytest.raises(InputError, match="has size 15 in dimension 1; it was captured for 16"):
        gm(torch.randn(2, 15))


def test_masks_of_another_length_are_refused_with_both_lengths():
    _, gm = captured("bert")
    mask = torch.ones(2, 6, dtype=torch.int64)
    with pytest.raises(InputError, match="'attention_mask' has size 6 in dimension 1 where 'input_ids' has 5"):
        gm(input_ids=IDS, attention_mask=mask)


def test_a_model_that_is_not_hugging_face_must_come_with_inputs():
    with pytest.raises(CaptureError, match=r"Sequential is not a Hugging Face model.*pass example_inputs"):
        fxcompress.compile(nn.Sequential(nn.Linear(4, 4)), "2x", progress=False)


def test_empty_example_inputs_are_refused():
    with pytest.raises(CaptureError, match="example_inputs is empty"):
        capture(nn.Linear(4, 4), ())


@pytest.fixture(scope="module")
def compiled_gpt2():
    """-> (model before, model after, torch's state before and after, compiled). In training mode with its cache on."""
    torch.manual_seed(0)
    model = HF["gpt2"]().train()
    model.transformer.h[1].eval()  # a mixed mode must come back mixed
    model.requires_grad_(True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    settings = torch_state()
    compiled = fxcompress.compile(model, "2x", progress=False)
    return model, before, modes, settings, torch_state(), compiled


def torch_state():
    return {
        "random state": torch.random.get_rng_state().tolist(),
        "default dtype": torch.get_default_dtype(),
        "grad enabled": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def test_compile_leaves_the_callers_model_as_it_was(compiled_gpt2):
    model, before, modes, _, _, compiled = compiled_gpt2
    assert [m.training for m in model.modules()] == modes
    assert model.config.use_cache is True
    assert all(p.requires_grad for p in model.parameters())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    shared = {t.data_ptr() for t in model.parameters()} & {t.data_ptr() for t in compiled.parameters()}
    assert not shared


def test_compile_leaves_torchs_settings_and_random_state_alone(compiled_gpt2):
    _, _, _, before, after, _ = compiled_gpt2
    assert before == after
