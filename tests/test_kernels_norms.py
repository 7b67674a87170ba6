"""Norms: in kernels that own whole rows, and inside the products that read them, against torch in float64."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from fxcompress.codegen.ops.fused import evaluate  # noqa: E402
from fxcompress.codegen.spec import parse  # noqa: E402
from fxcompress.codegen.triton import launch  # noqa: E402
from fxcompress.codegen.triton.card import H200  # noqa: E402
from fxcompress.codegen.triton.generate import generate  # noqa: E402
from fxcompress.codegen.triton.interpreter import interpreter  # noqa: E402
from fxcompress.codegen.triton.kernel import Config  # noqa: E402
from fxcompress.codegen.triton.norm import Norm, norm_of  # noqa: E402
from fxcompress.codegen.triton.pieces import folded, pieces  # noqa: E402
from fxcompress.core.errors import SpecError  # noqa: E402
from tests.test_kernels import dense, normal, quantized, two_of_four, unpacked  # noqa: E402

HALVES = [torch.float16, torch.bfloat16]
DTYPES = [*HALVES, torch.float32]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FXCOMPRESS_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))


def layer(name, size, x="x"):
    return f"layer_norm({x}, normalized_shape=[{size}], weight={name}[{size}], bias={name}[{size}], eps=1e-06)"


def rms(name, size, x="x"):
    return f"rms_norm({x}, normalized_shape=[{size}], weight={name}[{size}], eps=1e-06)"


def written_out(name, size, x="x"):
    """An RMSNorm as Llama's is captured."""
    steps = f"to({x}, dtype=float32) | pow(_, exponent=2) | mean(_, dim=[-1], keepdim=True) | add(_, 1e-06) | rsqrt(_)"
    return f"{steps} | mul(step[0], _) | to(_, dtype={name}) | mul({name}[{size}], _)"


NORMS = {"layer": layer, "rms": rms, "written out": written_out}


def run(spec, x, tensors, extras=(), config=None, kinds=()):
    kernel = generate(spec, x.dtype, kinds)
    with interpreter():
        return kernel(x, kernel.prepare(tensors), list(extras), config or kernel.rule(len(x), 132))


def exactly(spec, x, tensors, extras=()):
    """The same program in float64."""
    text = str(spec)
    for name in ("bfloat16", "float16", "float32"):
        text = text.replace(name, "float64")
    text = text.replace("float64[2]", "float32[2]")  # the grid of a quantized weight
    doubled = [t.double() if t.is_floating_point() and t.shape != (2,) else t for t in tensors]
    return evaluate(parse(text), x.double(), doubled, [e.double() for e in extras])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("tokens", "size"), [(1, 64), (21, 100), (40, 7)])
