"""Checkpoints: the same bits back, the bytes that were reported, no damage unnoticed, no pickle, nothing half-done."""

import errno
import json
import os
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers as tf
from torch import nn

import fxcompress
from fxcompress.checkpoint import GRAPH, MANIFEST, PLAN, TENSORS
from fxcompress.core.errors import CheckpointError, InputError

FILES = (MANIFEST, TENSORS, GRAPH, PLAN)
SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"vocab_size": 120, "max_position_embeddings": 32}
NO_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


class SmallConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.hidden, self.head = nn.Linear(8, 96), nn.Linear(96, 40)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return {"scores": self.head(torch.relu(self.hidden(x))), "features": x}


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.out = nn.Linear(16, 64), nn.Linear(8, 64), nn.Linear(64, 64)

    def forward(self, a, b):
        return self.out(torch.relu(self.left(a) - self.right(b)))


MODELS = {
    "bert": lambda: tf.BertModel(tf.BertConfig(**SMALL, **TEXT)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=120, n_embd=32, n_layer=1, n_head=4, n_positions=32, **NO_IDS)
    ),
    "llama": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(**SMALL, **TEXT, num_key_value_heads=2, tie_word_embeddings=True, **NO_IDS)
    ),
    "conv": SmallConv,
    "mlp": TwoInputs,
}


def inputs(name, size=3):
    generator = torch.Generator().manual_seed(size)
    if name == "conv":
        return (torch.randn(size, 3, 8, 8, generator=generator),), {}
    if name == "mlp":
        return (torch.randn(size, 16, generator=generator), torch.randn(size, 8, generator=generator)), {}
    return (), {"input_ids": torch.randint(3, 120, (size, 9), generator=generator)}


@cache
def compiled(name):
    """By error: these models are so small that the files around them weigh as much as they do."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    example = inputs(name, 4)[0] or None
    return fxcompress.compile(model, fxcompress.Budget(error=0.2), example_inputs=example, progress=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The small MLP, saved once; tests that damage it work on `copied`."""
    path = tmp_path_factory.mktemp("saved") / "mlp"
    fxcompress.save(compiled("mlp"), path)
    return path


@pytest.fixture
def copied(folder, tmp_path):
    path = tmp_path / "copy"
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def leaves(output):
    return torch.utils._pytree.tree_leaves(output)


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_is_the_saved_one_bit_for_bit(name, tmp_path):
    original = compiled(name)
    assert any(s.spec != "keep" for s in original.report.sites)
    fxcompress.save(original, tmp_path / "saved")
    loaded = fxcompress.load(tmp_path / "saved")
    before, after = original.state_dict(), loaded.state_dict()
    read = {str(n.target) for n in original.graph.find_nodes(op="get_attr")}
    assert read <= after.keys()
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in read)
    for size in (1, 3, 5):
        args, kwargs = inputs(name, size)
        with torch.no_grad():
            want, got = original(*args, **kwargs), loaded(*args, **kwargs)
        assert type(got) is type(want)
        assert len(leaves(got)) == len(leaves(want)) > 0
        assert all(torch.equal(a, b) for a, b in zip(leaves(got), leaves(want)))
    assert loaded.plan.to_text() == original.plan.to_text()
    assert loaded.report == original.report
    assert loaded.signature == original.signature
    assert not loaded.training


@pytest.mark.parametrize("name", MODELS)
def test_reported_bytes_are_the_bytes_on_disk(name, tmp_path):
    fxcompress.save(compiled(name), tmp_path / "saved")
    files = list((tmp_path / "saved").iterdir())
    assert {f.name for f in files} == set(FILES)
    on_disk = sum(f.stat().st_size for f in files)
    assert compiled(name).report.measured_bytes == on_disk


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_tied_weight_is_one_set_of_tensors_in_the_file(name, tmp_path):
    fxcompress.save(compiled(name), tmp_path / "saved")
    tensors = safetensors.torch.load_file(tmp_path / "saved" / TENSORS)
    vocabulary = [k for k, t in tensors.items() if t.dim() == 2 and t.shape[0] == 120]
    owners = {k.rpartition(".")[0] for k in vocabulary}
    assert len(owners) == 1
    assert len([k for k in vocabulary if k.endswith(("codes", "weight", ".u"))]) == 1


def test_a_loaded_model_can_be_saved_again_to_the_same_tensors(folder, tmp_path):
    fxcompress.save(fxcompress.load(folder), tmp_path / "again")
    for name in (TENSORS, PLAN):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_a_loaded_model_checks_its_calls(folder):
    loaded = fxcompress.load(folder)
    (a, b), _ = inputs("mlp")
    assert torch.equal(loaded(b=b, a=a), loaded(a, b))
    with pytest.raises(InputError, match="lacks b"):
        loaded(a)


def test_an_existing_folder_is_refused_and_untouched(tmp_path):
    target = tmp_path / "mine"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"mine exists already; choose a new folder or remove it first"):
        fxcompress.save(compiled("mlp"), target)
    assert [(f.name, f.read_text()) for f in target.iterdir()] == [("notes.txt", "mine")]
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_dangling_link_counts_as_existing(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="link exists already"):
        fxcompress.save(compiled("mlp"), tmp_path / "link")


