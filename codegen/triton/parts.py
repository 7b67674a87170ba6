"""Device functions that every generated kernel shares: an ordinary file, with line numbers and tests of its own.

Unpacking turns integers into floats without a conversion: the bits of a small integer are put into the mantissa of a
power of two, which is then taken off again. 0x6400 is 1024 in float16, whose last ten bits count ones; 0x4300 is 128 in
bfloat16, whose last seven do. Every intermediate is a number of the format, so all of it is exact.

    word_plane      plane i of int32 words (fxcompress.codegen.triton.words), minus MIDDLE
    word_e4m3       the same of 8-bit floats

No inline assembly, and of libdevice only what the interpreter is given too.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def pair(word, FLOAT: tl.constexpr):
    """int32 (..., n) whose halves are 16-bit floats -> (..., 2 n), neighbours side by side. Moves nothing on sm_90."""
    low, high = word.to(tl.uint16), (word >> 16).to(tl.uint16)
    return tl.interleave(low.to(FLOAT, bitcast=True), high.to(FLOAT, bitcast=True))


@triton.jit
def word_plane(word, PLANE: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr):
    """Plane PLANE of words (rows, width) -> codes - 2^(BITS - 1), (rows, 2 width) of FLOAT, exact.

    FLOAT is float16, bfloat16 or float32.
    """
    MIDDLE: tl.constexpr = 2.0 ** (BITS - 1)
    word = word.to(tl.uint32, bitcast=True)
    if tl.float32 == FLOAT:
        return word_plane(word, PLANE, BITS, tl.float16).to(tl.float32)
    elif BITS == 8 and tl.bfloat16 == FLOAT:
        # Seven bits of mantissa: the high half of the code times 16, plus the low one.
        both = (word >> (8 * PLANE)) & 0x00FF00FF
        high = pair(((both >> 4) & 0x000F000F) | 0x43004300, FLOAT) - 136.0
        return high * 16.0 + (pair((both & 0x000F000F) | 0x43004300, FLOAT) - 128.0)
    elif BITS == 4 and tl.float16 == FLOAT:
        # Odd planes stay where they are in the mantissa, 16 times their value: one shift serves two planes.
        both = word >> (8 * (PLANE // 2))
        if PLANE % 2 == 0:
            return pair((both & 0x000F000F) | 0x64006400, FLOAT) - 1032.0
        else:
            return pair((both & 0x00F000F0) | 0x64006400, FLOAT) * 0.0625 - 72.0
    else:
        MASK: tl.constexpr = (2**BITS - 1) * 0x00010001
        if tl.float16 == FLOAT:
            return pair(((word >> (BITS * PLANE)) & MASK) | 0x64006400, FLOAT) - (1024.0 + MIDDLE)
        else:
            return pair(((word >> (BITS * PLANE)) & MASK) | 0x43004300, FLOAT) - (128.0 + MIDDLE)


@triton.jit
def word_e4m3(word, PLANE: tl.constexpr, FLOAT: tl.constexpr):
    """Plane PLANE of words (rows, width) that hold e4m3 numbers -> (rows, 2 width) of FLOAT, exact but for NaN.

    By moving bits and one multiplication: sm_80 has no such conversion.
    """
    both = word.to(tl.uint32, bitcast=True) << (8 * (1 - PLANE))  # sign, exponent and mantissa lead each half
    sign = both & 0x80008000
    if tl.bfloat16 == FLOAT:
        return pair(sign | ((both >> 4) & 0x07F007F0), FLOAT) * 1.329227995784916e36  # 2^120
    else:
        return (pair(sign | ((both >> 1) & 0x3F803F80), tl.float16) * 256.0).to(FLOAT)


@triton.jit
def nearest(v):
    """float32 below 2^22 -> the nearest whole number, ties to even: there is room for no fraction above 2^23."""
    return (v + 12582912.0) - 12582912.0


@triton.jit
def maximum(a, b):
    """NaN where either is, as torch has it: a mistake stays loud."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(a, b):
    """NaN where either is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clamp(v, low, high):
    """`high` where low > high."""
    return minimum(maximum(v, low), high)


@triton.jit
def power(v, N: tl.constexpr):
    """v^N, N a whole number from 1 on, by at most 2 log2(N) products."""
    if N == 1:
        return v
    elif N % 2 == 1:
        return v * power(v, N - 1)
    else:
        half = power(v, N // 2)
        return half * half


@triton.jit
def expm1(v):
    """e^v - 1 to float32's precision: seven terms near 0, where the difference would cancel (rest < 0.35^7 / 8!)."""
    series = 1.0 / 720.0 + v * (1.0 / 5040.0)
    series = 1.0 / 6.0 + v * (1.0 / 24.0 + v * (1.0 / 120.0 + v * series))
    return tl.where(tl.abs(v) < 0.35, v * (1.0 + v * (0.5 + v * series)), tl.exp(v) - 1.0)


