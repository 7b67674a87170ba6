"""A whole program as a GPU runs it: in pieces, by kernel or apart, interpreted here on a card that is made up."""

import gc
import importlib.util
import json
import logging

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from fxcompress.codegen.ops import GATHERED  # noqa: E402
from fxcompress.codegen.ops.fused import evaluate  # noqa: E402
from fxcompress.codegen.spec import parse  # noqa: E402
from fxcompress.codegen.triton import configs, launch  # noqa: E402
from fxcompress.codegen.triton.card import H200, Card  # noqa: E402
from fxcompress.codegen.triton.gemm import MOST_TOKENS, Product  # noqa: E402
from fxcompress.codegen.triton.interpreter import interpreter  # noqa: E402
from fxcompress.codegen.triton.kernel import Config  # noqa: E402
from fxcompress.codegen.triton.pieces import pieces  # noqa: E402
from fxcompress.passes.quantize import Quantize  # noqa: E402
from tests.test_kernels import normal, quantized  # noqa: E402

Q, _ = quantized(48, 128, torch.bfloat16)
GATED = f"linear(x, {Q}) | silu(_) | linear(x, {Q}) | mul(step[1], _)"
QKV = f"linear(x, {Q}, bfloat16[48]) | linear(x, {Q}) | linear(x, {Q}, bfloat16[48]) | outputs(step[0], step[1], _)"
BESIDE = f"linear(x, {Q}) | low_rank_linear(x, bfloat16[8, 128], bfloat16[48, 8]) | add(step[0], _) | gelu(_)"
ROWS = f"linear(rows, {Q}) | gelu(_) | unrows(_) | add(_, extra[0])"
OWN_INPUT = "low_rank_linear(x, bfloat16[8, 128], bfloat16[128, 8], bfloat16[128]) | add(x, _)"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FXCOMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(configs, "_SHIPPED", tmp_path / "nothing is shipped")
    launch.warn.cache_clear()
    configs._table.cache_clear()
    yield
    configs._table.cache_clear()


def example(text, lead=(2, 3), columns=128):
    """-> (spec, x, constants, extras), extras as large as the result."""
    spec = parse(text)
    tensors = []
    for number, constant in enumerate(spec.constants):
        if constant.dtype is torch.uint8:
            tensors.append(torch.randint(0, 256, constant.shape, dtype=torch.uint8, generator=seeded(number)))
        elif constant.shape == (2,):
            tensors.append(torch.tensor([-6.0, 1 / 128]))
        else:
            tensors.append((normal(*constant.shape, seed=number) / 8).to(constant.dtype))
    extras = [normal(*lead, 48, seed=90 + i).bfloat16() for i in range(spec.extras)]
    return spec, normal(*lead, columns, seed=99).bfloat16(), tensors, extras


def seeded(number):
    return torch.Generator().manual_seed(number)