def test_a_norm_of_whole_rows(tokens, size, norm, dtype):
    name = str(dtype)[6:]
    spec = parse(f"{NORMS[norm](name, size)} | gelu(_) | add(_, extra[0])")
    x, extra = normal(tokens, size).to(dtype), normal(tokens, size, seed=5).to(dtype)
    own = [normal(size, seed=1).to(dtype), normal(size, seed=2).to(dtype)][: len(spec.constants)]
    (made,) = run(spec, x, own, [extra], kinds=("full",))
    (want,) = exactly(spec, x, own, [extra])
    # The casts that a written-out norm has are done where they stand; otherwise float32 to one rounding at the end.
    (value,) = exactly(parse(NORMS[norm](name, size)), x, own)
    inner = torch.finfo(dtype).eps * 1.2 * value.abs() if norm == "written out" else 0.0
    room = torch.finfo(dtype).eps / 2 * want.abs() + inner + (size + 20) * 2.0**-24 * (1 + value.abs())
    assert bool(((made.double() - want).abs() <= room).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("kept", ["dense", "zeros", "row", "2:4"])
def test_a_norm_inside_the_product_that_reads_it(kept, split, norm, dtype):
    rows, columns, tokens = 40, 416, 5
    name = str(dtype)[6:]
    weight, tensors = {
        "dense": lambda: dense(rows, columns, dtype), "zeros": lambda: quantized(rows, columns, dtype, 4, 64),
        "row": lambda: quantized(rows, columns, dtype, 8, 0), "2:4": lambda: two_of_four(rows, columns, dtype),
    }[kept]()  # fmt: skip
    before = NORMS[norm](name, columns)
    spec = parse(f"{before} | linear(_, {weight}, {name}[{rows}]) | relu(_)")
    own = [(1 + normal(columns, seed=1) / 4).to(dtype), normal(columns, seed=2).to(dtype)]
    own = own[: len(parse(before).constants)]
    bias = normal(rows, seed=3).to(dtype)
    x = (normal(tokens, columns, seed=4) * 3 + 0.5).to(dtype)
    (made,) = run(spec, x, [*own, *tensors, bias], config=Config(16, 32, split))
    (want,) = exactly(spec, x, [*own, *tensors, bias])
    # g x is rounded to dtype, each by half an eps of itself, and all is divided by r. float32: sums of `columns`
    # products and, for a layer norm, the difference of two sums as large as W |g x| each.
    scaled = x.double().abs() * own[0].double().abs()
    if norm == "layer":
        scaled = scaled + x.double().mean(1, keepdim=True).abs() * own[0].double().abs()
    centred = x.double() - (x.double().mean(1, keepdim=True) if norm == "layer" else 0.0)
    size = scaled @ unpacked(weight, tensors, columns, dtype).abs().T / centred.square().mean(1, keepdim=True).sqrt()
    eps = torch.finfo(dtype).eps
    room = eps / 2 * want.abs() + eps / 2 * size + 4 * (columns + 8) * 2.0**-24 * (size + 1)
    assert float(((made.double() - want).abs() - room).max()) <= 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_eps_that_is_left_out_is_that_of_torch(dtype):
    """Small x, so that it matters: of float32 for 16 bits as well."""
    x = (normal(4, 16) * 1e-3).to(dtype)
    (made,) = run(spec := parse("rms_norm(x, normalized_shape=[16])"), x, [])
    torch.testing.assert_close(made, evaluate(spec, x, [], [])[0], rtol=torch.finfo(dtype).eps, atol=1e-6)


def example(text, tokens):
    spec = parse(text)
    tensors = []
    for number, constant in enumerate(spec.constants):
        if constant.dtype is torch.uint8:
            generator = torch.Generator().manual_seed(number)
            tensors.append(torch.randint(0, 256, constant.shape, dtype=torch.uint8, generator=generator))
        elif constant.shape == (2,):
            tensors.append(torch.tensor([-6.0, 1 / 128]))
        else:
            tensors.append((normal(*constant.shape, seed=number) / 8).to(constant.dtype))
    extras = [normal(*tokens, 48, seed=90 + i).bfloat16() for i in range(spec.extras)]
    return spec, normal(*tokens, 128, seed=99).bfloat16(), tensors, extras


Q = quantized(48, 128, torch.bfloat16)[0]
SQUARE = "low_rank_linear(x, bfloat16[8, 128], bfloat16[128, 8])"
LN, RMS = layer("bfloat16", 128), written_out("bfloat16", 128)
PROGRAMS = {
    "q, k, v": f"{RMS} | linear(_, {Q}) | linear(step[7], {Q}) | outputs(step[8], _)",
    "gated": f"{LN} | linear(_, {Q}) | silu(_) | linear(step[0], {Q}) | mul(step[2], _)",
    "rows": f"{layer('bfloat16', 128, 'rows')} | linear(_, {Q}) | unrows(_) | add(_, extra[0])",
    "low rank": f"{LN} | low_rank_linear(_, bfloat16[8, 128], bfloat16[48, 8])",
    "after": f"linear(x, {Q}) | add(_, extra[0]) | {layer('bfloat16', 48, '_')} | mul(_, 0.5)",
    "after, on itself": f"{SQUARE} | add(x, _) | {layer('bfloat16', 128, '_')}",
}


@pytest.mark.parametrize("tokens", [(2, 3), (2, 20)], ids=["few", "many"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_with_norms_are_what_their_body_says(name, tokens, caplog):
    spec, x, tensors, extras = example(PROGRAMS[name], tokens)
    with interpreter():
        made = launch.run(spec, x, tensors, extras, H200, name)
    assert caplog.records == []
    want = evaluate(spec, x, tensors, extras)
    for got, wanted in zip(made, want, strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        # Both round to bfloat16 here and there: a few times 2^-9 of the largest number on the way.
        assert float((got.float() - wanted.float()).abs().max()) <= 6 * 2.0**-9 * float(wanted.abs().max())


def test_where_a_norm_is_done():
    def told(program, cut):
        return [" ".join(call.name for call in piece.spec.steps) for piece in cut(parse(PROGRAMS[program]))]

    assert told("gated", pieces) == ["layer_norm", "linear silu", "linear mul"]
    assert told("gated", folded) == ["layer_norm linear silu", "layer_norm linear mul"]
    assert told("low rank", folded) == told("low rank", pieces) == ["layer_norm", "low_rank_linear"]
    assert told("after", folded) == told("after", pieces) == ["linear add", "layer_norm mul"]
    # The norm itself is asked for: it must be written out anyway.
    shared = parse(f"{LN} | linear(_, {Q}) | outputs(step[0], _)")
    assert folded(shared) == pieces(shared)


@pytest.mark.parametrize(
    ("text", "norm"),
    [
        (layer("float32", 8), Norm(True, 1e-6, True, True)),
        ("layer_norm(x, normalized_shape=[8])", Norm(True, 1e-5, False, False)),
        (rms("float32", 8), Norm(False, 1e-6, True, False)),
        ("rms_norm(rows, normalized_shape=[8])", Norm(False, None, False, False)),
        (written_out("bfloat16", 8), Norm(False, 1e-6, True, False)),
        ("pow(x, exponent=2) | mean(_, dim=[-1], keepdim=True) | add(_, 1e-05) | rsqrt(_) | mul(x, _)",
         Norm(False, 1e-5, False, False)),
        ("pow(x, exponent=3) | mean(_, dim=[-1], keepdim=True) | add(_, 1e-05) | rsqrt(_) | mul(x, _)", None),
        ("pow(x, exponent=2) | mean(_, dim=[-1], keepdim=True) | add(_, 1e-05) | rsqrt(_) | mul(step[0], _)", None),
        ("relu(x)", None),
    ],
)  # fmt: skip
def test_norms_are_recognised(text, norm):
    assert norm_of(parse(text).steps) == norm


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pow(x, exponent=2) | mean(_, dim=[-1], keepdim=True) | sub(x, _)", "rows whose length no norm and no cons"),
        ("mul(x, float32[8]) | mean(_, dim=[-1], keepdim=True)", "no kernel that writes one number a row"),
        ("layer_norm(x, normalized_shape=[20000])", "rows of 20000 features do not stay on the chip: at most 16,384"),
        (f"{LN} | low_rank_linear(_, float32[8, 128], float32[8, 8])", "no kernel for low_rank_linear behind layer_n"),
        (f"relu(x) | linear(_, {Q})", "there is no kernel for linear behind relu"),
    ],
)
def test_what_cannot_be_emitted_is_named(text, message):
    with pytest.raises(SpecError, match=message):
        generate(parse(text), torch.float32)