def test_missing_parents_are_made(tmp_path):
    fxcompress.save(compiled("mlp"), tmp_path / "a" / "b" / "c")
    assert {f.name for f in (tmp_path / "a" / "b" / "c").iterdir()} == set(FILES)


def test_a_model_that_was_not_compiled_is_refused_by_its_type(tmp_path):
    with pytest.raises(CheckpointError, match=r"fxcompress\.compile or restructure returned, not a Linear"):
        fxcompress.save(nn.Linear(2, 2), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_refused_by_its_name(copied, name, keep):
    content = (copied / name).read_bytes()
    (copied / name).write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match=rf"{name} (is damaged|has \d+ bytes where {len(content)} were written)"):
        fxcompress.load(copied)


@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("name", FILES[1:])
def test_a_flipped_bit_is_refused_by_the_name_of_the_file(copied, name, place):
    content = bytearray((copied / name).read_bytes())
    content[int(len(content) * place)] ^= 1
    (copied / name).write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=rf"{name} was changed after it was written \(SHA-256 differs\)"):
        fxcompress.load(copied)


@pytest.mark.parametrize("place", [0.0, 0.1, 0.35, 0.6, 0.9, 0.999])
def test_a_flipped_bit_in_the_manifest_is_refused_by_its_name(copied, place):
    content = bytearray((copied / MANIFEST).read_bytes())
    content[int(len(content) * place)] ^= 1
    (copied / MANIFEST).write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=MANIFEST):
        fxcompress.load(copied)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused_by_its_name(copied, name):
    (copied / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        fxcompress.load(copied)


def test_an_empty_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no fxcompress\.json, so it is no fxcompress checkpoint"):
        fxcompress.load(tmp_path)


def test_what_is_no_folder_is_refused_by_its_path(tmp_path, folder):
    with pytest.raises(CheckpointError, match="nowhere is no folder; give the one"):
        fxcompress.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=rf"{TENSORS} is no folder"):
        fxcompress.load(folder / TENSORS)


def edit_manifest(path, **changes):
    manifest = json.loads((path / MANIFEST).read_text())
    manifest.update(changes)
    (path / MANIFEST).write_text(json.dumps(manifest))


def test_a_format_of_the_future_is_refused_with_both_numbers(copied):
    edit_manifest(copied, format=99)
    with pytest.raises(CheckpointError, match="has format 99; this version reads format 1"):
        fxcompress.load(copied)


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": 1}', "nonsense", '{"format": 1, "files": {"../x": {}}}'])
def test_a_manifest_of_another_kind_is_refused_by_its_name(copied, content):
    (copied / MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{MANIFEST} is damaged"):
        fxcompress.load(copied)


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, call):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(
        CheckpointError, match=r"saved could not be written \(No space left on device\); nothing was left"
    ):
        fxcompress.save(compiled("mlp"), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_save_leaves_no_folder_of_the_wanted_name(tmp_path, monkeypatch):
    def killed(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        fxcompress.save(compiled("mlp"), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", MODELS)
def test_loading_unpickles_nothing(name, tmp_path, monkeypatch):
    fxcompress.save(compiled(name), tmp_path / "saved")
    args, kwargs = inputs(name)

    def forbidden(*_args, **_kwargs):
        raise AssertionError("a pickle was read")

    for module, names in ((pickle, ("load", "loads", "Unpickler")), (torch, ("load",))):
        for attribute in names:
            monkeypatch.setattr(module, attribute, forbidden)
    with torch.no_grad():
        fxcompress.load(tmp_path / "saved")(*args, **kwargs)


def test_no_file_is_a_pickle(folder):
    for file in folder.iterdir():
        head = file.read_bytes()[:4]
        assert not head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")), file.name


WITHOUT_TRANSFORMERS = """
import sys
sys.modules["transformers"] = None  # import transformers raises ImportError
import torch, fxcompress
loaded = fxcompress.load(sys.argv[1])
given = torch.load(sys.argv[2])
with torch.no_grad():
    y = loaded(*given["args"], **given["kwargs"])
torch.save({"keys": list(y.keys()), **dict(y)} if hasattr(y, "keys") else y, sys.argv[3])
"""


def in_a_process_without_transformers(name, tmp_path):
    """-> (what the saved model says there, what it says here)."""
    fxcompress.save(compiled(name), tmp_path / "saved")
    args, kwargs = inputs(name)
    torch.save({"args": args, "kwargs": kwargs}, tmp_path / "given.pt")
    paths = [str(tmp_path / n) for n in ("saved", "given.pt", "answer.pt")]
    root = str(Path(__file__).parents[1])
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRANSFORMERS, *paths],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    with torch.no_grad():
        return torch.load(tmp_path / "answer.pt"), compiled(name)(*args, **kwargs)


def test_a_plain_model_loads_where_transformers_is_absent(tmp_path):
    got, want = in_a_process_without_transformers("mlp", tmp_path)
    assert torch.equal(got, want)


def test_a_hugging_face_model_answers_with_a_dict_where_transformers_is_absent(tmp_path):
    got, want = in_a_process_without_transformers("bert", tmp_path)
    assert got["keys"] == list(want.keys())
    assert torch.equal(got["last_hidden_state"], want["last_hidden_state"])
