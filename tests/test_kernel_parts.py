"""What every kernel is made of, one part at a time: words, unpacking, activations."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from fxcompress.codegen.triton import parts  # noqa: E402
from fxcompress.codegen.triton.interpreter import run  # noqa: E402
from fxcompress.codegen.triton.words import PLANES, Words  # noqa: E402
from fxcompress.core.errors import SpecError  # noqa: E402

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def read_words(words, out, columns, BITS: tl.constexpr, PLANES: tl.constexpr, WIDTH: tl.constexpr):
    row, step = tl.program_id(0), tl.program_id(1)
    word = tl.load(words + (row * tl.num_programs(1) + step) * WIDTH + tl.arange(0, WIDTH)[None, :])
    for plane in tl.static_range(PLANES):
        column = step * PLANES * 2 * WIDTH + plane * 2 * WIDTH + tl.arange(0, 2 * WIDTH)[None, :]
        values = parts.word_plane(word, plane, BITS, out.dtype.element_ty)
        tl.store(out + row * columns + column, values, mask=column < columns)


@triton.jit
def read_e4m3(words, out):
    word = tl.load(words + tl.program_id(0) * 16 + tl.arange(0, 16)[None, :])
    for plane in tl.static_range(2):
        column = tl.program_id(0) * 64 + plane * 32 + tl.arange(0, 32)[None, :]
        tl.store(out + column, parts.word_e4m3(word, plane, out.dtype.element_ty))


@triton.jit
def activations(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    v = tl.load(x + at)
    tl.store(out + at, parts.tanh(v))
    tl.store(out + N + at, parts.gelu(v))
    tl.store(out + 2 * N + at, parts.gelu_tanh(v))
    tl.store(out + 3 * N + at, parts.silu(v))
    tl.store(out + 4 * N + at, parts.softplus(v, 1.0, 20.0))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(PLANES)), st.sampled_from([8, 16, 32]), st.integers(1, 5), st.integers(1, 700))
def test_words_read_back(bits, width, rows, columns):
    codes = torch.randint(2**bits, (rows, columns), generator=torch.Generator().manual_seed(columns), dtype=torch.uint8)
    layout = Words(bits, width)
    words = layout.pack(codes)
    assert words.shape == (rows, layout.steps(columns) * width)
    assert torch.equal(layout.unpack(words, columns), codes)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("bits", PLANES)
def test_every_code_of_every_plane_is_unpacked_exactly(bits, dtype):
    layout = Words(bits, 16)
    columns = max(2**bits * 2, 3 * layout.step - 5)
    codes = (torch.arange(2 * columns) % 2**bits).to(torch.uint8).view(2, columns)
    out = torch.full((2, columns), torch.nan, dtype=dtype)
    grid = (2, layout.steps(columns))
    run(read_words, grid, layout.pack(codes), out, columns, BITS=bits, PLANES=layout.planes, WIDTH=16)
    assert torch.equal(out, codes.to(dtype) - 2 ** (bits - 1))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_e4m3_number_is_unpacked_exactly(dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    out = torch.empty(256, dtype=dtype)
    run(read_e4m3, (4,), Words(8).pack(codes.unsqueeze(0)), out)
    want = codes.view(torch.float8_e4m3fn).float()
    finite = ~want.isnan()
    assert torch.equal(out.float()[finite], want[finite])


def test_activations_are_those_of_torch():
    x = torch.linspace(-30, 30, 512)
    out = torch.empty(5, 512)
    run(activations, (1,), x, out, N=512)
    functional = torch.nn.functional
    want = [x.tanh(), functional.gelu(x), functional.gelu(x, approximate="tanh"), functional.silu(x)]
    for made, wanted in zip(out, [*want, functional.softplus(x)]):
        # x times a factor that is off by two roundings of 1 in float32.
        torch.testing.assert_close(made, wanted, rtol=0, atol=30 * 2 * 2**-24)


def test_bits_without_a_layout_are_refused():
    with pytest.raises(SpecError, match="words of 5 bits: allowed are 2, 3, 4, 8"):
        Words(5)
