"""`compiled.kernels` and `fxcompress inspect --kernels`: what would run on a GPU, told without one."""

import json

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress import cli
from fxcompress.codegen.triton import listing
from fxcompress.codegen.triton.card import Card
from fxcompress.codegen.triton.kernel import Config
from tests.test_deploy import Block


@pytest.fixture(scope="module")
def compiled():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        batches = [(torch.randint(0, 64, (4, 8)),) for _ in range(2)]
        return fxcompress.compile(Block().eval(), "4x", calibration=batches, rewrites=["quantize"], progress=False)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FXCOMPRESS_CACHE", str(tmp_path / "cache"))


def test_each_kernel_has_its_module_program_file_and_configs(compiled):
    kernels = compiled.kernels
    # For few tokens the norm is done in the products, for many it is a kernel before them.
    assert [k.label.split("[")[0].split()[0] for k in kernels] == ["linear"] * 2 + ["rows"] + ["linear"] * 3
    assert [k.name for k in kernels] == ["gate, up"] * 5 + ["down"]
    assert [min(k.configs) for k in kernels] == [16, 16, 32, 32, 32, 16]
    assert [max(k.configs) for k in kernels] == [16, 16, 1024, 1024, 1024, 1024]
    for kernel in kernels:
        assert kernel.source.read_text().startswith(f'"""{kernel.spec}\n')
        assert kernel.refusal is None
    assert isinstance(kernels[-1].configs[16], Config)
    assert kernels[-1].configs[1024] is None  # the weight is unpacked, and a library multiplies
    assert kernels[1].spec.endswith("| mul(extra[0], _)")
    assert len({k.source for k in kernels}) == 6


def test_the_table_names_what_has_no_kernel_and_why(compiled):
    old = listing.list_kernels(compiled, Card("Tesla T4", 75, 40))
    assert str(old).count("plain PyTorch  ") >= 3
    assert "gate, up: Tesla T4 is sm_75, and kernels need sm_80 or later." in str(old)
    assert str(listing.Listing()) == "no fused nodes: nothing here runs generated kernels."


def test_a_model_in_float64_has_none():
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU()).double().eval()
    made = fxcompress.compile(model, "2x", example_inputs=(torch.randn(4, 64).double(),), progress=False)
    (kernel,) = made.kernels
    assert kernel.refusal.startswith("there are no kernels for inputs of torch.float64")
    assert (kernel.source, kernel.configs) == (None, {})
    assert "In plain PyTorch:" in str(made.kernels)


def test_a_saved_folder_tells_the_same(compiled, tmp_path, capsys):
    fxcompress.save(compiled, tmp_path / "out")
    assert cli.main(["inspect", str(tmp_path / "out"), "--kernels"]) == 0
    assert capsys.readouterr().out.strip() == str(compiled.kernels).strip()
    assert cli.main(["inspect", str(tmp_path / "out"), "--kernels", "--json"]) == 0
    (first, *_, last) = json.loads(capsys.readouterr().out)
    assert first["name"] == "gate, up"
    assert first["configs"]["16"]["block_m"] == 16
    assert last["configs"]["1024"] is None


def test_a_graph_that_is_not_fused_says_so():
    model, x = nn.Sequential(nn.Linear(64, 64), nn.GELU()).eval(), torch.randn(4, 64)
    made = fxcompress.restructure(model, {"*": "low_rank{rank=8}"}, example_inputs=(x,), progress=False)
    assert str(made.kernels) == "no fused nodes: nothing here runs generated kernels."


def test_the_cost_of_a_compressed_module_is_at_hand_too(compiled):
    product = 2 * 64 * 128  # flops a token, of each of three weights
    assert compiled.cost.total.at(**dict.fromkeys(symbols(compiled), 1)).flops >= 3 * product
    assert str(compiled.cost).splitlines()


def symbols(compiled):
    return {s.name for s in compiled.cost.total.flops.free_symbols}