def check(made, want):
    """Both round to bfloat16, the body after every step: each may be off by 2^-9 of the largest number on the way."""
    assert len(made) == len(want)
    for got, wanted in zip(made, want):
        assert (got.shape, got.dtype, got.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
        room = 4 * 2.0**-9 * float(wanted.abs().max())
        assert float((got.float() - wanted.float()).abs().max()) <= room


@pytest.mark.parametrize("tokens", [(2, 3), (2, MOST_TOKENS)], ids=["few", "many"])
@pytest.mark.parametrize("text", [GATED, QKV, BESIDE, ROWS, OWN_INPUT])
def test_every_kind_of_program_is_what_its_body_says(text, tokens):
    spec, x, tensors, extras = example(text, tokens)
    with interpreter():
        made = launch.run(spec, x, tensors, extras, H200)
    check(made, evaluate(spec, x, tensors, extras))


def test_a_program_of_several_products_is_cut_into_one_piece_each():
    texts = [[str(piece.spec) for piece in pieces(parse(text))] for text in (GATED, QKV, BESIDE)]
    assert [len(parts) for parts in texts] == [2, 3, 2]
    assert texts[0][0].endswith("| silu(_)")
    assert texts[0][1].endswith("| mul(extra[0], _)")
    assert texts[2][1].endswith("| add(extra[0], _) | gelu(_)")
    assert [piece.makes for piece in pieces(parse(QKV))] == [(0,), (1,), (2,)]


def test_no_tokens_launch_nothing():
    spec, x, tensors, extras = example(GATED, (2, 0))
    (made,) = launch.run(spec, x, tensors, extras, H200)  # no interpreter: a launch would fail
    assert (made.shape, made.dtype) == ((2, 0, 48), torch.bfloat16)


def test_an_activation_that_no_epilogue_can_read_as_it_is_is_written_out():
    spec, x, tensors, _ = example(f"linear(x, {Q}) | add(_, extra[0])")
    extras = [normal(2, 1, 48).bfloat16()]  # one a sequence
    with interpreter():
        made = launch.run(spec, x, tensors, extras, H200)
    check(made, evaluate(spec, x, tensors, extras))


def test_the_result_is_of_the_dtype_that_torch_promotes_to():
    spec, x, tensors, _ = example(f"linear(x, {Q}) | add(_, extra[0])")
    extras = [normal(2, 3, 48)]
    with interpreter():
        (made,) = launch.run(spec, x, tensors, extras, H200)
    assert made.dtype == torch.float32
    # The body rounds weights and product to bfloat16 on the way, the kernel rounds nothing.
    (want,) = evaluate(spec, x, tensors, extras)
    assert float((made - want).abs().max()) <= 4 * 2.0**-9 * float((want - extras[0]).abs().max())


def test_weights_are_laid_out_once_and_again_where_they_change(monkeypatch):
    made = []
    prepare = Product.prepare
    monkeypatch.setattr(Product, "prepare", lambda self, tensors: made.append(1) or prepare(self, tensors))
    spec, x, tensors, extras = example(f"linear(x, {Q})")
    with interpreter():
        first = launch.run(spec, x, tensors, extras, H200)
        launch.run(spec, x, tensors, extras, H200)
        assert len(made) == 1
        tensors[0].random_(0, 256, generator=seeded(7))
        second = launch.run(spec, x, tensors, extras, H200)
    assert len(made) == 2
    assert not torch.equal(first[0], second[0])
    check(second, evaluate(spec, x, tensors, extras))
    kept = len(launch._kept)
    del tensors
    gc.collect()
    assert len(launch._kept) == kept - 1


def test_a_table_decides_where_it_knows_the_kernel(monkeypatch):
    spec, x, tensors, _ = example(f"linear(x, {Q})")
    used = []
    monkeypatch.setattr(Product, "apart", lambda self, x, *_: used.append("apart") or [x[..., :48]])
    monkeypatch.setattr(Product, "__call__", lambda self, x, *given: used.append(given[2]) or [x[..., :48]])
    kernel, _ = launch.kernel_for(spec, x, [])
    launch.run(spec, x, tensors, [], H200)
    assert used == [kernel.rule(6, 132)]
    told = {"date": "2026-11-21", "torch": torch.__version__}
    path = configs.remember(H200.name, kernel.label, "48x128", {16: Config(16, 32, 2, 8, 2), 32: None}, told)
    launch.run(spec, x, tensors, [], H200)
    launch.run(spec, x.repeat(1, 5, 1), tensors, [], H200)
    assert used[1:] == [Config(16, 32, 2, 8, 2), "apart"]
    assert json.loads(path.read_text())["device"] == "NVIDIA H200"


def test_a_damaged_table_is_named_and_left_out(caplog):
    spec, x, _, _ = example(f"linear(x, {Q})")
    path = configs.own_table(H200.name)
    for damage in ("{", '{"configs": {"a": {"b": {"16": {"block_k": 1}}}}}', '{"configs": 3}'):
        path.parent.mkdir(exist_ok=True)
        path.write_text(damage)
        configs._table.cache_clear()
        kernel, _ = launch.kernel_for(spec, x, [])
        assert configs.choose(kernel, 6, H200) == kernel.rule(6, 132)
    assert len(caplog.records) == 3
    assert "is no table of launch configs" in caplog.text
    assert "`fxcompress tune` writes it" in caplog.text




def warned(caplog, text, card=H200, dtype=torch.bfloat16):
    spec, x, tensors, extras = example(text)
    x, tensors = x.to(dtype), [t.to(dtype) if t.dtype is torch.bfloat16 else t for t in tensors]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            (made,) = launch.run(spec, x, tensors, extras, card, "encoder.up")
    assert torch.equal(made, evaluate(spec, x, tensors, extras)[0])
    (record,) = caplog.records
    return record.getMessage()


def test_what_has_no_kernel_runs_as_torch_after_one_warning_that_names_the_node(caplog):
    said = warned(caplog, "linear(x, matmul(bfloat16[48, 8], bfloat16[8, 128]))")
    assert said == "encoder.up runs without a kernel, as plain PyTorch: there is no loader for matmul."


def test_a_dtype_without_kernels(caplog):
    said = warned(caplog, "linear(x, float64[48, 128])", dtype=torch.float64)
    assert "as plain PyTorch: there are no kernels for inputs of torch.float64; there are for float16" in said


def test_a_card_that_is_too_old(caplog):
    said = warned(caplog, f"linear(x, {Q})", Card("Tesla T4", 75, 40))
    assert said == (
        "encoder.up runs without a kernel, as plain PyTorch: Tesla T4 is sm_75, and kernels need sm_80 or later."
    )


def test_triton_that_is_missing(caplog, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "triton" else find(name, *a))
    launch.missing.cache_clear()
    try:
        said = warned(caplog, f"linear(x, {Q})")
    finally:
        launch.missing.cache_clear()
    assert said.endswith("as plain PyTorch: Triton is not installed (pip install 'fxcompress[triton]').")


def test_a_kernel_that_triton_refuses_falls_back_too(caplog, monkeypatch):
    from triton.runtime.errors import OutOfResources

    def refuse(*_):
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(Product, "__call__", refuse)
    said = warned(caplog, f"linear(x, {Q})")
    assert "out of resource: shared memory, Required: 300000, Hardware limit: 232448" in said


def test_the_op_has_a_kernel_for_gpus_and_importing_it_touches_no_driver():
    for name in ("fused", "fused_parallel", *(op._name for op in GATHERED)):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fxcompress::{name}", "CUDA")
    assert not torch.cuda.is_initialized()


def test_quantized_words_are_kept_in_the_bits_they_need():
    """4 bits: the GPU's copy of codes and marks takes what the file's takes, to 2 %."""
    spec, x, tensors, _ = example(f"linear(x, {quantized(64, 512, torch.bfloat16)[0]})", columns=512)
    kernel, _ = launch.kernel_for(spec, x, [])
    own = sum(t.numel() * t.element_size() for t in kernel.prepare(tensors))
    assert own <= 1.02 * Quantize(4, 64).stored_bytes(64, 512, 2)
