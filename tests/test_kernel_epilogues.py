"""Random chains of pointwise steps, printed as epilogues, against the same program run by torch."""

import os

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from hypothesis import HealthCheck, assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from fxcompress.codegen.ops.fused import evaluate  # noqa: E402
from fxcompress.codegen.spec import parse  # noqa: E402
from fxcompress.codegen.triton.epilogue import _BINARY, _UNARY  # noqa: E402
from fxcompress.codegen.triton.generate import generate, kind_of  # noqa: E402
from fxcompress.codegen.triton.interpreter import interpreter  # noqa: E402
from fxcompress.codegen.triton.kernel import Config  # noqa: E402

ROWS, COLUMNS = 24, 32
UNARY = [*sorted(set(_UNARY) - {"reciprocal", "rsqrt", "sqrt"}), "gelu"]  # poles have no tolerance; see below
BINARY = ["add", "sub", *sorted(set(_BINARY) - {"div"})]


@st.composite
def programs(draw):
    """-> (spec text, shapes of the extras, leading sizes of x)."""
    lead = draw(st.sampled_from([[5], [2, 3], [1]]))
    kinds = [[ROWS], [1], [*lead, ROWS], [*lead, 1], [1] * len(lead) + [ROWS]]
    shapes = draw(st.lists(st.sampled_from(kinds), max_size=3))
    steps = [f"linear(x, float32[{ROWS}, {COLUMNS}], float32[{ROWS}])"]
    for at in range(1, draw(st.integers(2, 8))):
        value = st.one_of(st.just("_"), st.integers(0, at - 1).map("step[{}]".format))
        if draw(st.booleans()):
            approximate = draw(st.sampled_from(["", ", approximate='tanh'"]))
            name = draw(st.sampled_from(UNARY))
            steps.append(f"{name}({draw(value)}{approximate if name == 'gelu' else ''})")
            continue
        name = draw(st.sampled_from(BINARY))
        tensor = st.one_of(value, *([st.integers(0, len(shapes) - 1).map("extra[{}]".format)] if shapes else []))
        other = draw(tensor) if name in ("maximum", "minimum") else draw(st.one_of(tensor, st.just("other=0.75")))
        alpha = draw(st.sampled_from(["", ", alpha=2"])) if name in ("add", "sub") else ""
        first, second = (other, draw(value)) if draw(st.booleans()) and "=" not in other else (draw(value), other)
        steps.append(f"{name}({first}, {second}{alpha})")
    return " | ".join(steps), shapes, lead


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(programs())
def test_a_printed_chain_is_what_torch_computes(tmp_path_factory, case):
    os.environ["FXCOMPRESS_CACHE"] = str(tmp_path_factory.getbasetemp() / "kernels")
    text, shapes, lead = case
    spec = parse(text)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*lead, COLUMNS, generator=generator)
    tensors = [torch.randn(ROWS, COLUMNS, generator=generator) / COLUMNS**0.5, torch.randn(ROWS, generator=generator)]
    extras = [torch.randn(shape, generator=generator) for shape in shapes[: spec.extras]]
    kinds = tuple(kind_of(e.shape, (*lead, ROWS)) for e in extras)
    kernel = generate(spec, torch.float32, kinds)
    with interpreter():
        (made,) = kernel(x, kernel.prepare(tensors), extras, Config(16, 32))
    exact = parse(text.replace("float32", "float64"))
    doubled = [[t.double() for t in ts] for ts in (tensors, extras)]
    (want,) = evaluate(exact, x.double(), *doubled)
    every = type(exact)(exact.steps, tuple(range(len(exact.steps))))
    largest = max(float(v.abs().max()) for v in evaluate(every, x.double(), *doubled))
    assume(largest < 1e4)  # squares of squares: float32 has no digits left to compare
    # An error of one value is multiplied by another at each step, at most; slopes of the functions are below 2.
    room = 2.0**-22 * (2 * max(1.0, largest)) ** 2 * len(exact.steps)
    assert float((made.double() - want).abs().max()) <= room


@pytest.mark.parametrize("name", ["reciprocal", "rsqrt", "sqrt"])
def test_functions_with_poles_away_from_them(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FXCOMPRESS_CACHE", str(tmp_path))
    spec = parse(f"linear(x, float32[16, 32]) | sigmoid(_) | add(_, other=0.5) | {name}(_)")
    x, w = torch.randn(3, 32), torch.randn(16, 32)
    with interpreter():
        (made,) = generate(spec, torch.float32)(x, [w], [])
    torch.testing.assert_close(made, evaluate(spec, x, [w], [])[0], rtol=2**-18, atol=0)
