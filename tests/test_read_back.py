"""Weights that no linear module owns: as small in module mode and behind torch.compile as in the compiled graph."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress.core.errors import PlanError
from fxcompress.read_back import ReadsBack


class Bare(nn.Module):
    """Parameters multiplied in every way round, one of them square."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(64, 96, generator=generator))  # (in, out)
        self.square = nn.Parameter(torch.randn(96, 96, generator=generator))
        self.down = nn.Parameter(torch.randn(64, 96, generator=generator))  # (out, in)

    def forward(self, x: Tensor) -> Tensor:
        x = (x @ self.up).relu() @ self.square
        return torch.matmul(x, self.down.t())


class Attention(nn.Module):
    """torch's own, whose packed projections and output are no linear modules that it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(64, 4, batch_first=True)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data.normal_(0, 0.2, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


CASES = {"bare": (Bare, inputs(32, 64)), "attention": (Attention, inputs(8, 12, 64))}


@pytest.fixture(params=list(CASES), scope="module")
def pair(request):
    kind, x = CASES[request.param]
    model = kind().eval().requires_grad_(False)
    compiled = fxcompress.compile(model, "3x", calibration=[x] * 4, rewrites=["quantize"], progress=False)
    assert all("quantize" in choice.spec for choice in compiled.plan.choices if choice.site != "inner.out_proj")
    return model, compiled, x


@pytest.fixture
def _slow_attention():
    """Without the kernel of torch.nn.MultiheadAttention that export does not see, and that rounds otherwise."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@torch.no_grad()
@pytest.mark.usefixtures("_slow_attention")
def test_module_mode_gives_the_graphs_bits(pair):
    model, compiled, x = pair
    module = fxcompress.apply(model, compiled)
    assert torch.equal(module(x), compiled(x))
    changed = [m for m in module.modules() if isinstance(m, ReadsBack)]
    assert len(changed) == 1
    assert isinstance(changed[0], Bare | nn.MultiheadAttention)
    assert "quantize" in repr(changed[0])
    kept = sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])
    whole = sum(t.numel() * t.element_size() for t in model.parameters())
    assert kept < whole / 3  # and the weights themselves are held by nobody


@torch.no_grad()
def test_the_backend_gives_the_graphs_bits(pair):
    model, compiled, x = pair
    torch._dynamo.reset()
    run = torch.compile(model, backend="fxcompress", options={"plan": compiled, "lower": "eager"})
    assert torch.equal(run(x), compiled(x))
    assert not torch.equal(run(x), model(x))  # nothing was left as it was


@torch.no_grad()
def test_a_copy_and_a_pickle_are_the_same(pair):
    model, compiled, x = pair
    module = fxcompress.apply(model, compiled)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module)
        assert torch.equal(twin(x), module(x))


def test_a_cast_is_refused(pair):
    model, compiled, _ = pair
    with pytest.raises(PlanError, match=r"cannot be cast from torch\.float32 to torch\.float16"):
        fxcompress.apply(model, compiled).half()


@torch.no_grad()
@pytest.mark.parametrize("spec", ["low_rank{rank=8}", "monarch{blocks=4, rank=8}", "prune{sparsity=0.5}", "float8"])
def test_structures_are_read_back_up_to_rounding(spec):
    model, x = Bare().eval().requires_grad_(False), CASES["bare"][1]
    compiled = fxcompress.compile(
        model, "1.2x", calibration=[x] * 4, rewrites=[spec.split("{")[0]], progress=False
    )
    assert any(choice.spec != "keep" for choice in compiled.plan.choices)
    want, got = compiled(x), fxcompress.apply(model, compiled)(x)
    # Three products of at most 96 terms, in two orders; every weight rounds once more when it is made.
    assert float((got - want).norm() / want.norm()) < 3 * 2 * 96 * torch.finfo(torch.float32).eps


@torch.no_grad()
def test_products_written_with_a_transpose_are_compressed_behind_the_backend():
    class Written(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T + self.bias

    model, x = nn.Sequential(Written(64, 96), nn.ReLU(), Written(96, 64)).eval().requires_grad_(False), inputs(32, 64)
    compiled = fxcompress.compile(model, "3x", calibration=[x] * 4, rewrites=["low_rank", "quantize"], progress=False)
    torch._dynamo.reset()
    run = torch.compile(model, backend="fxcompress", options={"plan": compiled, "lower": "eager"})
    assert torch.equal(run(x), compiled(x))
    assert torch.equal(fxcompress.apply(model, compiled)(x), compiled(x))
