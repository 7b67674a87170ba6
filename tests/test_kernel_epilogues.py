"""Random chains of pointwise steps, printed as epilogues, against the same program run by torch."""

import os

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from hypothesis import HealthCheck, assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from fxcompress.codegen.ops.fused import evaluate  # noqa: E402
from fxcompress.codegen.spec import POINTWISE, Spec, name_of, parse  # noqa: E402
from fxcompress.codegen.triton.generate import generate, kind_of  # noqa: E402
from fxcompress.codegen.triton.interpreter import interpreter  # noqa: E402
from fxcompress.codegen.triton.kernel import Config  # noqa: E402
from fxcompress.core.errors import SpecError  # noqa: E402

ROWS, COLUMNS = 24, 32
SMOOTH = ["abs", "erf", "exp", "hardsigmoid", "hardswish", "mish", "neg", "relu", "relu6", "sigmoid", "silu", "square",
          "tanh"]  # fmt: skip
POLES = ["reciprocal({})", "rsqrt({})", "sqrt({})", "pow({}, exponent=-1)", "pow({}, exponent=-2)",
         "pow({}, exponent=0.5)", "pow({}, exponent=-0.5)", "pow({}, exponent=1.7)", "pow({}, exponent=-0.3)",
         "div({}, other=-1.5)"]  # fmt: skip
HALVES = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # the rounding of a cast, relative
tenths = st.integers(-15, 15).map(lambda n: n / 10)
SETTINGS = {
    "gelu": {"approximate": st.just("tanh")},
    "clamp": {"min": tenths, "max": tenths},
    "hardtanh": {"min_val": tenths, "max_val": st.just(float("inf"))},
    "leaky_relu": {"negative_slope": tenths},
    "softplus": {"beta": st.sampled_from([-0.5, 0.5, 2]), "threshold": st.sampled_from([20, 30])},
    "elu": {"alpha": tenths, "scale": st.just(1.25), "input_scale": st.just(0.75)},
    "pow": {"exponent": st.sampled_from([0, 1, 2, 3, 3.0, 6])},
}
NEEDED = {"clamp": ["min", "max"], "pow": ["exponent"]}  # some of these
BINARY = ["add", "div", "maximum", "minimum", "mul", "sub"]


@st.composite
def one_input(draw, value):
    """A step, or several where the function has a pole, which has no tolerance, or jumps."""
    kind = draw(st.sampled_from(["smooth", "set", "set", "pole", "cast"]))
    if kind == "smooth":
        return [f"{draw(st.sampled_from(SMOOTH))}({value})"]
    if kind == "pole":
        return [f"sigmoid({value})", "add(_, other=0.5)", draw(st.sampled_from(POLES)).format("_")]
    if kind == "cast":
        return [f"to({value}, dtype={draw(st.sampled_from(sorted(HALVES)))})", "to(_, dtype=float32)"]
    name = draw(st.sampled_from(sorted(SETTINGS)))
    given = draw(st.fixed_dictionaries({}, optional=SETTINGS[name]))
    if name in NEEDED and not given:
        needed = NEEDED[name][0]
        given = {needed: draw(SETTINGS[name][needed])}
    return [f"{name}({', '.join([value, *(f'{k}={v!r}' for k, v in given.items())])})"]


@st.composite
def programs(draw):
    """-> (spec text, shapes of the extras, leading sizes of x)."""
    lead = draw(st.sampled_from([[5], [2, 3], [1]]))
    kinds = [[ROWS], [1], [*lead, ROWS], [*lead, 1], [1] * len(lead) + [ROWS]]
    shapes = draw(st.lists(st.sampled_from(kinds), max_size=3))
    steps = [f"linear(x, float32[{ROWS}, {COLUMNS}], float32[{ROWS}])"]
    for _ in range(draw(st.integers(1, 7))):
        value = st.one_of(st.just("_"), st.sampled_from(plain(steps)).map("step[{}]".format))
        if draw(st.booleans()):
            steps += draw(one_input(draw(value)))
            continue
        name = draw(st.sampled_from(BINARY))
        if name == "div":
            steps += [f"sigmoid({draw(value)})", "add(_, other=0.5)", f"div({draw(value)}, _)"]
            continue
        tensor = st.one_of(
            value, st.sampled_from(["float32[1]", f"float32[{ROWS}]"]),
            *([st.integers(0, len(shapes) - 1).map("extra[{}]".format)] if shapes else []),
        )  # fmt: skip
        other = draw(tensor) if name in ("maximum", "minimum") else draw(st.one_of(tensor, st.just("other=0.75")))
        alpha = draw(st.sampled_from(["", ", alpha=2"])) if name in ("add", "sub") else ""
        first, second = (other, draw(value)) if draw(st.booleans()) and "=" not in other else (draw(value), other)
        steps.append(f"{name}({first}, {second}{alpha})")
    return " | ".join(steps), shapes, lead


