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


def weight(bits, group, dtype):
    if bits == 16:
        return f"{dtype}[{SIZE}, {SIZE}]"
    groups = SIZE // group if group else 1
    types = f"uint8[{SIZE}, {packed_bytes(SIZE, bits)}], uint8[{SIZE}, {groups}], uint8[{SIZE}, {-(-groups // 2)}]"
    return f"dequantize({types}, float32[2], bits={bits}, group_size={group}, columns={SIZE}, dtype={dtype})"


def compiled(bits, group, dtype, config, arch):
    spec = parse(f"linear(x, {weight(bits, group, dtype)}, {dtype}[{SIZE}]) | gelu(_) | add(_, extra[0])")
    kernel = generate(spec, getattr(torch, dtype), ("full",))
    function, signature, constants = kernel.function(config), kernel.signature(config), kernel.constants(config)
    return compile_ahead(function, signature, constants, arch, config.warps, config.stages, unaligned=("M",))


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FXCOMPRESS_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))


@pytest.mark.parametrize("config", [DECODE, SPLIT, PREFILL], ids=["decode", "split", "prefill"])
@pytest.mark.parametrize(("bits", "group"), [(16, 0), (8, 0), (4, 64), (4, 128), (3, 64), (2, 64)])
def test_on_sm_90_nothing_spills_and_tensor_cores_are_used(bits, group, config):
    report = compiled(bits, group, "bfloat16", config, 90)
    assert report.faults(("wgmma", "cp.async")) == []


@pytest.mark.parametrize("arch", [80, 89, 100])
@pytest.mark.parametrize(("bits", "group"), [(16, 0), (4, 64)])
def test_on_other_cards_too(bits, group, arch):
    report = compiled(bits, group, "float16", DECODE, arch)
    assert report.faults() == []
    assert report.instructions[TENSOR_CORES[arch]] or report.instructions["mma"]


def test_four_bits_take_few_conversions():
    """Unpacking is shifts, masks and half-precision adds; integers are converted for scales and zeros alone."""
    report = compiled(4, 128, "bfloat16", DECODE, 90)
    weights_a_thread = 128 * 128 // 128  # a step of 128 columns and 128 rows, among four warps
    assert report.instructions["i2f"] <= 4
    assert report.instructions["lop3"] / weights_a_thread <= 1.7
