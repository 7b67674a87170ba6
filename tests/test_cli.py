"""The command line, run as a user runs it: exit status, stdout, stderr, files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

import fxcompress
import fxcompress.codegen.triton
from fxcompress import profiling
from fxcompress.cli import main
from tests.profiling import profile

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(120))]


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "bert"
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=len(WORDS)
    )
    BertModel(config).eval().save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    lines = [" ".join(f"word{(i * j) % 120}" for j in range(3, 9 + i % 5)) for i in range(40)]
    (folder / "texts.txt").write_text("\n".join(lines))
    return folder


def test_compress_then_inspect(bert: Path, tmp_path: Path, capsys):
    out = tmp_path / "small"
    texts = str(bert / "texts.txt")
    assert main(["compress", str(bert), "--budget", "2x", "--calibration", texts, "--out", str(out), "--quiet"]) == 0
    printed = capsys.readouterr()
    assert f"written to {out}" in printed.out
    assert "predicted" in printed.out
    assert main(["inspect", str(out)]) == 0
    assert "of model loss" in capsys.readouterr().out
    assert main(["inspect", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert main(["inspect", str(out), "--cost"]) == 0
    formulas = capsys.readouterr().out
    assert "encoder.layer.0.attention.self.{query, key, value}" in formulas
    assert "peak activation memory: " in formulas
    assert main(["inspect", str(out), "--cost", "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)
    sizes = ",".join(f"{symbol}=4" for symbol in cost["symbols"])
    assert main(["inspect", str(out), "--cost", "--at", sizes, "--json"]) == 0
    at = json.loads(capsys.readouterr().out)
    assert at["total"]["flops"] == sum(node["flops"] for node in at["nodes"]) > 0
    assert main(["inspect", str(out), "--cost", "--at", "batch=4"]) == 1
    assert f"--at batch=4: write sizes of {', '.join(cost['symbols'])}, such as" in capsys.readouterr().err
    size = sum(file.stat().st_size for file in out.iterdir())
    assert told["report"]["measured_bytes"] == size
    assert fxcompress.load(out)(input_ids=torch.ones(1, 4, dtype=torch.long)).last_hidden_state.shape == (1, 4, 32)


def test_compress_into_a_folder_for_from_pretrained(bert: Path, tmp_path: Path, capsys):
    out, texts = tmp_path / "small", str(bert / "texts.txt")
    rest = ["--budget", "2x", "--calibration", texts, "--out", str(out), "--quiet"]
    assert main(["compress", str(bert), "--modules", *rest]) == 0
    names = {file.name for file in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert (out / "model.safetensors").stat().st_size < 0.6 * (bert / "model.safetensors").stat().st_size
    ids = AutoTokenizer.from_pretrained(out)("word3 word9", return_tensors="pt")
    with torch.no_grad():
        wanted = AutoModel.from_pretrained(bert)(**ids).last_hidden_state
        error = (AutoModel.from_pretrained(out)(**ids).last_hidden_state - wanted).norm() / wanted.norm()
    assert 0 < error < 0.05  # 2x of float32 leaves 16 bits a weight: most at 8 bits lose some thousandths
    capsys.readouterr()
    assert main(["compress", str(bert), "--modules", *rest]) == 1
    assert "exists already; choose a new folder or remove it first." in capsys.readouterr().err
    assert main(["inspect", str(out)]) == 1
    assert "it is a transformers folder; load it with" in capsys.readouterr().err


def test_plan_writes_no_model_and_its_saved_plan_can_be_carried_out(bert: Path, tmp_path: Path, capsys):
    saved = tmp_path / "plan.json"
    texts = str(bert / "texts.txt")
    common = ["--calibration", texts, "--quiet"]
    assert main(["plan", str(bert), "--budget", "2x", "--save", str(saved), "--json", *common]) == 0
    assert json.loads(capsys.readouterr().out)["budget"]["size"] == "2x"
    assert [f.name for f in tmp_path.iterdir()] == ["plan.json"]
    assert main(["compress", str(bert), "--plan", str(saved), "--out", str(tmp_path / "m"), *common]) == 0


def test_plan_and_compress_under_a_latency(bert: Path, tmp_path: Path, capsys, monkeypatch):
    made = profile()
    monkeypatch.setattr(profiling, "cached", lambda: made)
    common = ["--calibration", str(bert / "texts.txt"), "--quiet", "--rewrites", "quantize", "--latency", "1x"]
    work = ["--workload", "query=1x8", "index=16x12:0.1"]
    page, saved, out = tmp_path / "plan.html", tmp_path / "plan.json", tmp_path / "m"
    told = ["--lower", "eager", "--html", str(page), "--save", str(saved)]
    assert main(["plan", str(bert), *common, *work, *told]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("plan: latency <= 1x\n")
    assert "query (1 x 8): predicted " in printed
    assert "mean of 1 query, 0.1 index: predicted " in printed
    assert "<h2>Every weight</h2>" in page.read_text(encoding="utf-8")
    loose = [*common[:-1], "1 s", "--budget", "2x", "--lower", "inductor"]
    assert main(["plan", str(bert), *loose]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("plan: size <= 2x, latency <= 1 s\n")
    assert "a call, lowered to inductor" in printed
    assert main(["compress", str(bert), *common[:3], "--plan", str(saved), "--out", str(out)]) == 0
    assert "query (1 x 8) a call" in capsys.readouterr().out
    assert main(["inspect", str(out), "--html", str(page), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [w["name"] for w in told["report"]["workload"]] == ["query", "index"]
    assert "<h2>Predicted beside measured</h2>" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["plan", "{bert}", "--latency", "fast"], "Budget latency='fast' is not understood"),
        (["plan", "{bert}", "--latency", "min"], 'latency="min" alone has no bound'),
        (["plan", "{bert}", "--workload", "decode"], "workload 'decode' is not understood"),
        (["compress", "{bert}", "--workload", "a=1x1", "a=2x2", "--out", "{tmp}/m"], "two workloads are called 'a'"),
        (["compress", "{bert}", "--budget", "fast", "--out", "{tmp}/m"], "'fast' is not understood"),
        (["compress", "{tmp}/nothing", "--out", "{tmp}/m"], "holds no config.json"),
        (["compress", "{bert}", "--calibration", "{tmp}/no.txt", "--out", "{tmp}/m"], "does not exist"),
        (["compress", "{bert}", "--out", "{bert}"], "exists already"),
        (["plan", "{bert}", "--rewrites", "magic"], "unknown rewrite 'magic'"),
        (["inspect", "{bert}"], "is no fxcompress checkpoint"),
        (["inspect", "{tmp}/nothing"], "is no folder"),
    ],
)
def test_every_failure_is_one_line_on_stderr_and_a_status_of_1(
    arguments, complaint, bert: Path, tmp_path: Path, capsys
):
    assert main([a.format(bert=bert, tmp=tmp_path) for a in arguments]) == 1
    printed = capsys.readouterr()
    assert complaint in printed.err
    assert printed.out == ""
    assert not (tmp_path / "m").exists()


def test_no_calibration_is_said(bert: Path, tmp_path: Path, capsys):
    assert main(["compress", str(bert), "--budget", "2x", "--out", str(tmp_path / "m"), "--quiet"]) == 0
    printed = capsys.readouterr()
    assert "no --calibration" in printed.err
    assert "for want of calibration data" in printed.out


def test_kernels_without_triton_say_what_to_install(capsys, monkeypatch):
    monkeypatch.delattr(fxcompress.codegen.triton, "catalogue", raising=False)  # another test may have imported it
    monkeypatch.setitem(sys.modules, "fxcompress.codegen.triton.catalogue", None)
    assert main(["kernels"]) == 1
    said = capsys.readouterr().err
    assert "kernels are compiled by Triton, which cannot be imported here" in said
    assert "pip install 'fxcompress[triton]'" in said
