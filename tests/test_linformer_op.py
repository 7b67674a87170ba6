"""The op of Linformer: against a plain one, exact at full length and under padding, its gradients, its limit."""

import math

import pytest
import torch

from fxcompress.core.errors import InputError
from fxcompress.passes.linformer import segments, strided
from tests.attending import EPS, attend, exact


def inputs(lead=(2, 3), m=5, n=6, length=3, longest=8, mask=None, dtype=torch.float32, grad=False):
    """q, k, v, e, f, mask, scale; the values of v are one wider than a head."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_(grad)

    made = draw(*lead, m, 4), draw(*lead, n, 4), draw(*lead, n, 5), draw(length, longest), draw(length, longest)
    masks = {
        None: lambda: None,
        "rows": lambda: (torch.arange(n) < torch.arange(n - lead[0] + 1, n + 1).unsqueeze(1)).unsqueeze(1),
        "heads": lambda: torch.rand(*lead, n, generator=generator) > 0.3,
        "all": lambda: torch.arange(n) > 0,
        "additive": lambda: draw(lead[0], 1, n),
    }
    return *made, masks[mask](), 0.4


SAMPLES = [
    {},
    {"mask": "rows"},
    {"mask": "heads"},
    {"mask": "all"},
    {"mask": "additive"},
    {"n": 8},
    {"lead": ()},
    {"lead": (), "mask": "all"},
    {"lead": (3,)},
    {"lead": (2, 2, 3), "mask": "heads"},
    {"lead": (1, 1)},
    {"lead": (0, 3)},
]


def slowly(q, k, v, e, f, mask, scale):
    """The formulas of the op, one query at a time, float64."""
    q, k, v, e, f = (t.double() for t in (q, k, v, e, f))
    n, out = k.shape[-2], torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    w = torch.ones(n) if mask is None else mask.double() if mask.dtype == torch.bool else mask.double().exp()
    w = w.broadcast_to(k.shape[:-1]).double()
    for at in torch.cartesian_prod(*(torch.arange(s) for s in q.shape[:-1])).reshape(-1, q.dim() - 1).tolist():
        lead, query = tuple(at[:-1]), q[tuple(at)]
        logits, values = [], []
        for i in range(len(e)):
            mass = sum(abs(float(x)) for x in e[i])
            r = sum(abs(float(e[i, j])) * float(w[(*lead, j)]) for j in range(n)) / mass
            key = sum(e[i, j] * w[(*lead, j)] / r * k[(*lead, j)] for j in range(n))
            logits.append(scale * float(query @ key) + math.log(r))
            values.append(sum(f[i, j] * w[(*lead, j)] / r * v[(*lead, j)] for j in range(n)))
        weights = torch.softmax(torch.tensor(logits, dtype=torch.float64), 0)
        out[tuple(at)] = sum(weight * value for weight, value in zip(weights, values))
    return out


@pytest.mark.parametrize("case", [c for c in SAMPLES if 0 not in c.get("lead", ())], ids=str)
def test_the_op_is_the_formula(case):
    args = inputs(**case, dtype=torch.float64)
    assert torch.allclose(attend(*args), slowly(*args), rtol=1e-11, atol=1e-11)  # sums of at most 8 terms, float64


@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_torch_accepts_the_op(case):
    for grad in (False, True):
        assert set(torch.library.opcheck(attend, inputs(**case, grad=grad)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("case", [c for c in SAMPLES if 0 not in c.get("lead", ())], ids=str)
def test_the_gradients_are_those_of_the_formula(case):
    assert torch.autograd.gradcheck(attend, inputs(**case, dtype=torch.float64, grad=True))


def test_a_landmark_without_keys_leaves_gradients_as_they_are():
    q, k, v, _, f, mask, scale = inputs(n=4, length=4, mask="rows", dtype=torch.float64, grad=True)
    e = segments(4, 8).double()  # landmarks 2 and 3 begin after the fourth key
    # e itself is left out: |e| has no derivative at the zeros of the averages.
    assert torch.autograd.gradcheck(lambda *t: attend(*t[:3], e, t[3], mask, scale), (q, k, v, f))
    (grad,) = torch.autograd.grad(attend(q, k, v, e.requires_grad_(True), f, mask, scale).sum(), e)
    assert bool(torch.isfinite(grad).all())
    assert bool((grad[2:] == 0).all())


@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_the_fake_answer_has_the_shape_dtype_and_strides_of_the_real_one(case):
    args = inputs(**case)
    fake = attend(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
    real = attend(*args)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
    assert real.is_contiguous()


@pytest.mark.parametrize("case", [{}, {"mask": "rows"}, {"mask": "heads"}, {"mask": "all"}, {"mask": "additive"}],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("n", [4, 6, 8])
def test_with_identities_it_is_exact_attention_at_every_length_and_under_every_mask(case, n):
    q, k, v, _, _, mask, scale = inputs(**case, n=n, dtype=torch.float64)
    got = attend(q, k, v, torch.eye(8).double(), torch.eye(8).double(), mask, scale)
    want = exact(q, k, v, None if mask is None else mask.unsqueeze(-2), scale=scale)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [segments, strided])
def test_strides_are_exact_up_to_their_number_and_segments_are_not(make):
    q, k, v, *_ = inputs(n=4)
    e = make(4, 8)
    off = (attend(q, k, v, e, e) - exact(q, k, v)).abs().max()
    assert (float(off) < 1e-5) == (make is strided)
    assert torch.allclose(e.sum(1), torch.ones(4))  # averages


def test_a_whole_sequence_is_the_linformer_of_the_paper():
    q, k, v, e, f, _, scale = inputs(n=8, dtype=torch.float64)
    want = torch.softmax(scale * q @ (e @ k).mT, -1) @ (f @ v)
    assert torch.allclose(attend(q, k, v, e, f, None, scale), want, rtol=1e-12, atol=1e-12)
    padded = torch.ones(8, dtype=torch.bool)
    assert torch.allclose(attend(q, k, v, e, f, padded, scale), want, rtol=1e-12, atol=1e-12)


def test_padding_changes_nothing_and_a_row_of_padding_is_zero():
    q, k, v, e, f, _, scale = inputs(n=8)
    alone = attend(q[:1], k[:1, :, :5], v[:1, :, :5], e, f, None, scale)
    mask = torch.tensor([[True] * 5 + [False] * 3, [False] * 8]).unsqueeze(1)
    got = attend(q, k, v, e, f, mask, scale)
    # The same sums of 8 terms in another order, through a softmax: some 40 roundings of values below 10.
    assert torch.allclose(got[:1], alone, rtol=0, atol=40 * EPS * 10)
    assert bool((got[1] == 0).all())
    additive = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    assert torch.equal(attend(q, k, v, e, f, additive, scale), got)
    lowest = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[:1]
    assert torch.allclose(attend(q[:1], k[:1], v[:1], e, f, lowest, scale), alone, rtol=0, atol=40 * EPS * 10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_a_whole_sequence_whole(dtype):
    q, k, v, e, f, _, scale = (t.to(dtype) if isinstance(t, torch.Tensor) else t for t in inputs(n=8))
    got = attend(q, k, v, e, f, None, scale)
    want = attend(*(t.double() for t in (q, k, v, e, f)), None, scale)
    # Keys, values, logits and weights are rounded to the dtype; logits of up to 30 turn that into their error.
    assert got.dtype == dtype
    assert float((got - want).norm() / want.norm()) < 30 * torch.finfo(dtype).eps


def test_a_sequence_past_the_limit_is_an_error_that_says_what_to_do():
    with pytest.raises(InputError, match=r"has 9 keys; e and f were made for at most 8\. Shorten the inputs, or "):
        attend(*inputs(n=9))
    assert attend(*inputs(n=8)).shape == (2, 3, 5, 5)
