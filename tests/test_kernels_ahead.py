"""Every kernel the generator can emit compiles for GPUs that are not here, and is what it should be."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from fxcompress.codegen.packing import packed_bytes  # noqa: E402
from fxcompress.codegen.spec import parse  # noqa: E402
from fxcompress.codegen.triton.ahead import compile_ahead  # noqa: E402
from fxcompress.codegen.triton.generate import generate  # noqa: E402
from fxcompress.codegen.triton.kernel import Config  # noqa: E402

TENSOR_CORES = {80: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05"}
DECODE, SPLIT, PREFILL = Config(16, 128, 1, 4, 4), Config(16, 128, 4, 4, 4), Config(64, 128, 1, 8, 3)
SIZE = 4096


def weight(bits, group, dtype, rows=SIZE, columns=SIZE):
    if bits == 16:
        return f"{dtype}[{rows}, {columns}]"
    groups = columns // group if group else 1
    types = f"uint8[{rows}, {packed_bytes(columns, bits)}], uint8[{rows}, {groups}], uint8[{rows}, {-(-groups // 2)}]"
    return f"dequantize({types}, float32[2], bits={bits}, group_size={group}, columns={columns}, dtype={dtype})"


def linear(kept, dtype):
    return f"linear(x, {kept}, {dtype}[{SIZE}])"


FLOAT8 = f"dequantize_float8(uint8[{SIZE}, {SIZE}], float32[{SIZE}, 1], dtype=bfloat16)"
TWO_OF_FOUR = f"unmask_2_4(uint8[{SIZE}, {packed_bytes(SIZE // 4, 3)}], bfloat16[{SIZE}, {SIZE // 2}])"
LOW_RANK = f"low_rank_linear(x, {weight(4, 64, 'bfloat16', 128)}, {weight(16, 0, 'bfloat16', SIZE, 128)})"
INT8 = f"int8_dynamic_linear(x, int8[{SIZE}, {SIZE}], float32[{SIZE}], float32[{SIZE}])"


def quaternion(bits, group):
    return f"quaternion_linear(x, {weight(bits, group, 'bfloat16', SIZE // 4)})"


def compiled(product, dtype, config, arch):
    kernel = generate(parse(f"{product} | gelu(_) | add(_, extra[0])"), getattr(torch, dtype), ("full",))
    function, signature, constants = kernel.function(config), kernel.signature(config), kernel.constants(config)
    return compile_ahead(function, signature, constants, arch, config.warps, config.stages, unaligned=("M",))


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FXCOMPRESS_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))


@pytest.mark.parametrize("config", [DECODE, SPLIT, PREFILL], ids=["decode", "split", "prefill"])
@pytest.mark.parametrize(("bits", "group"), [(16, 0), (8, 0), (4, 64), (4, 128), (3, 64), (2, 64)])
def test_on_sm_90_nothing_spills_and_tensor_cores_are_used(bits, group, config):
    report = compiled(linear(weight(bits, group, "bfloat16"), "bfloat16"), "bfloat16", config, 90)
    assert report.faults(("wgmma", "cp.async")) == []


@pytest.mark.parametrize(
    ("product", "config"),
    [
        (linear(FLOAT8, "bfloat16"), DECODE),
        (linear(FLOAT8, "bfloat16"), PREFILL),
        (linear(TWO_OF_FOUR, "bfloat16"), Config(16, 64, 1, 4, 3)),
        (LOW_RANK, Config(16, 128, 4, 4, 3)),
        (LOW_RANK, Config(64, 128, 1, 8, 2)),
        (quaternion(16, 0), Config(16, 64, 1, 4, 3)),
        (quaternion(4, 64), Config(16, 64, 1, 4, 3)),
        (INT8, Config(16, 128, 1, 4, 4)),
        (INT8, Config(128, 128, 1, 8, 3)),
    ],
)
def test_every_other_kernel_on_sm_90(product, config):
    report = compiled(product, "bfloat16", config, 90)
    assert report.faults(("wgmma",)) == []


@pytest.mark.parametrize("arch", [80, 89, 100])
@pytest.mark.parametrize(("bits", "group"), [(16, 0), (4, 64)])
def test_on_other_cards_too(bits, group, arch):
    report = compiled(linear(weight(bits, group, "float16"), "float16"), "float16", DECODE, arch)
    assert report.faults() == []
    assert report.instructions[TENSOR_CORES[arch]] or report.instructions["mma"]


def test_four_bits_take_few_conversions():
    """Unpacking is shifts, masks and half-precision adds; integers are converted for scales and zeros alone."""
    report = compiled(linear(weight(4, 128, "bfloat16"), "bfloat16"), "bfloat16", DECODE, 90)
    weights_a_thread = 128 * 128 // 128  # a step of 128 columns and 128 rows, among four warps
    assert report.instructions["i2f"] <= 4
    assert report.instructions["lop3"] / weights_a_thread <= 1.7
