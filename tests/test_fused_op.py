"""The ops `fused` and `fused_parallel`: what torch asks of them, gradients, what they refuse."""

import pytest
import torch
from torch import nn

from fxcompress.codegen.ops.fused import fused, fused_parallel
from fxcompress.codegen.spec import parse
from fxcompress.core.errors import SpecError
from tests.fusing import FACTORED, QUANTIZED, D, H, both


def example(text, lead=(2, 5), dtype=torch.float32, extras=()):
    """Inputs for a spec whose quantized weights are (H, D)."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    tensors = []
    for constant in parse(text).constants:
        if constant.dtype is torch.uint8:
            tensors.append(torch.randint(0, 256, constant.shape, generator=generator, dtype=torch.uint8))
        else:
            # a grid: scales of 2^-4 to 2^-4 + 255/128
            tensors.append(torch.tensor([-4.0, 1 / 128]) if constant.shape == (2,) else draw(*constant.shape))
    return draw(*lead, D), tensors, [draw(*shape) for shape in extras], text


DEQUANTIZE = f"dequantize(uint8[{H}, 24], uint8[{H}, 2], uint8[{H}, 1], float32[2], bits=4, group_size=32, columns=48, "
SINGLE = f"linear(x, {DEQUANTIZE}dtype=float32), float32[{H}]) | gelu(_) | add(_, extra[0]) | mul(step[1], _)"
FACTORS = f"float32[4, {D}], float32[{H}, 4], float32[{H}]"
FLOATS = f"low_rank_linear(rows, {FACTORS}) | unrows(_) | tanh(_) | mul(_, extra[0])"
TWICE = f"{FLOATS} | sigmoid(_) | outputs(step[2], _)"
SEVERAL = f"{SINGLE} | low_rank_linear(x, {FACTORS}) | silu(_) | outputs(step[3], _)"


@pytest.mark.parametrize("lead", [(2, 5), (3,), (), (0, 5)])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("op", "text"), [(fused, SINGLE), (fused, FLOATS), (fused_parallel, SEVERAL)])
def test_torch_accepts_the_op(op, text, lead, grad):
    if "rows" in text and lead == ():
        lead = (1,)
    x, tensors, extras, _ = example(text, lead, extras=[(H,)])
    for t in (x, *tensors, *extras):
        t.requires_grad_(grad and t.is_floating_point() and t.shape != (2,))
    assert set(torch.library.opcheck(op, (x, tensors, extras, text)).values()) == {"SUCCESS"}


@pytest.mark.parametrize(("op", "text"), [(fused, FLOATS), (fused_parallel, TWICE)])
def test_gradients_are_right_in_float64(op, text):
    text = text.replace("float32", "float64")
    x, tensors, extras, _ = example(text, (2,), torch.float64, [(H,)])
    inputs = [t.requires_grad_() for t in (x, *tensors, *extras)]
    n = len(tensors)
    assert torch.autograd.gradcheck(lambda x, *ts: op(x, list(ts[:n]), list(ts[n:]), text), inputs)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_the_unfused_graph(compiled):
    def body(n, x, y):
        return n.d(nn.functional.silu(n.a(x)) * n.b(x)) + y

    y = torch.randn(3, 5, D)
    gm, done = both(body, y, specs={"a": QUANTIZED, "*": FACTORED})
    torch.manual_seed(1)
    x = torch.randn(3, 5, D)

    def gradients(gm):
        gm = gm.copy()
        for name, parameter in gm.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
            parameter.grad = None
        leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
        run = torch.compile(gm, backend="aot_eager", fullgraph=True) if compiled and gm is not None else gm
        run(*leaves).square().sum().backward()
        return [t.grad for t in (*leaves, *(p for p in gm.parameters() if p.requires_grad))]

    want, got = gradients(gm), gradients(done)
    assert len(want) == 2 + 3
    for a, b in zip(want, got):  # sums of gradients in another order: 2^-24 a term, a few dozen terms
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_only_what_needs_a_gradient_gets_one():
    x, tensors, extras, text = example(FLOATS, extras=[(H,)])
    tensors[1].requires_grad_()
    fused(x, tensors, extras, text).sum().backward()
    assert tensors[1].grad is not None
    assert x.grad is tensors[0].grad is extras[0].grad is None


def test_an_unused_output_costs_no_gradient():
    x, tensors, extras, text = example(SEVERAL, extras=[(H,)])
    x.requires_grad_()
    fused_parallel(x, tensors, extras, text)[1].sum().backward()
    want = x.detach().clone().requires_grad_()
    fused(want, tensors[-3:], [], text.split(" | ", 4)[4].removesuffix(" | outputs(step[3], _)")).sum().backward()
    assert torch.equal(x.grad, want.grad)


def test_tensors_that_are_not_those_of_the_spec_are_refused():
    x, tensors, extras, text = example(FLOATS, extras=[(H,)])
    with pytest.raises(SpecError, match="the program takes 3 constants and 1 extras; 3 and 0 were given"):
        fused(x, tensors, [], text)
    with pytest.raises(SpecError, match="the program takes 3 constants and 1 extras; 2 and 1 were given"):
        fused(x, tensors[:2], extras, text)
    wrong = r"tensors\[1\] is torch.float16 \[80, 4\]; the program was made for torch.float32 \[80, 4\]. Convert a"
    with pytest.raises(SpecError, match=wrong):
        fused(x, [tensors[0], tensors[1].half(), tensors[2]], extras, text)


def test_no_extras_may_be_none_with_gradients_as_well():
    x, tensors, _, _ = example(SEVERAL.split(" | ")[0])
    text, want = SEVERAL.split(" | ")[0], x.clone().requires_grad_()
    fused(want, tensors, [], text).sum().backward()
    x.requires_grad_()
    assert set(torch.library.opcheck(fused, (x, tensors, None, text, "up")).values()) == {"SUCCESS"}
    fused(x, tensors, None, text, "up").sum().backward()
    assert torch.equal(x.grad, want.grad)
