"""Tensor trains as generated kernels, interpreted, against the body of the op in float64."""

import math

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from fxcompress.codegen.ops.fused import evaluate  # noqa: E402
from fxcompress.codegen.spec import parse  # noqa: E402
from fxcompress.codegen.triton.generate import generate  # noqa: E402
from fxcompress.codegen.triton.interpreter import interpreter  # noqa: E402
from fxcompress.codegen.triton.kernel import Config  # noqa: E402
from fxcompress.codegen.triton.tensor_train import A, B  # noqa: E402
from fxcompress.core.errors import SpecError  # noqa: E402
from fxcompress.core.metric import Metric  # noqa: E402
from fxcompress.passes.quantize import Quantize  # noqa: E402
from tests.test_kernels import HALVES, normal  # noqa: E402
from tests.trains import train_of  # noqa: E402

TAIL = " | gelu(_) | add(_, extra[0])"
UP, DOWN = ((4, 4), (4, 4), (3, 12)), ((4, 4), (4, 4), (12, 3))  # 48 -> 192 and back
UNEVEN = ((2, 3), (3, 2), (5, 1), (1, 7))  # 30 columns, 42 rows, digits of 1 among them


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FXCOMPRESS_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))


def kept(core, bits, dtype):
    """-> (the core as a spec writes it, its constants, the core in float64): as it is where `bits` is 0."""
    name = str(dtype)[6:]
    if not bits:
        return f"{name}{list(core.shape)}", [core.to(dtype)], core.to(dtype).double()
    setting = Quantize(bits, 0)
    encoded = setting.encode(core.float(), Metric())
    tensors = [encoded[key] for key in setting.keys]
    types = ", ".join(f"{str(t.dtype)[6:]}{list(t.shape)}" for t in tensors)
    text = f"dequantize({types}, bits={bits}, group_size=0, columns={core.shape[1]}, dtype={{}})"
    weight = parse(f"linear(x, {text.format('float64')})")
    (columns,) = evaluate(weight, torch.eye(core.shape[1], dtype=torch.float64), tensors, [])
    return text.format(name), tensors, columns.T


def check(shapes, rank, tokens, dtype, bits=0, rows=None, tail=TAIL, tile=32):
    """The kernel against the body in float64, on the very numbers. -> the kernel"""
    cores, n, m, ranks = train_of(shapes, rank)
    scaled = [core / (r * size) ** 0.5 for core, r, size in zip(cores, ranks, n)]  # so that y is about as large as x
    texts, tensors, exact = zip(*(kept(core, bits, dtype) for core in scaled))
    rows, name = rows or math.prod(m), str(dtype)[6:]
    x, bias = normal(tokens, math.prod(n), seed=1).to(dtype), normal(rows, seed=3).to(dtype)
    extras = [normal(tokens, rows, seed=4).to(dtype)] if "extra" in tail else []
    product = f"tensor_train_linear(x, [{{}}], n={n}, m={m}, rows={rows}, bias={{}}[{rows}])"
    kernel = generate(parse(product.format(", ".join(texts), name) + tail), dtype, ("full",) * len(extras))
    prepared = kernel.prepare([*(t for own in tensors for t in own), bias])
    with interpreter():
        (made,) = kernel(x, prepared, extras, Config(16, tile))
    wide = [f"float64{list(core.shape)}" for core in exact]

    def body(x, cores, bias, tail):
        spec = parse(product.format(", ".join(wide), "float64") + tail)
        return evaluate(spec, x, [*cores, bias], [e.double() for e in extras[: spec.extras]])[0]

    want = body(x.double(), exact, bias.double(), tail)
    # Roundings to dtype: the two factors and z, each of relative size eps / 2. All three are bounded by the same
    # product of absolute values (`size`), whose factors are |cores| multiplied: at least the |factors|. The cores' own
    # decoding rounds to dtype too where they are coded. In float32: every sum in the order of the tensor's shape, at
    # most `terms` long. A GELU is nowhere steeper than 1.13; the result is rounded to dtype.
    size = body(x.double().abs(), [core.abs() for core in exact], torch.zeros_like(bias).double(), "")
    terms = math.prod(n) + sum(ranks) + kernel.loaders[0][1].columns + kernel.loaders[1][1].columns
    roundings = 3 + (len(cores) if bits else 0)
    eps = torch.finfo(dtype).eps / 2
    room = eps * want.abs() + 1.13 * size * ((1 + eps) ** roundings - 1 + 2 * terms * 2.0**-24) + 2.0**-20
    assert made.shape == want.shape
    worst = float(((made.double() - want).abs() - room).max()) if tokens else 0.0
    assert worst <= 0, f"{worst:.3g} too much, where {float(room.max()):.3g} is allowed"
    return kernel


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("shapes", [UP, DOWN, UNEVEN], ids=["up", "down", "uneven"])
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_a_train_with_its_epilogue(shapes, tokens, dtype):
    check(shapes, 5, tokens, dtype)


def test_either_half_may_come_first():
    """More rows than columns are had cheapest by the left half first, fewer by the right one."""
    orders = [check(shapes, 4, 2, torch.float32).ordered[0][0] for shapes in (UP, DOWN)]
    assert orders == [A, B]


@pytest.mark.parametrize("shapes", [UP, DOWN], ids=["up", "down"])
def test_rows_that_are_padding_are_not_written(shapes):
    check(shapes, 4, 7, torch.float16, rows=math.prod(m for _, m in shapes) - 5)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_coded_cores_are_decoded_once(bits, dtype):
    check(UP, 4, 5, dtype, bits)


def test_two_cores_and_tiles_that_are_full():
    check(((8, 64), (8, 8)), 8, 16, torch.float16, tail="", tile=64)


def test_the_factors_take_the_bytes_that_are_said():
    cores, n, m, _ = train_of(UP, 5, torch.float16)
    text = ", ".join(f"float16{list(core.shape)}" for core in cores)
    kernel = generate(parse(f"tensor_train_linear(x, [{text}], n={n}, m={m}, rows=192)"), torch.float16)
    (n_a, m_a), (n_b, m_b) = (loader.digits for _, loader in kernel.loaders)
    assert sum(t.numel() for t in kernel.prepare(cores)) == 5 * (m_a * n_a + m_b * n_b)


def test_no_tokens_give_an_empty_result_without_a_launch():
    cores, n, m, _ = train_of(UNEVEN, 2, torch.float16)
    text = ", ".join(f"float16{list(core.shape)}" for core in cores)
    kernel = generate(parse(f"tensor_train_linear(x, [{text}], n={n}, m={m}, rows=40)"), torch.float16)
    (made,) = kernel(torch.empty(2, 0, 30).half(), kernel.prepare(cores), [])
    assert (made.shape, made.dtype) == ((2, 0, 40), torch.float16)


def test_a_single_core_is_refused():
    with pytest.raises(SpecError, match="a train of one core is a whole weight: there is nothing to contract"):
        generate(parse("tensor_train_linear(x, [float16[8, 4]], n=[8], m=[4], rows=4)"), torch.float16)
