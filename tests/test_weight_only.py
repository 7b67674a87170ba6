"""Kernels chosen by a profile: which at how many tokens, what they compute on both sides of a bucket's edge."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcompress
from fxcompress.codegen.cpu import products, rules
from fxcompress.codegen.cpu.rules import Bucket, Rule, kernel_at, kernels_of
from fxcompress.core.errors import ProfileError
from tests.profiling import by_formula

WIDE = 192
vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="int8 products need VNNI")


def told(few, rows=WIDE, columns=WIDE, group=None, **more):
    return kernels_of(rows, columns, torch.float32, True, Rule(by_formula(few=few), "eager"), group, **more)


def exact(x, w, b):
    return F.linear(x.double(), w.double(), None if b is None else b.double())


@vnni
def test_without_a_profile_the_static_rule_stays():
    assert kernels_of(WIDE, WIDE, torch.float32, True, Rule()) == (Bucket("int8", None),)


@vnni
def test_buckets_are_what_the_profile_says():
    assert told(()) == (Bucket("int8", None),)
    assert told(("int8_weight",)) == (Bucket("int8_weight", 16), Bucket("int8", None))
    assert told(("int4_weight",)) == (Bucket("int8", None),)  # it is stored in 8 bits
    assert told(("int4_weight",), group=32) == (Bucket("int4_weight", 16), Bucket("int8", None))
    assert kernel_at(told(("int8_weight",)), 16) == "int8_weight"
    assert kernel_at(told(("int8_weight",)), 17) == "int8"


@vnni
def test_shapes_the_kernels_do_not_know_are_left_to_int8():
    both = ("int8_weight", "int4_weight")
    assert told(both, columns=180) == (Bucket("int8", None),)  # the kernel reads 16 columns at a time
    assert told(("int4_weight",), rows=200, group=32) == (Bucket("int8", None),)
    assert told(("int4_weight",), group=48) == (Bucket("int8", None),)
    assert kernels_of(WIDE, WIDE, torch.float64, True, Rule(by_formula(few=both))) == (Bucket("float", None),)


@vnni
def test_a_gain_that_the_profile_may_be_wrong_about_is_no_bucket():
    rates = {"float": 4.0, "bf16": 2.0, "int8": 1.0, "int8_weight": 0.8, "int4_weight": 1.0}
    rule = Rule(by_formula(rates), "eager")
    assert kernels_of(WIDE, WIDE, torch.float32, True, rule) == (Bucket("int8", None),)


def bucketed(x, weights, biases, few, four=None):
    packed = [products.rounded_rows(w) for w in weights]
    codes = torch.cat([c for c, _, _ in packed])
    args = (x, codes, [s for _, s, _ in packed], [r for _, _, r in packed], biases)
    return products.bucketed_linear(*args, [few], torch.ones(len(codes), dtype=torch.bfloat16), four), args, packed


@vnni
@pytest.mark.parametrize("tokens", [0, 1, 4, 5])
def test_int8_weight_only_is_its_formula_up_to_the_edge(tokens):
    torch.manual_seed(0)
    x, weights, biases = torch.randn(tokens, 1, 96), [torch.randn(40, 96), torch.randn(24, 96)], [torch.randn(40), None]
    made, args, packed = bucketed(x, weights, biases, ("int8_weight", 4))
    if tokens > 4:
        assert all(torch.equal(y, z) for y, z in zip(made, products.int8_linear(*args)))
        return
    for y, (c, s, _), b in zip(made, packed, biases):
        w = c.float() * s[:, None]
        # x and the sum are rounded to bf16, 2^-9 each
        bound = 2**-8 * F.linear(x.abs(), w.abs()) + 2**-9 * exact(x, w, None).abs() + 1e-5
        assert y.shape == (tokens, 1, len(s))
        assert ((y - exact(x, w, b)).abs() <= bound).all()


@vnni
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("tokens", [1, 4])
def test_int4_weight_only_is_its_formula(tokens, group):
    torch.manual_seed(0)
    codes, scales = torch.randint(0, 16, (64, 128)), torch.rand(64, 128 // group) + 0.1
    zeros = torch.randint(0, 16, scales.shape) - 0.5
    parts = torch.unflatten(codes.float(), 1, (-1, group)) - zeros[..., None]
    w, size = (parts * scales[..., None]).flatten(1), (parts.abs() + 16) * scales[..., None]
    x, bias = torch.randn(tokens, 128), torch.randn(64)
    four = (*products.packed_fours(codes, scales, zeros), group)
    (y,), _, _ = bucketed(x, [w], [bias], ("int4_weight", 4), four)
    # x, scale, middle and sum in bf16: each term moves by 3 * 2^-9 of scale (|c - zero| + 16)
    bound = 4 * 2**-9 * F.linear(x.abs(), size.flatten(1)) + 1e-5
    assert ((y - exact(x, w, bias)).abs() <= bound).all()


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDE, 2 * WIDE), nn.Linear(2 * WIDE, WIDE)

    def forward(self, x):
        return self.down(F.relu(self.up(x)))


def lowered(spec, few, to, **changes):
    torch.manual_seed(0)
    small = fxcompress.restructure(Two().eval(), {"*": spec}, example_inputs=(torch.randn(3, 5, WIDE),))
    return small, fxcompress.lower(small, to=to, profile=by_formula(few=few, **changes))


@vnni
@pytest.mark.parametrize("to", ["eager", "inductor"])
@pytest.mark.parametrize(
    ("spec", "few"),
    [("quantize{bits=8, group_size=0}", "int8_weight"), ("quantize{bits=4, group_size=32}", "int4_weight")],
)
def test_both_sides_of_the_edge_are_the_model(spec, few, to):
    small, fast = lowered(spec, (few,), to)
    for shape in ((1, 1), (4, 4), (1, 17), (5, 7)):
        x = torch.randn(*shape, WIDE)
        with torch.no_grad():
            meant, found = small(x), fast(x)
        # inputs of two products in 8 bits, or in bf16: a percent each at most
        assert float((found - meant).norm() / meant.norm()) < 0.02, shape


@vnni
def test_what_is_stored_in_four_bits_is_multiplied_as_it_is_stored():
    """Decoding to int8 rounds a weight again; the int4 kernel takes the stored codes."""
    _, fast = lowered("quantize{bits=4, group_size=32}", ("int4_weight",), "eager")
    calls = [n for n in fast.graph_module.graph.nodes if n.target is products.bucketed_linear]
    assert [n.args[5] for n in calls] == [[("int4_weight", 16)]] * 2
    assert {n.args[7][2] for n in calls} == {32}


@vnni
def test_a_profile_of_elsewhere_is_refused():
    other = dataclasses.replace(by_formula(), device="Z80")
    small, _ = lowered("quantize{bits=8, group_size=0}", (), "eager")
    with pytest.raises(ProfileError, match="the profile is of device 'Z80'"):
        fxcompress.lower(small, to="eager", profile=other)


def test_low_rank_is_two_products_where_that_is_less():
    assert rules.is_two_products(10, 100, 100)
    assert not rules.is_two_products(50, 100, 100)