@triton.jit
def log1p(v):
    """log(1 + v) to float32's precision, v >= 0: what rounding 1 + v lost is put back by a quotient."""
    u = 1.0 + v
    return tl.where(u == 1.0, v, tl.log(u) * (v / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def tanh(v):
    return 2.0 * tl.sigmoid(2.0 * v) - 1.0


@triton.jit
def gelu(v):
    return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))


@triton.jit
def gelu_tanh(v):
    return v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))


@triton.jit
def silu(v):
    return v * tl.sigmoid(v)


@triton.jit
def softplus(v, beta, threshold):
    """log(1 + e^(beta v)) / beta, by the larger of 0 and v so that nothing overflows; v itself past the threshold."""
    scaled = beta * v
    smooth = maximum(scaled, 0.0) + log1p(tl.exp(-tl.abs(scaled)))
    return tl.where(scaled > threshold, v, smooth / beta)


@triton.jit
def mish(v):
    """v tanh(softplus(v)); with e = e^v the tanh is n / (n + 2), n = e (e + 2), and 1 in float32 from v = 20 on."""
    e = tl.exp(tl.minimum(v, 20.0))
    n = e * (e + 2.0)
    return v * (n / (n + 2.0))


@triton.jit
def elu(v, alpha, scale, input_scale):
    return scale * tl.where(v > 0.0, v, alpha * expm1(input_scale * v))


@triton.jit
def popcount(word):
    """int32 -> how many of its bits are set."""
    return libdevice.popc(word)


@triton.jit
def kept(values, start, word, FLOAT: tl.constexpr):
    """Bits `word` (rows,) -> (rows, 32) of FLOAT: where bit j is set, the value at `start` + the bits set below j."""
    column = tl.arange(0, 32)[None, :]
    rank = popcount(word[:, None] & ((1 << column) - 1))
    some = (word[:, None] & (1 << column)) != 0
    return tl.load((values + start)[:, None] + rank, mask=some, other=0.0).to(FLOAT)


@triton.jit
def column_of(places, at, TILE: tl.constexpr, NEAR: tl.constexpr):
    """Kept columns `at` -> columns of x. NEAR of them are neighbours, the first a multiple of NEAR, which is said."""
    column = tl.load(places + at // TILE) * TILE + at % TILE
    return tl.max_contiguous(tl.multiple_of(column, NEAR), NEAR)


@triton.jit
def code_at(codes, column, inside, BITS: tl.constexpr):
    """Codes of `column` in a row as files pack it (fxcompress.codegen.packing), float32. Only 3 bits straddle bytes."""
    at = column * BITS
    code = tl.load(codes + at // 8, mask=inside, other=0).to(tl.int32)
    if BITS == 3:
        code |= tl.load(codes + at // 8 + 1, mask=inside & (at % 8 > 5), other=0).to(tl.int32) << 8
    return ((code >> (at % 8)) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def scale_at(scales, grid, group, inside):
    code = tl.load(scales + group, mask=inside, other=0).to(tl.float32)
    return tl.exp2(tl.load(grid) + tl.load(grid + 1) * code)


@triton.jit
def zero_at(zeros, group, inside, BITS: tl.constexpr):
    code = (tl.load(zeros + group // 2, mask=inside, other=0).to(tl.int32) >> (4 * (group % 2))) & 15
    return code.to(tl.float32) * (2.0**BITS / 16.0) - 0.5


@triton.jit
def byte_e4m3(code):
    """uint8 bits of e4m3 numbers -> float32, exact: the exponent is eight too small in float16."""
    bits = code.to(tl.uint16)
    small = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), small.to(tl.float32) * 256.0)
