"""Kernels that look rows of coded tables up, interpreted, against the ops of the same names."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from fxcompress.codegen import ops  # noqa: E402
from fxcompress.codegen.ops.quantized_rows_embedding import quantized_rows_embedding  # noqa: E402
from fxcompress.codegen.triton import gather  # noqa: E402
from fxcompress.codegen.triton.ahead import compile_ahead  # noqa: E402
from fxcompress.codegen.triton.build import load_source  # noqa: E402
from fxcompress.codegen.triton.interpreter import interpreter  # noqa: E402
from fxcompress.core.metric import Metric  # noqa: E402
from fxcompress.passes.quantize import Quantize  # noqa: E402

ROWS = 37
IDS = torch.tensor([[3, 0, 36], [3, 17, 1]])
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FXCOMPRESS_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))


def quantized(rows, columns, bits, group, symmetric=False):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(bits)) + 0.1
    encoded = Quantize(bits, group, symmetric).encode(weight, Metric())
    return [encoded.get(key) for key in ("codes", "scales", "zeros", "grid")]


def close(made, want):
    """exp2 and two products in float32, then one rounding: half a unit each way of `want`, which is rounded itself."""
    assert (made.shape, made.dtype) == (want.shape, want.dtype)
    room = (torch.finfo(made.dtype).eps + 2.0**-21) * want.double().abs()
    assert bool(((made.double() - want.double()).abs() <= room).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("columns", "group"), [(1, 0), (45, 32), (64, 64), (45, 0), (1100, 64)])
def test_quantized_rows_are_those_of_the_op(bits, columns, group, dtype):
    args = (IDS, *quantized(ROWS, columns, bits, min(group, columns)), bits, min(group, columns), columns, dtype)
    with interpreter():
        made = gather.quantized_embedding(*args)
    close(made, ops.quantized_embedding.quantized_embedding(*args))


def test_a_table_without_zeros():
    args = (IDS.int(), *quantized(ROWS, 45, 4, 32, True), 4, 32, 45, torch.float16)
    assert args[3] is None
    with interpreter():
        made = gather.quantized_embedding(*args)
    close(made, ops.quantized_embedding.quantized_embedding(*args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_float8_number_is_read_exactly(dtype):
    codes = torch.arange(256).to(torch.uint8).view(4, 64)
    scales = torch.tensor([[1.0], [0.5], [2.0**-10], [0.3]])
    ids = torch.tensor([0, 1, 2, 3, 2])
    with interpreter():
        made = gather.float8_embedding(ids, codes, scales, dtype)
    want = ops.float8_embedding.float8_embedding(ids, codes, scales, dtype)
    assert torch.equal(made.nan_to_num(7), want.nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32], ids=str)
def test_rows_in_tiers_are_those_of_the_op(dtype):
    tiers = [(5, 8, 0), (12, 4, 32), (20, 3, 32)]
    parts = [quantized(rows, 45, bits, group) for rows, bits, group in tiers]
    index = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1)).to(dtype)
    bits, groups = [[tier[i] for tier in tiers] for i in (1, 2)]
    args = (torch.arange(ROWS), index, *map(list, zip(*parts)), bits, groups, 45, torch.float16)
    with interpreter():
        made = gather.quantized_rows_embedding(*args)
    close(made, quantized_rows_embedding(*args))


@pytest.mark.parametrize("lookup", ["quantized", "float8"])
def test_ids_outside_the_vocabulary_are_rows_of_nan_and_read_nothing(lookup):
    ids = torch.tensor([-1, ROWS, 2**40, 5])
    with interpreter():
        if lookup == "quantized":
            made = gather.quantized_embedding(ids, *quantized(ROWS, 45, 4, 32), 4, 32, 45, torch.float16)
        else:
            made = gather.float8_embedding(ids, torch.zeros(ROWS, 45).byte(), torch.ones(ROWS, 1), torch.float16)
    assert made.isnan().all(1).tolist() == [True, True, True, False]


def test_no_ids_give_an_empty_result_without_a_launch():
    made = gather.float8_embedding(IDS[:, :0], torch.zeros(ROWS, 45).byte(), torch.ones(ROWS, 1), torch.bfloat16)
    assert (made.shape, made.dtype) == ((2, 0, 45), torch.bfloat16)


@pytest.mark.parametrize("arch", [80, 90])
def test_they_compile(arch):
    types = ["*bf16", "*i64"]
    tier = ["*u8", "*u8", "*u8", "*fp32"]
    tiers = ((1000, 8, 0, True), (31_000, 3, 64, True))
    for source, given in [
        (gather.quantized_rows(32_000, 4096, ((32_000, 4, 64, True),)), tier),
        (gather.quantized_rows(32_000, 4096, tiers, 2), ["*i16", *tier, *tier]),
        (gather.float8_rows(32_000, 4096), ["*u8", "*fp32"]),
    ]:
        kernel = getattr(load_source(source), gather.NAME)
        signature = dict(zip(kernel.arg_names, [*types, *given]))
        report = compile_ahead(kernel, signature, {"BLOCK": gather.block(4096)}, arch, gather.WARPS)
        assert report.faults() == []
        assert report.registers <= 64  # enough blocks for a load that waits for an id