def plain(steps):
    """Indices of the steps that make float32."""
    return [i for i, step in enumerate(steps) if not any(f"dtype={half}" in step for half in HALVES)]


def test_every_pointwise_op_has_a_line_and_is_drawn():
    drawn = {*SMOOTH, *SETTINGS, *BINARY, "to", *(pole.split("(")[0] for pole in POLES)}
    assert drawn == {name_of(op) for op in POINTWISE}
    needed = {"clamp": "min=0", "pow": "exponent=2", "to": "dtype=float16"}
    for op in POINTWISE:
        tensors = ["_", "step[0]"][: sum("Tensor" in str(a.type) for a in op._schema.arguments)]
        step = ", ".join([*tensors, *([needed[name_of(op)]] if name_of(op) in needed else [])])
        assert generate(parse(f"linear(x, float32[8, 8]) | {name_of(op)}({step})"), torch.float32).epilogue.lines


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(programs())
def test_a_printed_chain_is_what_torch_computes(tmp_path_factory, case):
    os.environ["FXCOMPRESS_CACHE"] = str(tmp_path_factory.getbasetemp() / "kernels")
    text, shapes, lead = case
    spec = parse(text)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*lead, COLUMNS, generator=generator)
    tensors = [torch.randn(constant.shape, generator=generator) for constant in spec.constants]
    tensors[0] /= COLUMNS**0.5
    extras = [torch.randn(shape, generator=generator) for shape in shapes[: spec.extras]]
    kinds = tuple(kind_of(e.shape, (*lead, ROWS)) for e in extras)
    kernel = generate(spec, torch.float32, kinds)
    with interpreter():
        (made,) = kernel(x, kernel.prepare(tensors), extras, Config(16, 32))
    exact = parse(text.replace("float32", "float64"))
    doubled = [[t.double() for t in ts] for ts in (tensors, extras)]
    (want,) = evaluate(exact, x.double(), *doubled)
    every = Spec(exact.steps, tuple(range(len(exact.steps))))
    largest = max(float(v.abs().max()) for v in evaluate(every, x.double(), *doubled))
    assume(largest < 1e4)  # squares of squares: float32 has no digits left to compare
    # An error of one value is multiplied by another at each step, at most; slopes of the functions are below 4. Where
    # there are casts the two may round to different sides.
    rounding = max([2.0**-23, *(2 * eps for half, eps in HALVES.items() if half in text)])
    room = 2 * rounding * (2 * max(1.0, largest)) ** 2 * len(exact.steps)
    assert made.dtype == torch.float32
    assert float((made.double() - want).abs().max()) <= room


def run(tail, rows=16, x=None, dtype=torch.float32):
    """-> (what the kernel gives for a product with the identity, what the body gives)."""
    x = torch.linspace(-6, 6, 5 * rows).view(5, rows).to(dtype) if x is None else x
    spec = parse(f"linear(x, {str(dtype)[6:]}[{rows}, {rows}]){tail}")
    weight = torch.eye(rows).to(dtype)
    kernel = generate(spec, dtype)
    with interpreter():
        made = kernel(x, [weight], [], Config(16, 16))
    return made, evaluate(spec, x, [weight], [])


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FXCOMPRESS_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))


@pytest.mark.parametrize("step", POLES)
def test_functions_with_poles_away_from_them(step):
    (made,), (want,) = run(f" | sigmoid(_) | add(_, other=0.5) | {step.format('_')}")
    torch.testing.assert_close(made, want, rtol=2**-18, atol=0)


