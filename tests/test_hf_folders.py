"""save_pretrained and from_pretrained of compressed models, and the libraries that stand on them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM

import fxcompress
from benchmarks.models import data as readers
from benchmarks.models import minilm, stories
from fxcompress.core.errors import CaptureError, CheckpointError
from fxcompress.leaves import Compressed
from fxcompress.read_back import ReadsBack
from tests.hf_models import (
    Pretrained,
    bert,
    gemma,
    gpt2,
    ids,
    inputs_of,
    llama,
    logits,
    mixtral,
    small,
    t5,
    vit,
)
from tests.test_module_mode import IDS, compiled_or_smaller


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = small(llama())
    folder = tmp_path_factory.mktemp("hf") / "llama"
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def nan_in_new_memory():
    """What is not filled is seen: torch.empty may give what happens to be right."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_in_new_memory")
@pytest.mark.parametrize("make", [llama, mixtral, bert, t5, gpt2, gemma, vit], ids=lambda make: make.__name__)
def test_a_loaded_model_has_the_same_bits_and_is_saved_again_as_it_was(make, tmp_path):
    model = small(make())
    model.save_pretrained(tmp_path / "a")
    loaded, told = type(model).from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(told.values())  # nothing missing, unexpected or mismatched
    assert torch.equal(logits(loaded), logits(model))
    leaves = {name: m.spec for name, m in model.named_modules() if isinstance(m, Compressed)}
    assert len(leaves) > 2
    assert make is not gemma or "model.embed_tokens" in leaves
    assert any(isinstance(m, ReadsBack) for m in loaded.modules()) == (make is mixtral)
    assert {name: m.spec for name, m in loaded.named_modules() if isinstance(m, Compressed)} == leaves
    loaded.save_pretrained(tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    "rewrites",
    [
        ["low_rank", "quantize"], ["block_low_rank"], ["monarch"], ["tensor_train"], ["prune"], ["prune_2_4"],
        ["prune_blocks", "quantize"], ["float8"], ["int8_dynamic"], ["quantize_residual"], ["quaternion"],
    ],
    ids="+".join,
)  # fmt: skip
def test_every_family_is_loaded_with_its_sizes(rewrites, tmp_path):
    """Ranks, kept elements and bits differ from leaf to leaf; the folder says which."""
    base = Pretrained(transformers.PreTrainedConfig()).eval()
    model = fxcompress.apply(base, compiled_or_smaller(base, "2x" if rewrites == ["float8"] else "1.5x", rewrites))
    assert any(isinstance(m, Compressed) for m in model.modules())
    model.save_pretrained(tmp_path / "x")
    with torch.no_grad():
        assert torch.equal(Pretrained.from_pretrained(tmp_path / "x")(IDS), model(IDS))


def test_shards_load_alike(saved, tmp_path):
    model, _ = saved
    model.save_pretrained(tmp_path / "x", max_shard_size="50KB")
    assert len([*(tmp_path / "x").glob("*.safetensors")]) > 3
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "x")), logits(model))


def test_a_model_loads_without_its_head_and_under_another(saved):
    model, folder = saved
    with torch.no_grad():
        wanted = model.model(ids(2, 8)).last_hidden_state
        assert torch.equal(AutoModel.from_pretrained(folder)(ids(2, 8)).last_hidden_state, wanted)
        classifier = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        assert torch.equal(classifier.model(ids(2, 8)).last_hidden_state, wanted)


def test_the_inner_model_alone_can_be_saved(saved, tmp_path):
    model, _ = saved
    model.model.save_pretrained(tmp_path / "x")
    with torch.no_grad():
        loaded = AutoModel.from_pretrained(tmp_path / "x")
        assert torch.equal(loaded(ids(2, 8)).last_hidden_state, model.model(ids(2, 8)).last_hidden_state)


def test_a_table_and_its_head_share_one_tensor_after_loading(saved):
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    table, head = loaded.model.embed_tokens, loaded.lm_head
    assert isinstance(table, Compressed)
    assert {n: t.data_ptr() for n, t in table.tensors.items()} == {n: t.data_ptr() for n, t in head.tensors.items()}
    loaded.tie_weights()  # as transformers does on many occasions: nothing to do
    assert torch.equal(logits(loaded), logits(model))


def test_a_half_precision_model_keeps_its_dtype(tmp_path):
    model = small(llama(dtype=torch.bfloat16))
    model.save_pretrained(tmp_path / "x")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype=torch.float32)), logits(model))


def test_another_dtype_is_told_and_not_taken(saved, caplog):
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    assert "loaded in torch.float32, as it was compressed: torch.float16 was asked for" in caplog.text
    assert torch.equal(logits(loaded), logits(model))


