"""Whole models as ONNX files: names, open sizes, padding, sizes on disk, what is refused. ONNX Runtime runs them."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn

import fxcompress
from benchmarks.models import data as texts
from benchmarks.models import stories, vit_mnist
from fxcompress.core.errors import ExportError
from tests.test_onnx_ops import EPS, session

BERT = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128,
        "vocab_size": 2500, "max_position_embeddings": 64}  # fmt: skip


def folder_bytes(compiled, folder):
    fxcompress.save(compiled, folder)
    return sum(file.stat().st_size for file in folder.iterdir())


def onnx_outputs(path, **inputs):
    run = session(path)
    names = [value.name for value in run.get_outputs()]
    found = run.run(None, {name: value.numpy() for name, value in inputs.items()})
    return dict(zip(names, map(torch.from_numpy, found), strict=True))


def close(got, want, products, columns, real=None):
    """Every product may be wrong by (columns + 8) eps of the largest number, in each of two programs, and a residual
    stream adds the errors of all products up. Measured: a hundredth of that; a zero that is off by half a step is 100
    times as much."""
    difference = (got - want).abs() if real is None else (got - want).abs()[real]
    assert difference.max() <= 2 * products * (columns + 8) * EPS * want.abs().max()


@pytest.fixture(scope="module")
def bert():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tf.BertModel(tf.BertConfig(**BERT)).eval()
        batches = [padded(4, 12, seed) for seed in range(4)]
    return fxcompress.compile(model, "5x", calibration=batches, rewrites=["quantize", "low_rank"], progress=False)


def padded(batch, length, seed):
    """Ids and masks of sentences of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 2500, (batch, length), generator=generator)
    lengths = torch.randint(length // 2, length + 1, (batch, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def test_a_padded_bert_answers_at_every_size_with_the_models_names(bert, tmp_path):
    path = tmp_path / "bert.onnx"
    fxcompress.export_onnx(bert, path)
    run = session(path)
    shapes = {v.name: v.shape for v in run.get_inputs()}
    assert shapes.keys() == {"input_ids", "attention_mask", "token_type_ids"}
    assert shapes["input_ids"] == ["batch", "sequence"]
    assert [v.name for v in run.get_outputs()] == ["last_hidden_state", "pooler_output"]
    for batch, length in ((4, 12), (1, 12), (3, 1), (7, 64), (1, 1)):
        inputs = padded(batch, length, batch)
        inputs["attention_mask"][:, 0] = 1
        with torch.no_grad():
            want = bert(**inputs)
        got = onnx_outputs(path, **inputs)
        close(got["last_hidden_state"], want.last_hidden_state, 12, 128, inputs["attention_mask"].bool())
        close(got["pooler_output"], want.pooler_output, 13, 128)
    assert path.stat().st_size < 1.15 * folder_bytes(bert, tmp_path / "folder")


def test_stories_at_4x(data, tmp_path):
    """Shares its table with the head, in 4 bits or fewer; the loss is the compiled graph's."""
    model = data(stories.model)
    batches = data(stories.batches, texts.tinystories()[:120])
    compiled = fxcompress.compile(
        model, "4x", calibration=[{"input_ids": b} for b in batches[:3]], rewrites=["quantize"], progress=False
    )
    path = tmp_path / "stories.onnx"
    fxcompress.export_onnx(compiled, path)
    ids = batches[3][:5, :41]
    with torch.no_grad():
        want = compiled(input_ids=ids).logits
    got = onnx_outputs(path, input_ids=ids)["logits"]
    close(got, want, 36, 172)
    assert path.stat().st_size < 1.2 * folder_bytes(compiled, tmp_path / "folder")


def test_vit(data, tmp_path):
    model = data(vit_mnist.model)
    images, labels = data(texts.mnist, 400)
    inputs = vit_mnist.normalise(images)
    rewrites = ["quantize", "low_rank", "prune"]
    compiled = fxcompress.compile(
        model, "5x", calibration=list(inputs[:96].split(32)), rewrites=rewrites, progress=False
    )
    path = tmp_path / "vit.onnx"
    fxcompress.export_onnx(compiled, path)
    with torch.no_grad():
        want = compiled(inputs)
    got = onnx_outputs(path, images=inputs)["output"]
    close(got, want, 27, 128)
    assert torch.equal(got.argmax(1), want.argmax(1))
    assert float((got.argmax(1) == labels).float().mean()) > 0.9
    assert path.stat().st_size < 1.2 * folder_bytes(compiled, tmp_path / "folder")


class Pair(nn.Module):
    """Two inputs, a dict of outputs, one of which has the name of an input."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, a, b):
        return {"a": self.left(a) + self.right(b), "scores": torch.relu(self.right(a))}


@pytest.fixture(scope="module")
def pair():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        example = (torch.randn(4, 64), torch.randn(4, 64))
        return fxcompress.compile(Pair().eval(), "4x", calibration=[example] * 3, progress=False)


def test_outputs_keep_their_names_and_inputs_come_first(pair, tmp_path):
    fxcompress.export_onnx(pair, tmp_path / "pair.onnx")
    a, b = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = pair(a, b)
    got = onnx_outputs(tmp_path / "pair.onnx", a=a, b=b)
    assert set(got) == {"a_output", "scores"}
    close(got["scores"], want["scores"], 1, 64)
    close(got["a_output"], want["a"], 2, 64)


def test_what_was_saved_exports_to_the_same_file(pair, tmp_path):
    fxcompress.save(pair, tmp_path / "folder")
    fxcompress.export_onnx(pair, tmp_path / "pair.onnx")
    fxcompress.export_onnx(fxcompress.load(tmp_path / "folder"), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "pair.onnx").read_bytes()


def test_the_module_stays_as_it_was(pair, tmp_path):
    before = {name: tensor.clone() for name, tensor in pair.state_dict().items()}
    text, state = pair.code, torch.random.get_rng_state()
    fxcompress.export_onnx(pair, tmp_path / "pair.onnx")
    assert pair.code == text
    assert torch.equal(torch.random.get_rng_state(), state)
    after = pair.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_existing_file_is_refused_and_left_alone(pair, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("mine")
    with pytest.raises(ExportError, match=r"model\.onnx exists already; choose a new file or remove it first\."):
        fxcompress.export_onnx(pair, path)
    assert path.read_text() == "mine"


def test_what_is_no_compressed_graph_is_refused(pair, tmp_path):
    with pytest.raises(ExportError, match=r"takes what fxcompress\.compile, .* returned, not a Linear"):
        fxcompress.export_onnx(nn.Linear(2, 2), tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="a lowered module fits this machine alone; export the compiled one"):
        fxcompress.export_onnx(fxcompress.lower(pair, "eager"), tmp_path / "model.onnx")


class Bessel(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, x):
        return torch.special.bessel_j0(self.inner(x))


def test_an_operator_that_onnx_lacks_is_named(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        compiled = fxcompress.restructure(
            Bessel(), {"*": "quantize{bits=8, group_size=0}"}, example_inputs=(torch.randn(4, 64),), progress=False
        )
    with pytest.raises(ExportError, match=r"ONNX has no word for aten\.special_bessel_j0\.default at .*torch\.onnx .* "
                                          r"does not translate it\. Write that line"):  # fmt: skip
        fxcompress.export_onnx(compiled, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_too_large_for_onnx_is_refused(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("fxcompress.onnx_export.LARGEST", 1000)
    with pytest.raises(ExportError, match=r"the file would have [\d,]+ bytes and ONNX files have at most 1,000"):
        fxcompress.export_onnx(pair, tmp_path / "model.onnx")


def test_without_the_packages_it_says_what_to_install(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"ONNX files need onnx, .*: pip install 'fxcompress\[onnx\]'"):
        fxcompress.export_onnx(pair, tmp_path / "model.onnx")


def test_a_place_that_cannot_be_written_leaves_nothing(pair, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ExportError, match="could not be written"):
        fxcompress.export_onnx(pair, tmp_path / "file" / "model.onnx")
