"""Budgets: every way to write one, and what is said of every way that means nothing."""

import math

import pytest

import fxcompress
from fxcompress import Budget
from fxcompress.core.errors import BudgetError, FxcompressError
from fxcompress.core.units import format_bytes, parse_quantity

ORIGINAL = 80_000_000


@pytest.mark.parametrize(
    ("text", "bytes_wanted"),
    [
        ("4x", 20e6),
        ("4X", 20e6),
        (" 4 x ", 20e6),
        ("2.5x", 32e6),
        ("1x", 80e6),
        ("25%", 20e6),
        ("25 %", 20e6),
        ("100%", 80e6),
        ("0.25", 20e6),
        ("12 MB", 12e6),
        ("12MB", 12e6),
        ("12 mb", 12e6),
        ("12MiB", 12 * 2**20),
        ("512 KB", 512e3),
        ("512KiB", 2**19),
        ("0.01 GB", 10e6),
        ("1e-2GiB", 0.01 * 2**30),
        ("700 B", 700),
        (0.25, 20e6),
        (1, 80e6),
        (1.0, 80e6),
    ],
)
def test_a_size_means_these_bytes(text, bytes_wanted):
    # One rounding in the quantity and one in the product, 2^-53 each.
    assert Budget(size=text).size_bytes(ORIGINAL) == pytest.approx(bytes_wanted, rel=2**-51)
    assert Budget.parse(text).size_bytes(ORIGINAL) == pytest.approx(bytes_wanted, rel=2**-51)


def test_bytes_do_not_depend_on_the_original():
    assert Budget("12 MB").size_bytes(1) == Budget("12 MB").size_bytes(10**12) == 12_000_000


def test_parse_returns_a_budget_as_it_is():
    budget = Budget(error=0.05)
    assert Budget.parse(budget) is budget


def test_an_error_alone_leaves_size_and_flops_free():
    budget = Budget(error=0.05)
    assert budget.size_bytes(ORIGINAL) is None
    assert budget.flops_share() is None
    assert budget.error == 0.05


@pytest.mark.parametrize(("flops", "share"), [("2x", 0.5), ("50%", 0.5), (0.5, 0.5), ("1x", 1.0)])
def test_flops_are_a_share_of_the_original(flops, share):
    assert Budget(flops=flops).flops_share() == share


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (Budget("4x"), "size <= 4x"),
        (Budget(" 4x "), "size <= 4x"),
        (Budget(0.25), "size <= 0.25"),
        (Budget("12MB"), "size <= 12.00 MB"),
        (Budget("4x", error=0.05), "size <= 4x, error <= 0.05"),
        (Budget(error=0.05, flops="2x"), "error <= 0.05, flops <= 2x"),
    ],
)
def test_a_budget_prints_every_bound(budget, text):
    assert str(budget) == text


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("fast", "size='fast' is not understood; write a ratio"),
        ("", "size='' is not understood"),
        ("x", "size='x' is not understood"),
        ("4y", "size='4y' is not understood"),
        ("4x smaller", "is not understood"),
        ("1,5x", "is not understood"),
        ("nan", "is not understood"),
        ("inf", "is not understood"),
        (0, "size=0 must be above 0"),
        (-1, "size=-1 must be above 0"),
        ("-2x", "size='-2x' must be above 0"),
        ("0x", "size='0x' must be above 0"),
        ("0%", "size='0%' must be above 0"),
        ("0 MB", "size='0 MB' must be above 0"),
        ("1e999x", "must be above 0"),
        (math.nan, "size=nan must be above 0"),
        (math.inf, "size=inf must be above 0"),
        (-math.inf, "size=-inf must be above 0"),
        ("0.5x", "size='0.5x': 0.5x would make the model larger"),
        ("200%", "size='200%': it is 2 times the original"),
        (4.0, "size=4.0: it is 4 times the original"),
        (4, "size=4: it is 4 times the original"),
        (True, "size=True is a bool"),
        ([4], r"size=\[4\] is a list"),
    ],
)
def test_a_size_that_means_nothing_is_refused_with_what_to_write(size, message):
    with pytest.raises(BudgetError, match=message) as caught:
        Budget(size=size)
    assert 'write a ratio "4x", a share "25%" or 0.25, or bytes "12 MB"' in str(caught.value)


def test_a_budget_that_bounds_nothing_is_refused():
    with pytest.raises(BudgetError, match=r"Budget\(\) bounds nothing: give size, error, flops or latency"):
        Budget()


def test_flops_in_bytes_are_refused():
    with pytest.raises(BudgetError, match=r"flops='12 MB' is in bytes; write a ratio \"2x\" or a share \"50%\""):
        Budget(flops="12 MB")


@pytest.mark.parametrize("flops", ["fast", 0, -1, "0.5x", True, math.nan])
def test_flops_that_mean_nothing_are_refused_by_their_own_name(flops):
    with pytest.raises(BudgetError, match=f"Budget flops={flops!r}"):
        Budget(flops=flops)


@pytest.mark.parametrize("error", [0, 0.0, -0.1, math.nan, math.inf, "5%", True])
def test_an_error_that_is_no_bound_is_refused(error):
    with pytest.raises(BudgetError, match=f"error={error!r} is no bound; write a number above 0"):
        Budget(error=error)


@pytest.mark.parametrize("gain", [-0.1, 1, 1.5, math.nan])
def test_a_min_gain_outside_its_range_is_refused(gain):
    with pytest.raises(BudgetError, match=r"min_gain=.* must lie in \[0, 1\)"):
        Budget("4x", min_gain=gain)


def test_a_budget_error_is_a_value_error_and_ours():
    assert issubclass(BudgetError, ValueError)
    assert issubclass(BudgetError, FxcompressError)


def test_compile_without_budget_and_plan_asks_for_one():
    with pytest.raises(BudgetError, match="compile needs a budget such as"):
        fxcompress.compile(object())


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("4x", (4.0, "x")), ("25 %", (25.0, "%")), ("12 MB", (12e6, "bytes")), ("7", (7.0, "")), ("7 parsec", None)],
)
def test_a_quantity_is_a_number_and_a_unit(text, parsed):
    assert parse_quantity(text) == parsed


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (812, "812 B"), (1000, "1.00 KB"), (22_710_000, "22.71 MB"), (1.2e9, "1.20 GB"), (-5e3, "-5.00 KB")],
)
def test_bytes_print_in_decimal_units(count, text):
    assert format_bytes(count) == text
