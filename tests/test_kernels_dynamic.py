"""Kernels of products that round their inputs, interpreted, against the bodies of the ops."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from fxcompress.codegen.ops import float8_dynamic_linear, int8_dynamic_linear  # noqa: E402
from fxcompress.codegen.ops.fused import evaluate  # noqa: E402
from fxcompress.codegen.spec import parse  # noqa: E402
from fxcompress.codegen.triton import rounded  # noqa: E402
from fxcompress.codegen.triton.ahead import compile_ahead  # noqa: E402
from fxcompress.codegen.triton.build import load_source  # noqa: E402
from fxcompress.codegen.triton.generate import generate  # noqa: E402
from fxcompress.codegen.triton.interpreter import interpreter  # noqa: E402
from fxcompress.codegen.triton.kernel import Config  # noqa: E402
from tests.sites import normal  # noqa: E402
from tests.test_float8_dynamic import stored as floats  # noqa: E402
from tests.test_int8_dynamic import stored as integers  # noqa: E402

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
ROWS, TOKENS = 40, 7


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FXCOMPRESS_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))


def launched(op, stored, x, columns):
    """-> (kernel, what it gives, the spec, its constants)."""
    name, codes = str(x.dtype)[6:], {"int8": "int8", "float8": "uint8"}[op]
    types = f"{codes}[{ROWS}, {columns}], float32[{ROWS}], float32[{columns}], {name}[{ROWS}]"
    spec = parse(f"{op}_dynamic_linear(x, {types}) | relu(_)")
    tensors = [*stored(ROWS, columns), normal(ROWS, seed=4).to(x.dtype)]
    kernel = generate(spec, x.dtype)
    with interpreter():
        (made,) = kernel(x, kernel.prepare(tensors), [], Config(16, 32))
    return kernel, made, spec, tensors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [192, 100])
def test_integers_on_both_sides_are_multiplied_exactly(columns, dtype):
    x = normal(TOKENS, columns, seed=1).to(dtype)
    _, made, spec, tensors = launched("int8", integers, x, columns)
    (want,) = evaluate(spec, x, tensors, [])
    # The same integers, then a few roundings of float32 and one to dtype.
    room = torch.finfo(dtype).eps * want.double().abs() + 2**-20
    assert bool(((made.double() - want.double()).abs() <= room).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [256, 333])
def test_8_bit_floats_on_both_sides(columns, dtype):
    x = normal(TOKENS, columns, seed=1).to(dtype)
    _, made, _, (codes, scales, smooth, bias) = launched("float8", floats, x, columns)
    q, step = float8_dynamic_linear.rounded_tokens(x, smooth)
    weight = float8_dynamic_linear.numbers(codes).double() * scales.double().unsqueeze(1)
    want = (q.double() @ weight.T * step.double() + bias.double()).relu()
    # The same numbers q, whose products are exact: sums of `columns` of them in float32, three more roundings, and one
    # to dtype.
    size = q.double().abs() @ weight.abs().T * step.double() + bias.double().abs()
    room = torch.finfo(dtype).eps / 2 * want + (columns + 3) * 2.0**-24 * size
    assert bool(((made.double() - want).abs() <= room).all())


@pytest.mark.parametrize("op", ["int8", "float8"])
def test_tokens_are_rounded_to_the_very_numbers_of_the_body(op):
    """Columns past the last are zeros; a token of zeros has a scale, and gives the bias."""
    x = normal(TOKENS, 100, seed=1).half()
    x[3] = 0
    stored = {"int8": integers, "float8": floats}[op]
    kernel, made, _, tensors = launched(op, stored, x, 100)
    assert torch.equal(made[3], tensors[3].relu())
    prepared, workspace = kernel.prepare(tensors), kernel.workspace(x, Config())
    with interpreter():
        kernel.before(x, prepared, workspace, Config())
    body = {"int8": int8_dynamic_linear, "float8": float8_dynamic_linear}[op]
    q, step = body.rounded_tokens(x, tensors[2])
    assert torch.equal(workspace["q"].float()[:, :100], q)
    assert not bool(workspace["q"].float()[:, 100:].any())
    assert torch.equal(workspace["step"], step.flatten())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy: of NaN made an integer
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("op", ["int8", "float8"])
def test_nan_makes_its_token_nan_and_no_other(op, wrong):
    x = normal(TOKENS, 100, seed=1)
    x[2, 5] = wrong
    _, made, *_ = launched(op, {"int8": integers, "float8": floats}[op], x, 100)
    assert made.isnan().any(1).tolist() == [i == 2 for i in range(TOKENS)]


@pytest.mark.parametrize("op", ["int8", "float8"])
def test_no_tokens_give_an_empty_result_without_a_launch(op):
    stored = {"int8": integers, "float8": floats}[op]
    _, made, *_ = launched(op, stored, torch.empty(2, 0, 100).half(), 100)
    assert (made.shape, made.dtype) == ((2, 0, ROWS), torch.float16)


@pytest.mark.parametrize(("op", "kind", "archs"), [("int8", "int8", [80, 90]), ("float8", "uint8", [89, 90])])
def test_the_rounding_of_tokens_compiles(op, kind, archs):
    kernel = generate(parse(f"{op}_dynamic_linear(x, {kind}[64, 4096], float32[64], float32[4096])"), torch.bfloat16)
    assert kernel.least_arch == archs[0]
    types = kernel.signature(Config())
    signature = {"x": types["x"], "smooth": "*fp32", "q": types["q"], "step": "*fp32"}
    for arch in archs:
        report = compile_ahead(getattr(load_source(kernel.source), rounded.ROUND), signature, {}, arch, 4)
        assert report.faults() == []
