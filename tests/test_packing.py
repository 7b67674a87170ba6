"""Packing: codes come back as they went in, in the bytes that were promised; dequantize is its formula."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fxcompress.codegen.ops.dequantize import dequantize, stored_bytes
from fxcompress.codegen.packing import BITS, pack, packed_bytes, unpack
from fxcompress.core.metric import Metric
from fxcompress.passes.quantize import GROUP_SIZES, Quantize

SETTINGS = [Quantize(bits, group) for bits in BITS for group in GROUP_SIZES]


@st.composite
def coded(draw):
    bits = draw(st.sampled_from(BITS))
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=35))
    return bits, draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1)))


@given(coded())
def test_unpack_is_the_inverse_of_pack(case):
    bits, array = case
    codes = torch.from_numpy(array)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*codes.shape[:-1], packed_bytes(codes.shape[-1], bits))
    assert torch.equal(unpack(packed, bits, codes.shape[-1]), codes)


@given(coded())
def test_packed_bytes_are_the_bits_of_the_codes_little_end_first(case):
    bits, array = case
    row = array.reshape(-1, array.shape[-1])[0]
    stream = sum(int(code) << (bits * i) for i, code in enumerate(row))  # one long integer
    packed = pack(torch.from_numpy(row.copy()), bits).numpy()
    assert int.from_bytes(packed.tobytes(), "little") == stream


@given(coded())
def test_every_row_can_be_unpacked_alone(case):
    bits, array = case
    codes = torch.from_numpy(array.reshape(-1, array.shape[-1]))
    packed = pack(codes, bits)
    for i, row in enumerate(codes):
        assert torch.equal(unpack(packed[i], bits, codes.shape[1]), row)


@pytest.mark.parametrize(
    ("columns", "bits", "wanted"),
    [(8, 2, 2), (8, 3, 3), (8, 4, 4), (8, 8, 8), (9, 2, 4), (9, 3, 6), (9, 4, 8), (9, 8, 9), (1, 3, 3), (0, 4, 0)],
)
def test_eight_codes_fill_as_many_bytes_as_they_have_bits(columns, bits, wanted):
    assert packed_bytes(columns, bits) == wanted


def test_packing_takes_a_non_contiguous_tensor():
    codes = torch.arange(60, dtype=torch.uint8).reshape(6, 10).t() % 8
    assert not codes.is_contiguous()
    for bits in (3, 4, 8):
        assert torch.equal(unpack(pack(codes, bits), bits, 6), codes)


def by_the_formula(codes, scales, zeros, grid, bits, group):
    """w = s (q - z) in a plain loop, float64. codes (rows, columns), scales and zeros (rows, groups), all unpacked."""
    out = np.empty(codes.shape)
    for r, c in np.ndindex(codes.shape):
        g = c // (group or codes.shape[1])
        scale = 2.0 ** (float(grid[0]) + float(grid[1]) * int(scales[r, g]))
        zero = 2.0**bits * int(zeros[r, g]) / 16 - 0.5
        out[r, c] = scale * (int(codes[r, c]) - zero)
    return out


@given(st.sampled_from(SETTINGS), st.integers(1, 3), st.integers(1, 140), st.integers(0, 2**31))
def test_dequantize_is_its_formula(setting, rows, columns, seed):
    rng = np.random.default_rng(seed)
    group = setting.group(columns)
    groups = -(-columns // (group or columns))
    codes = rng.integers(0, 2**setting.bits, (rows, columns), dtype=np.uint8)
    scales = rng.integers(0, 256, (rows, groups), dtype=np.uint8)
    zeros = rng.integers(0, 16, (rows, groups), dtype=np.uint8)
    grid = np.array([rng.uniform(-12, 2), rng.uniform(0, 0.06)], np.float32)
    got = dequantize(
        pack(torch.from_numpy(codes), setting.bits),
        torch.from_numpy(scales),
        pack(torch.from_numpy(zeros), 4),
        torch.from_numpy(grid),
        setting.bits,
        group,
        columns,
        torch.float32,
    )
    want = by_the_formula(codes, scales, zeros, grid, setting.bits, group)
    # float32: the exponent (below 32 in size) is off by 2 roundings of 32 * 2^-24, times ln 2 in the power; exp2 itself
    # is good to 2 units in the last place, the product to half of one; q - z is exact.
    np.testing.assert_allclose(got.numpy(), want, rtol=2 * 32 * 2**-24 * np.log(2) + 3 * 2**-23, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_the_float32_answer_rounded_once(dtype):
    torch.manual_seed(0)
    encoded = Quantize(4, 32).encode(torch.randn(5, 70), Metric())
    args = [encoded[k] for k in Quantize.keys]
    exact = dequantize(*args, 4, 32, 70, torch.float32)
    assert torch.equal(dequantize(*args, 4, 32, 70, dtype), exact.to(dtype))


def test_no_rows_give_no_rows():
    made = Quantize(4, 32).empty(70)
    assert dequantize(*made.values(), 4, 32, 70, torch.float32).shape == (0, 70)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 31), (7, 32), (5, 33), (4, 64), (3, 65), (2, 129), (9, 200)])
def test_stored_bytes_are_the_bytes_encode_makes(setting, shape):
    torch.manual_seed(0)
    made = setting.encode(torch.randn(shape), Metric())
    real = sum(t.numel() * t.element_size() for t in made.values())
    assert setting.stored_bytes(*shape, 4) == real
    assert stored_bytes(*shape, setting.bits, setting.group(shape[1])) == real


def test_the_stored_width_is_bits_plus_twelve_bits_a_group():
    # 1024 columns in groups of 64: codes 4 bits, and 8 + 4 bits a group; the grid's 8 bytes come once a tensor.
    assert (stored_bytes(512, 1024, 4, 64) - 8) * 8 == 512 * 1024 * 4 + 512 * 16 * 12
