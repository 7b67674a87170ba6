"""`fxcompress eval`, run as a user runs it, on a classifier that `fxcompress compress` made smaller."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

import fxcompress
from fxcompress.cli import main
from fxcompress.hf import load_model, load_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(60))]
LINES = [" ".join(f"word{(i * j) % 60}" for j in range(3, 7 + i % 5)) for i in range(48)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """model, an encoder of the same kind, the classifier at 2x, and tasks."""
    root = tmp_path_factory.mktemp("eval")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(**small, vocab_size=len(WORDS), id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    classifier = BertForSequenceClassification(config).eval()
    classifier.classifier.weight.data.normal_(0, 1)
    for name, model in (("model", classifier), ("encoder", BertModel(config).eval())):
        model.save_pretrained(root / name)
    BertModel(config).save_pretrained(root / "bare")
    (root / "vocab.txt").write_text("\n".join(WORDS))
    for name in ("model", "encoder"):
        BertTokenizerFast(str(root / "vocab.txt")).save_pretrained(root / name)
    labels = ["good" if i % 3 else "bad" for i in range(len(LINES))]
    (root / "named.tsv").write_text("".join(f"{line}\t{label}\n" for line, label in zip(LINES, labels)))
    (root / "task.tsv").write_text("".join(f"{line}\t{int(label == 'good')}\n" for line, label in zip(LINES, labels)))
    pairs = [f"x\t{(7 * i) % 5}\t{LINES[i]}\t{LINES[i + 24]}\n" for i in range(24)]
    (root / "pairs.tsv").write_text("".join(pairs))
    (root / "text.txt").write_text("\n".join(LINES))
    told = ["compress", str(root / "model"), "--budget", "2x", "--rewrites", "quantize", "--quiet"]
    assert main([*told, "--out", str(root / "small")]) == 0
    return root


def run(capsys, folders: Path, *arguments: str) -> str:
    capsys.readouterr()
    assert main(["eval", *(a.format(at=folders) for a in arguments), "--quiet"]) == 0
    return str(capsys.readouterr().out)


def test_a_compressed_classifier_beside_its_original(folders: Path, capsys):
    arguments = ["{at}/small", "--original", "{at}/model", "--task", "{at}/task.tsv"]
    printed = run(capsys, folders, *arguments)
    assert printed.startswith("classification: 48 texts; the largest of the model's logits\n")
    assert "original - compressed" in printed
    named = ["{at}/named.tsv", "--kind", "classification", "--json"]
    told = json.loads(run(capsys, folders, *arguments[:-1], *named))
    task, tokenizer = fxcompress.read_task(folders / "task.tsv"), load_tokenizer(folders / "model")
    small, model = fxcompress.load(folders / "small"), load_model(folders / "model")
    found = fxcompress.evaluate(small, task, tokenizer, original=model, progress=False)
    assert told == json.loads(json.dumps(found.to_json()))
    assert found.measures[0].difference is not None


def test_one_column_where_there_is_no_original(folders: Path, capsys):
    small = run(capsys, folders, "{at}/small", "--tokenizer", "{at}/model", "--task", "{at}/task.tsv")
    plain = run(capsys, folders, "{at}/model", "--task", "{at}/task.tsv", "--examples", "20")
    assert "original" not in small + plain
    assert plain.startswith("classification: 20 texts")


def test_similarity_by_columns_and_a_head_that_is_fitted_kept_and_read(folders: Path, capsys):
    printed = run(capsys, folders, "{at}/encoder", "--task", "{at}/pairs.tsv", "--columns", "1,2,3")
    assert printed.startswith("similarity: 24 pairs; cosine of mean-pooled last hidden states")
    on = ["{at}/encoder", "--task", "{at}/task.tsv"]
    fitted = run(capsys, folders, *on, "--fit-head", "{at}/task.tsv", "--save-head", "{at}/head.safetensors")
    assert "a linear head on mean-pooled last hidden states" in fitted
    assert run(capsys, folders, *on, "--head", "{at}/head.safetensors") == fitted


def test_the_folders_are_left_as_they_were(folders: Path, capsys):
    before = {path: path.read_bytes() for path in sorted(folders.rglob("*")) if path.is_file()}
    run(capsys, folders, "{at}/small", "--original", "{at}/model", "--task", "{at}/task.tsv", "--examples", "12")
    assert {path: path.read_bytes() for path in sorted(folders.rglob("*")) if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["{at}/small", "--task", "{at}/task.tsv"], "small holds no tokenizer: give --original, the folder that it"),
        (["{at}/bare", "--task", "{at}/pairs.tsv", "--columns", "1,2,3"], "bare holds no tokenizer: give --original"),
        (["{at}/none", "--task", "{at}/task.tsv"], "holds neither fxcompress.json nor config.json"),
        (["{at}/model", "--task", "{at}/none.tsv"], "none.tsv cannot be read"),
        (["{at}/model", "--task", "{at}/named.tsv"], "has 2 fields in most lines, which does not say what it is"),
        (["{at}/model", "--task", "{at}/task.tsv", "--examples", "0"], "--examples 0: 1 or more are wanted"),
        (["{at}/model", "--task", "{at}/task.tsv", "--examples", "4"], "4 examples are too few for an interval"),
        (["{at}/model", "--task", "{at}/text.txt", "--examples", "4"], "--examples counts documents here"),
        (["{at}/encoder", "--task", "{at}/task.tsv"], "a class is told by logits"),
        (["{at}/model", "--task", "{at}/pairs.tsv", "--columns", "1,2,3", "--head", "x"], "--head and --fit-head are"),
        (["{at}/encoder", "--task", "{at}/task.tsv", "--save-head", "x"], "--save-head writes what --fit-head fits"),
        (["{at}/encoder", "--task", "{at}/task.tsv", "--head", "x", "--fit-head", "y"], "give either --head or"),
        (["{at}/model", "--task", "{at}/task.tsv", "--tokenizer", "{at}/bare"], "bare holds no tokenizer: no vocab"),
    ],
)
def test_every_failure_is_one_line(folders: Path, capsys, arguments, complaint):
    capsys.readouterr()
    assert main(["eval", *(a.format(at=folders) for a in arguments), "--quiet"]) == 1
    printed = capsys.readouterr()
    assert complaint in printed.err
    assert printed.out == ""