def test_no_dense_weight_is_ever_made(saved, monkeypatch):
    _, folder = saved
    before: list[torch.Tensor] = []
    swap = fxcompress.pretrained.swap
    monkeypatch.setattr(
        fxcompress.pretrained, "swap", lambda m, *rest: (before.append(m._parameters["weight"]), swap(m, *rest))
    )
    AutoModelForCausalLM.from_pretrained(folder)
    assert len(before) > 5
    assert all(weight.is_meta for weight in before)


def test_a_new_process_needs_only_the_import(saved):
    model, folder = saved
    code = (
        "import sys, torch, fxcompress\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "y = model(torch.tensor([[5, 6, 7, 8]])).logits.double().sum(); print(repr(float(y)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    with torch.no_grad():
        assert float(done.stdout) == float(model(torch.tensor([[5, 6, 7, 8]])).logits.double().sum())


def test_a_graph_that_was_saved_gives_the_same_folder(saved, tmp_path):
    base = llama()
    compiled = fxcompress.compile(
        base, "2.5x", calibration=[inputs_of(base)] * 2, rewrites=["quantize", "quantize_rows", "low_rank"],
        progress=False,
    )  # fmt: skip
    fxcompress.save(compiled, tmp_path / "graph")
    fxcompress.apply(base, fxcompress.load(tmp_path / "graph")).save_pretrained(tmp_path / "hf")
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (saved[1] / "model.safetensors").read_bytes()


@pytest.fixture
def copy_of(saved, tmp_path):
    """copy_of(edit): the folder with config.json's quantization_config as `edit` leaves it."""

    def make(edit=lambda told: None):
        folder = tmp_path / "copy"
        folder.mkdir()
        for file in saved[1].iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        edit(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def first_leaf(told):
    return next(leaf for path, leaf in told["leaves"].items() if path.endswith("down_proj"))


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda t: t.update(format=9), "describes compressed weights in format 9; this version of fxcompress reads f"),
        (lambda t: t.pop("leaves"), 'no description of compressed weights: quantization_config holds no "leaves"'),
        (lambda t: t.update(dtype="float33"), "says that answers are 'float33', which is no dtype"),
        (lambda t: first_leaf(t).update(rewrite="zip{level=9}"), r"keeps .*down_proj as 'zip\{level=9\}', which does"),
        (lambda t: first_leaf(t)["tensors"].popitem(), r"keeps .*down_proj as .*, which does not fit a Linear of 128"),
        (lambda t: first_leaf(t)["tensors"].update(codes="os.system 1"), "'os.system 1' is no dtype and shape"),
        (lambda t: first_leaf(t).update(sha256="0"), r"tensors of .*down_proj are not those that were saved \(SHA-256"),
        (
            lambda t: t.update(leaves={"encoder.other": first_leaf(t)}),
            "compressed weight at encoder.other, and LlamaForCausalLM has no such module: config.json is damaged",
        ),
        (
            lambda t: t["leaves"].update({"model.norm": first_leaf(t)}),
            "compressed weight at model.norm, and LlamaForCausalLM has a LlamaRMSNorm there",
        ),
    ],
)  # fmt: skip
def test_a_damaged_config_is_refused_in_a_sentence(copy_of, edit, text):
    with pytest.raises((CheckpointError, RuntimeError), match=text):
        AutoModelForCausalLM.from_pretrained(copy_of(edit))


def test_a_damaged_or_cut_file_is_refused_in_a_sentence(copy_of, saved):
    folder = copy_of()
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated or damaged .*; restore the folder"):
        AutoModelForCausalLM.from_pretrained(folder)
    tensors = safetensors.torch.load(whole)
    name = next(name for name in tensors if name.endswith("down_proj.codes"))
    tensors[name].view(-1)[7] ^= 1
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"the tensors of {name.removesuffix('.codes')} are not those that were"):
        AutoModelForCausalLM.from_pretrained(folder)
    del tensors[name]
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"down_proj are not those that were saved"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda t: t.update(matrix="7x3"), r"what model.layers.0.mlp.experts reads back, which does not fit Mixtr"),
        (lambda t: t.update(rewrite="zip"), r"reads back, which does not fit MixtralForCausalLM \(.*zip"),
        (lambda t: t.update(sha256="0"), r"the tensors of model.layers.0.mlp.experts are not those that were saved"),
    ],
)
def test_damaged_experts_are_refused(edit, text, tmp_path):
    base = mixtral()
    compiled = fxcompress.compile(base, "3x", example_inputs=inputs_of(base), rewrites=["quantize"], progress=False)
    fxcompress.apply(base, compiled).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    told = config["quantization_config"]["leaves"]["model.layers.0.mlp.experts"]["read_back"]
    edit(next(iter(told.values())))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=text):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_sizes_that_differ_from_the_files_are_refused_by_name(copy_of, caplog):
    folder = copy_of(lambda told: first_leaf(told)["tensors"].update(codes="uint8 3x3"))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert "down_proj.codes | MISMATCH | Reinit due to size mismatch - ckpt: torch.Size([128, 256])" in caplog.text


