"""The interpreter gives the numbers a GPU would, and leaves the process able to compile for one."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402
from triton.language.extra import libdevice  # noqa: E402

from fxcompress.codegen.triton.ahead import compile_ahead  # noqa: E402
from fxcompress.codegen.triton.interpreter import interpreter, run  # noqa: E402

FLOATS = [torch.float16, torch.bfloat16, torch.float32]
every_float = pytest.mark.parametrize("dtype", FLOATS, ids=str)


@triton.jit
def scaled(a, b):
    return a * b


@triton.jit
def arithmetic(x, y, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + at, mask=at < n, other=0.0)
    b = tl.load(y + at, mask=at < n, other=0.0)
    tl.store(out + at, scaled(a, b) + a, mask=at < n)


@triton.jit
def product(x, y, out, K, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr):
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BK)
    acc = tl.zeros((M, N), tl.float32)
    for k in range(0, K, BK):
        a = tl.load(x + rows[:, None] * K + (k + inner)[None, :])
        b = tl.load(y + columns[None, :] * K + (k + inner)[:, None])
        acc = tl.dot(a, b, acc)
    tl.store(out + rows[:, None] * N + columns[None, :], acc)


@triton.jit
def converted(x, out, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


@triton.jit
def hyperbolic(x, out, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(out + at, libdevice.tanh(tl.load(x + at)))


@every_float
def test_arithmetic_rounds_after_every_operation_as_torch_does(dtype):
    x, y = torch.randn(2, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.full_like(x, torch.nan)
    run(arithmetic, (2,), x, y, out, 100, BLOCK=64)
    assert torch.equal(out, x * y + x)


@every_float
def test_a_product_is_accumulated_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 96, generator=generator).to(dtype), torch.randn(32, 96, generator=generator).to(dtype)
    out = torch.full((16, 32), torch.nan)
    run(product, (1,), x, y, out, 96, M=16, N=32, BK=32)
    want = x.double() @ y.double().T
    # Products of 16-bit floats are exact in float32; 96 of them are added up, whose sizes add to at most this.
    room = 96 * 2.0**-24 * (x.double().abs() @ y.double().abs().T)
    assert bool(((out - want).abs() <= room).all())


@pytest.mark.parametrize("target", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16], ids=str)
def test_conversions_round_to_the_nearest_even(target):
    x = torch.cat([torch.linspace(-400, 400, 1023), torch.logspace(-6, 2, 1025)])
    out = torch.zeros(2048, dtype=target)
    run(converted, (1,), x, out, n=2048)
    assert torch.equal(out.float(), x.to(target).float())


def test_libdevice_functions_are_there():
    x = torch.linspace(-4, 4, 64)
    out = torch.empty_like(x)
    run(hyperbolic, (1,), x, out, n=64)
    assert torch.equal(out, torch.tanh(x))


def test_compiling_works_before_and_after_and_finds_the_same():
    signature = {"x": "*bf16", "y": "*bf16", "out": "*fp32", "K": "i32"}
    constants = {"M": 64, "N": 64, "BK": 32}
    before = compile_ahead(product, signature, constants, 90)
    x = torch.ones(16, 32)
    with interpreter():
        product[(1,)](x, x, torch.empty(16, 16), 32, M=16, N=16, BK=32, num_warps=4)
    after = compile_ahead(product, signature, constants, 90)
    assert (before.registers, before.sass) == (after.registers, after.sass)
    assert after.faults(("wgmma",)) == []
    assert after.faults(("tma",)) == ["has no tma"]


def test_a_kernel_that_does_not_fit_is_a_fault():
    signature = {"x": "*fp32", "y": "*fp32", "out": "*fp32", "K": "i32"}
    report = compile_ahead(product, signature, {"M": 128, "N": 256, "BK": 128}, 80, warps=4, stages=4)
    assert any("shared memory, of 166912" in fault or "spills" in fault for fault in report.faults())
