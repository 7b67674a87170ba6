"""The text of a fused node: printed, parsed, refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fxcompress.codegen.ops  # noqa: F401 - the ops a spec may name
from fxcompress.codegen.spec import (
    OF_CONSTANTS,
    POINTWISE,
    PRODUCTS,
    Call,
    Constant,
    Extra,
    Input,
    Spec,
    Value,
    beside,
    name_of,
    op_of,
    parse,
)
from fxcompress.core.errors import SpecError

aten = torch.ops.aten
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int16, torch.int64)
LINEAR = "linear(x, float32[4, 3])"

sizes = st.integers(0, 2**40)
scalars = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.sampled_from([math.inf, -math.inf, -0.0, 5e-324, 0.1 + 0.2]),
)
constants = st.builds(Constant, st.sampled_from(DTYPES), st.lists(sizes, max_size=4).map(tuple))
literals = st.one_of(scalars, st.booleans(), st.text(), st.sampled_from(DTYPES), st.lists(scalars).map(tuple))


@st.composite
def weights(draw, depth=2):
    """A constant, or a call of constants."""
    kind = draw(st.sampled_from(["constant", "t", "dequantize", "list"])) if depth else "constant"
    if kind == "t":
        return Call("t", (draw(weights(depth - 1)),))
    if kind == "dequantize":
        args = tuple(draw(st.one_of(constants, st.none())) for _ in range(4))
        named = [("bits", draw(scalars)), ("group_size", draw(scalars)), ("dtype", draw(st.sampled_from(DTYPES)))]
        return Call("dequantize", args, tuple(named))
    return tuple(draw(st.lists(constants, max_size=3))) if kind == "list" else draw(constants)


@st.composite
def specs(draw):
    steps = []
    for at in range(draw(st.integers(1, 6))):
        earlier = st.builds(Value, st.integers(0, at - 1)) if at else st.just(Input())
        operand = st.one_of(earlier, st.builds(Input, st.booleans()), st.builds(Extra, st.integers(0, 3)), scalars)
        call = st.one_of(
            st.builds(lambda x, w, b: Call("linear", (x, w, b)), operand, weights(), constants),
            st.builds(lambda x, w: Call("low_rank_linear", (x, w, w)), operand, weights()),
            st.builds(lambda a, b, v: Call("add", (a, b), (("alpha", v),)), operand, operand, literals),
            st.builds(lambda a, v: Call("gelu", (a,), (("approximate", v),)), operand, literals),
            st.builds(lambda a, v: Call("to", (a,), (("dtype", v),)), operand, literals),
            st.builds(lambda a: Call("unrows", (a,)), operand),
        )
        steps.append(draw(call))
    every = st.lists(st.integers(0, len(steps) - 1), min_size=1, unique=True)
    return Spec(tuple(steps), tuple(draw(st.one_of(st.just([len(steps) - 1]), every))))


@given(specs())
def test_a_spec_parses_back(spec):
    again = parse(str(spec))
    # repr as well: 1, 1.0 and True are equal to one another, and so are 0.0 and -0.0
    assert (again, repr(again), str(again)) == (spec, repr(spec), str(spec))


def test_the_text_reads_as_it_is_documented():
    text = (
        "linear(x, dequantize(uint8[1536, 192], uint8[1536, 6], None, float32[2], bits=4, group_size=64, columns=384, "
        "dtype=float32), float32[1536]) | gelu(_, approximate='tanh') | mul(step[0], _) | add(_, extra[0])"
    )
    spec = parse(text)
    assert str(spec) == text
    assert [step.name for step in spec.steps] == ["linear", "gelu", "mul", "add"]
    assert [tuple(c.shape) for c in spec.constants] == [(1536, 192), (1536, 6), (2,), (1536,)]
    assert spec.extras == 1
    assert spec.steps[2] == Call("mul", (Value(0), Value(1)))
    assert str(parse(" linear( x,float32[4,3] )|mul( step[0],extra[0] ) ")) == f"{LINEAR} | mul(_, extra[0])"


def test_a_scalar_constant_and_several_outputs_are_written_too():
    text = f"{LINEAR} | mul(_, float32[()]) | relu(rows) | outputs(step[1], _)"
    assert parse(text).outputs == (1, 2)
    assert parse(text).constants[1] == Constant(torch.float32, ())
    assert str(parse(text)) == text
    assert str(parse(f"{LINEAR} | outputs(_)")) == LINEAR


def test_every_op_has_a_name_of_its_own():
    ops = PRODUCTS + OF_CONSTANTS + POINTWISE
    assert [op_of(name_of(op)) for op in ops] == list(ops)
    assert op_of("low_rank_linear") is torch.ops.fxcompress.low_rank_linear.default


def test_one_call_has_one_text():
    x, w, b = Input(), Constant(torch.float32, (4, 3)), Constant(torch.float32, (4,))
    given_default = Call.of(aten.gelu.default, {"self": Value(0), "approximate": "none"})
    assert given_default == Call.of(aten.gelu.default, {"self": Value(0)})
    assert Call.of(aten.linear.default, {"input": x, "weight": w, "bias": None}) == Call("linear", (x, w))
    assert Call.of(aten.linear.default, {"bias": b, "weight": w, "input": x}) == Call("linear", (x, w, b))
    # 1.0 is not the default 1: dtypes can depend on it
    assert Call.of(aten.add.Tensor, {"self": x, "other": 2, "alpha": 1.0}) == Call("add", (x, 2), (("alpha", 1.0),))


def test_programs_beside_each_other_keep_their_own_steps_and_extras():
    one, two = parse(f"{LINEAR} | add(_, extra[0])"), parse(f"{LINEAR} | relu(_) | mul(step[0], extra[1])")
    both = beside([one, two], [(1,), (0, 1)])
    assert str(both) == (
        f"{LINEAR} | add(_, extra[1]) | {LINEAR} | relu(_) | mul(step[2], extra[1]) | outputs(step[1], _)"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no program of a fused node"),
        ("linear(x, ", "is no program of a fused node"),
        ("x", "step 0 is no call"),
        ("relu(x) | 3", "step 1 is no call"),
        ("relu(_)", "step 0 reads step -1"),
        ("relu(x) | relu(step[1])", "step 1 reads step 1"),
        ("relu(x) | relu(step[0, 0])", r"step\[\(?0, 0\)?\] is no argument"),
        ("relu(y)", "'y' is no argument"),
        ("relu(x.data)", "'x.data' is no argument"),
        ("relu(float32[n])", "'n' is no argument"),
        ("relu(float32[2.5])", r"float32\[2.5\] is no argument"),
        ("relu(*x)", r"'\*x' is no argument"),
        ("relu(-x)", "a minus stands before a number"),
        ("system(x)", "a fused node cannot call 'system'; it calls ops of fxcompress and linear"),
        ("relu(x, inplace=True)", "relu takes self, each once"),
        ("relu(x, 1)", "relu takes self, each once"),
        ("relu(x, self=x)", "relu takes self, each once"),
        ("unrows(x, x)", "unrows takes one argument"),
        ("linear(x, t(x))", "t is called inside linear, so it can take constants only"),
        ("linear(x, t(system(float32[1])))", "a fused node cannot call 'system'"),
        ("relu(x) | outputs()", "outputs takes steps"),
        ("relu(x) | outputs(x)", "outputs takes steps"),
        ("outputs(x) | relu(x)", "a fused node cannot call 'outputs'"),
    ],
)
def test_what_is_no_program_is_refused(text, message):
    with pytest.raises(SpecError, match=message):
        parse(text)
