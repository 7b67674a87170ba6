"""A compressed model as torch.export's file, as an AOTInductor package and from the command line, read elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import fxcompress
from benchmarks.models import data as texts
from benchmarks.models import stories, vit_mnist
from fxcompress.cli import main
from fxcompress.core.errors import ExportError
from tests.test_onnx_ops import EPS, session


@pytest.fixture(scope="module")
def images():
    try:
        return vit_mnist.normalise(texts.mnist(160)[0])
    except texts.DataMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def vit(images):
    """Fused products, masks and low rank beside quantized weights."""
    rewrites = ["quantize", "low_rank", "prune"]
    compiled = fxcompress.compile(
        vit_mnist.model(), "6x", calibration=list(images[:96].split(32)), rewrites=rewrites, progress=False
    )
    assert any("fused" in str(node.target) for node in compiled.graph.nodes)
    return compiled


def elsewhere(code):
    """In a process of its own."""
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)


def test_a_saved_program_gives_the_same_bits_at_every_batch_in_a_fresh_process(vit, images, tmp_path):
    torch.export.save(fxcompress.export_program(vit), tmp_path / "vit.pt2")
    with torch.no_grad():
        torch.save([(images[:n], vit(images[:n])) for n in (1, 2, 7, 64)], tmp_path / "want.pt")
    done = elsewhere(f"""
        import torch, fxcompress
        module = torch.export.load({str(tmp_path / "vit.pt2")!r}).module()
        for images, want in torch.load({str(tmp_path / "want.pt")!r}):
            with torch.no_grad():
                assert torch.equal(module(images), want), len(images)
    """)
    assert done.returncode == 0, done.stderr


def test_a_saved_program_needs_fxcompress_and_the_log_says_so(vit, tmp_path):
    torch.export.save(fxcompress.export_program(vit), tmp_path / "vit.pt2")
    done = elsewhere(f"import torch; torch.export.load({str(tmp_path / 'vit.pt2')!r})")
    assert done.returncode
    assert "error when deserializing the saved file" in done.stderr
    assert "torch.ops.fxcompress." in done.stderr


def test_stories_keep_batch_and_sequence(data, tmp_path):
    batches = data(stories.batches, texts.tinystories()[:60])
    compiled = fxcompress.compile(
        data(stories.model), "4x", calibration=[{"input_ids": b} for b in batches[:2]], rewrites=["quantize"],
        progress=False,
    )  # fmt: skip
    torch.export.save(fxcompress.export_program(compiled), tmp_path / "stories.pt2")
    module = torch.export.load(tmp_path / "stories.pt2").module()
    for batch, length in ((1, 1), (1, 9), (3, 64), (5, 30)):
        ids = batches[0][:batch, :length]
        with torch.no_grad():
            assert torch.equal(module(input_ids=ids).logits, compiled(input_ids=ids).logits)


def test_torch_export_takes_it_directly(vit, images):
    program = torch.export.export(vit, (images[:4],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with torch.no_grad():
        assert torch.equal(program.module()(images[:9]), vit(images[:9]))


def test_the_module_tree_exports_to_the_same_bits(vit, images, tmp_path):
    mine = fxcompress.apply(vit_mnist.model(), vit)
    program = torch.export.export(mine, (images[:4],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "tree.pt2")
    with torch.no_grad():
        assert torch.equal(torch.export.load(tmp_path / "tree.pt2").module()(images[:9]), vit(images[:9]))


@pytest.mark.slow
def test_an_aot_inductor_package_agrees(vit, images, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            fxcompress.export_program(vit), package_path=str(tmp_path / "vit.pt2")
        )
        torch.save([(images[:n], vit(images[:n])) for n in (2, 7, 64)], tmp_path / "want.pt")
    # Each of 27 products may be wrong by (128 + 8) eps of the largest number in either program, pointwise work in
    # another order included, and the residual stream adds that up.
    done = elsewhere(f"""
        import torch, fxcompress
        run = torch._inductor.aoti_load_package({path!r})
        for images, want in torch.load({str(tmp_path / "want.pt")!r}):
            assert (run(images) - want).abs().max() <= 2 * 27 * 136 * {EPS} * want.abs().max(), len(images)
    """)
    assert done.returncode == 0, done.stderr


def test_export_from_the_command_line(vit, images, tmp_path, capsys):
    folder = tmp_path / "vit"
    fxcompress.save(vit, folder)
    onnx, pt2 = tmp_path / "vit.onnx", tmp_path / "vit.pt2"
    assert main(["export", str(folder), "--onnx", str(onnx), "--pt2", str(pt2), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == [
        {"format": "onnx", "out": str(onnx), "bytes": onnx.stat().st_size},
        {"format": "pt2", "out": str(pt2), "bytes": pt2.stat().st_size},
    ]
    with torch.no_grad():
        want = vit(images[:5])
        assert torch.equal(torch.export.load(pt2).module()(images[:5]), want)
    (got,) = session(onnx).run(None, {"images": images[:5].numpy()})
    assert (torch.from_numpy(got) - want).abs().max() <= 2 * 27 * 136 * EPS * want.abs().max()  # as above
    assert main(["export", str(folder), "--onnx", str(onnx)]) == 1
    assert "vit.onnx exists already; choose a new file or remove it first." in capsys.readouterr().err
    other = tmp_path / "other.pt2"
    assert main(["export", str(folder), "--pt2", str(other)]) == 0
    assert capsys.readouterr().out == f"{other}: {other.stat().st_size:,} bytes\n"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "export writes what is asked for: give --onnx FILE, --pt2 FILE or --aoti FILE.pt2."),
        (["--aoti", "model.so"], "--aoti model.so: torch wants the name to end in .pt2."),
        (["--aoti", "a.pt2", "--pt2", "./a.pt2"], "two of the files to write have one name; give each its own."),
        (["--onnx", "new.onnx"], "absent is no folder; give the one fxcompress.save wrote."),
    ],
)
def test_export_refuses(options, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "absent", *options]) == 1
    assert complaint in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_only_compressed_graphs_are_exported(vit):
    with pytest.raises(ExportError, match=r"export_program takes what fxcompress\.compile, .* not a Linear\."):
        fxcompress.export_program(nn.Linear(2, 2))
    with pytest.raises(ExportError, match="a lowered module fits this machine alone; export the compiled one"):
        fxcompress.export_program(fxcompress.lower(vit, "eager"))