@pytest.mark.parametrize("step", ["elu(_)", "softplus(_)", "softplus(_, beta=3, threshold=6)", "mish(_)"])
def test_small_results_keep_their_digits(step):
    """Differences such as e^v - 1 are not taken where they would cancel."""
    x = torch.cat([-torch.logspace(-6, 1.1, 40), torch.logspace(-6, 1.5, 40)]).view(5, 16)
    (made,), _ = run(f" | {step}", x=x)
    (want,) = evaluate(parse(f"linear(x, float64[16, 16]) | {step}"), x.double(), [torch.eye(16).double()], [])
    # e^u of a u rounded in float32, as far as -38: 38 * 2^-24.
    torch.testing.assert_close(made.double(), want, rtol=2**-18, atol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy: of poles, and of roots of negative numbers
@pytest.mark.parametrize("exponent", [0.5, -0.5, 1.7, 3, -3, 0, 101])
def test_powers_of_negative_numbers_and_zero_are_those_of_torch(exponent):
    x = torch.tensor([-2.0, -1.0, -0.25, 0.0, 0.25, 1.0, 2.0, 0.5]).repeat(2).view(1, 16)
    (made,), (want,) = run(f" | pow(_, exponent={exponent})", x=x)
    torch.testing.assert_close(made, want, rtol=2**-18, atol=0, equal_nan=True)


@pytest.mark.parametrize("step", ["relu(_)", "clamp(_, max=1)", "relu6(_)", "hardtanh(_)", "maximum(_, step[0])"])
def test_nan_goes_on(step):
    x = torch.full((1, 16), torch.nan)
    assert bool(run(f" | {step}", x=x)[0][0].isnan().all())


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "float16", "bfloat16", "float32"])
def test_an_output_has_the_dtype_it_is_cast_to(dtype):
    tail = f" | mul(_, other=9.7) | clamp(_, min=0) | to(_, dtype={dtype}) | outputs(step[0], _)"
    made, want = run(tail, dtype=torch.bfloat16)
    kernel = generate(parse(f"linear(x, bfloat16[16, 16]){tail}"), torch.bfloat16)
    assert kernel.results == [v.dtype for v in made] == [torch.bfloat16, want[1].dtype]
    # The body rounds to bfloat16 after each step; a whole number in between may fall to the other side.
    room = want[1].double().abs() * 2.0**-7 + (0 if want[1].is_floating_point() else 1)
    assert bool(((made[1].double() - want[1].double()).abs() <= room).all())


def test_a_cast_and_back_rounds_and_cuts():
    for dtype in ("float16", "bfloat16", "int8"):
        (made,), (want,) = run(f" | to(_, dtype={dtype}) | to(_, dtype=float32)")
        assert torch.equal(made, want)


def test_types_promote_as_in_the_body():
    tail = " | to(_, dtype=float32) | add(_, step[0]) | mul(step[0], float32[()]) | mul(step[0], float32[16])"
    spec = parse(f"linear(x, bfloat16[16, 16]){tail}")
    tensors = [torch.empty(c.shape, dtype=c.dtype) for c in spec.constants]
    every = Spec(spec.steps, tuple(range(5)))
    body = evaluate(every, torch.empty(2, 16, dtype=torch.bfloat16), tensors, [])
    assert generate(every, torch.bfloat16).results == [v.dtype for v in body]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("to(_, dtype=float64)", r"no epilogue for to\(torch\.float64,\)"),
        ("to(_, dtype=int64)", r"no epilogue for to\(torch\.int64,\)"),
        ("to(_, dtype=int8) | mul(_, other=2)", r"for mul of torch\.int8: after a cast to integers comes another"),
        ("pow(_, exponent=inf)", "no epilogue for pow with the exponent inf"),
        ("div(_, other=2, rounding_mode='floor')", "div takes self, other, each once"),
    ],
)
def test_what_cannot_be_right_is_named(step, message):
    with pytest.raises(SpecError, match=message):
        generate(parse(f"linear(x, float32[8, 8]) | {step}"), torch.float32)
