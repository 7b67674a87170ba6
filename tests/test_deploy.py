"""A compressed model, fused nodes and all, through what torch offers to deploy it: compile, export, AOTInductor."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import fxcompress
from tests.fusing import same


class Block(nn.Module):
    """A gated block with an embedding, a residual and a norm."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(64, 64), nn.LayerNorm(64)
        self.gate, self.up, self.down = nn.Linear(64, 128), nn.Linear(64, 128, bias=False), nn.Linear(128, 64)

    def forward(self, ids):
        x = self.table(ids)
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


@pytest.fixture(scope="module")
def compiled():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        batches = [(torch.randint(0, 64, (4, 8)),) for _ in range(4)]
        made = fxcompress.compile(Block().eval(), "4x", calibration=batches, progress=False)
    assert any("fused" in str(n.target) for n in made.graph.nodes)
    return made


IDS = torch.randint(0, 64, (3, 5), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def _fresh_inductor(tmp_path, monkeypatch):
    """Inductor's cache does not see the code of custom ops."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_inductor")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_torch_compile_takes_it_whole_at_two_sizes(compiled, backend):
    fast = torch.compile(compiled, fullgraph=True, backend=backend)
    with torch.no_grad():
        for ids in (IDS, IDS[:2, :4], IDS[:1]):
            torch.testing.assert_close(fast(ids), compiled(ids), rtol=1e-5, atol=1e-6)


def test_it_exports_with_dynamic_sizes_and_comes_back(compiled, tmp_path):
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", max=64)
    program = torch.export.export(compiled, (IDS,), dynamic_shapes=({0: batch, 1: length},))
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        for ids in (IDS, IDS[:2, :4]):
            same(again(ids), compiled(ids))
            torch.testing.assert_close(program.run_decompositions().module()(ids), compiled(ids), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_fresh_inductor")
def test_without_triton_everything_imports_compiles_and_runs(tmp_path):
    """In a process in which importing Triton fails."""
    code = """
        import sys
        sys.modules["triton"] = None
        import torch, fxcompress
        from torch import nn
        model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval()
        x = torch.randn(4, 64)
        made = fxcompress.compile(model, "4x", calibration=[(x,)], progress=False)
        assert any("fused" in str(n.target) for n in made.graph.nodes)
        assert torch.compile(made, backend="aot_eager", fullgraph=True)(x).shape == (4, 64)
        for kernel in made.kernels:
            assert "Triton is not installed" in kernel.refusal, kernel
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_importing_fxcompress_asks_no_driver():
    code = """
        import torch, fxcompress
        import fxcompress.codegen.triton.launch
        from triton.runtime import driver
        assert not torch.cuda.is_initialized()
        assert driver._active is None
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