def test_from_pretrained_does_not_pretend_to_compress(tmp_path):
    llama().save_pretrained(tmp_path / "x")
    config = fxcompress.hf_quantizer.FxcompressConfig({})
    with pytest.raises(CheckpointError, match=r"from_pretrained does not compress: call fxcompress.compile and fxcomp"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "x", quantization_config=config)


def test_a_compressed_model_is_not_compressed_again(saved):
    model, folder = saved
    for twice in (model, AutoModelForCausalLM.from_pretrained(folder)):
        with pytest.raises(CaptureError, match=r"compressed already \(model.embed_tokens is a CompressedEmb.*give the"):
            fxcompress.compile(twice, "2x", example_inputs=inputs_of(twice), progress=False)


def test_the_original_is_not_touched_by_any_of_it():
    model = llama()
    small(model)
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")


def test_a_text_generation_pipeline_takes_a_loaded_model(data, tmp_path):
    base = data(stories.model)
    batches = [{"input_ids": i} for i in stories.batches(readers.tinystories(60_000, 200_000))][:4]
    model = fxcompress.apply(base, fxcompress.compile(base, "4x", calibration=batches, progress=False))
    model.save_pretrained(tmp_path / "x")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    start = torch.tensor([[stories.BOS]])
    wanted = model.generate(start, max_new_tokens=60, do_sample=False)
    assert torch.equal(loaded.generate(start, max_new_tokens=60, do_sample=False), wanted)
    assert stories.Tokenizer().decode(wanted[0].tolist()).startswith("Once upon a time")


def test_a_sentence_transformer_is_saved_and_loaded_as_ever(data, tmp_path):
    from sentence_transformers import SentenceTransformer

    texts = [text for text, _ in data(readers.sst2, "dev")]
    encoder = SentenceTransformer(minilm._folder(), device="cpu")
    model = encoder[0].model
    compiled = fxcompress.compile(
        model, "4x", calibration=minilm.batches(texts[:64]), rewrites=["quantize"], progress=False
    )
    before = encoder.encode(texts[64:96])
    encoder[0].model = fxcompress.apply(model, compiled)
    after = encoder.encode(texts[64:96])
    encoder.save_pretrained(str(tmp_path / "x"))
    weights = sum(f.stat().st_size for f in (tmp_path / "x").rglob("*.safetensors"))
    assert weights < compiled.report.measured_bytes  # which counts the graph, too
    loaded = SentenceTransformer(str(tmp_path / "x"), device="cpu").encode(texts[64:96])
    batch = minilm.batches(texts[64:72])[0]
    with torch.no_grad():
        wanted = compiled(**batch).last_hidden_state
        assert torch.equal(encoder[0].model(**batch).last_hidden_state, wanted)
    assert (loaded == after).all()
    # Bits of 4x are at most 8, at least 4 on average; the README's 4x has a mean cosine of .9998.
    assert (before * after).sum(1).min() > 0.99


def test_adapters_train_on_a_compressed_model_and_load_onto_it(saved, tmp_path):
    """PEFT, through Trainer: the loss falls, nothing compressed moves, and the adapter loads."""
    import peft

    _, folder = saved
    base = AutoModelForCausalLM.from_pretrained(folder)
    frozen = {name: t.clone() for name, t in base.state_dict().items()}
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    model = peft.get_peft_model(base, settings)
    rows = [{"input_ids": row, "labels": row} for row in ids(8, 16)]
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(tmp_path / "run"), max_steps=30, per_device_train_batch_size=8, learning_rate=1e-2, use_cpu=True,
            report_to=[], save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=rows,
    )  # fmt: skip
    first = trainer.evaluate(rows)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] < 0.9 * first
    held = {k.replace("base_model.model.", "").replace(".base_layer", ""): v for k, v in model.state_dict().items()}
    assert all(torch.equal(held[name], tensor) for name, tensor in frozen.items())
    model.eval().save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(ids(2, 8)).logits, model(ids(2, 8)).logits)


def test_trainer_evaluates_and_trains_what_is_not_compressed(saved, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved[1])
    rows = [{"input_ids": row, "labels": row} for row in ids(8, 16)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=5, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    with torch.no_grad():
        wanted = model(ids(8, 16), labels=ids(8, 16)).loss.item()
    # One mean of 120 losses against another order of the same sum: a few float32 roundings.
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(wanted, rel=1e-6)
    trainer.train()
