"""The digits of a tensor train: the paper's and its counts, which ranks they allow, what is offered and refused."""

import math
import re

import pytest
import torch

from fxcompress.core.errors import SpecError
from fxcompress.core.rewrite import parse_spec
from fxcompress.passes.recipe import Recipe
from fxcompress.passes.tensor_train import TensorTrain
from fxcompress.passes.tt_shapes import core_elements, factor_shapes, full_rank, padded, primes, trimmed
from tests.sites import site_of, weight_of
from tests.trains import PAPER, SHAPES, UNEVEN


@pytest.mark.parametrize(("columns", "rows", "rank", "shapes", "elements"), PAPER)
def test_the_digits_and_the_parameters_of_a_layer_are_the_papers(columns, rows, rank, shapes, elements):
    assert factor_shapes(columns, rows, rank) == shapes
    site = site_of(torch.empty(rows, columns))
    TensorTrain(rank).check(site)
    assert sum(r * c for r, c in TensorTrain(rank).matrices(site).values()) == elements
    assert core_elements(shapes, rank) == elements
    mirror = tuple((m, n) for n, m in shapes)
    assert factor_shapes(rows, columns, rank) == mirror
    assert core_elements(mirror, rank) == elements


def test_the_papers_medium_model_comes_out():
    """GPT-2 medium is 354,823,168 parameters, 48 of its weights 1024 x 4096 or the other way round; too large to build
    here (tests/test_restructure.py builds the small one)."""
    layers = sum(core_elements(factor_shapes(a, b, 72), 72) for a, b in [(1024, 4096), (4096, 1024)])
    assert 354_823_168 - 48 * 4_194_304 + 24 * layers == 218_303_488


@pytest.mark.parametrize("number", [1, 2, 97, 384, 30522, 50257, 151936])
def test_primes_multiply_up(number):
    assert math.prod(primes(number)) == number
    assert primes(number) == sorted(primes(number))
    assert all(p % q for p in primes(number) for q in range(2, min(p, 400)))


@pytest.mark.parametrize(("rows", "want"), [(30522, 31104), (50257, 52488), (97, 108), (32000, 32000), (61, 61)])
def test_rows_are_padded_only_where_a_prime_is_too_large_for_a_digit(rows, want):
    assert padded(rows) == want
    smooth = {2**a * 3**b for a in range(20) for b in range(13)}
    assert want == rows or want == min(s for s in smooth if s >= rows)


@pytest.mark.parametrize("rank", [16, 100, 128])
def test_trimming_merges_a_last_core_that_would_store_zeros(rank):
    shapes = factor_shapes(384, 1536, rank)
    short = trimmed(shapes, rank)
    assert math.prod(short[-1]) >= rank or len(short) == 1
    for side in (0, 1):
        assert math.prod(s[side] for s in short) == math.prod(s[side] for s in shapes)
    assert core_elements(short, rank) <= core_elements(shapes, rank)


@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        ("tensor_train{rank=64}", None),
        ("tensor_train{rank=64, shapes=((8, 8), (8, 8), (12, 8), (1, 6))}", ((8, 8), (8, 8), (12, 8), (1, 6))),
    ],
)
def test_the_spec_reads_back(spec, shapes):
    parsed = parse_spec(spec, {"tensor_train": TensorTrain})
    assert (str(parsed), parsed) == (spec, TensorTrain(64, shapes))


@pytest.mark.parametrize("rank", [0, -3, 2.5, 0.4, "4"])
def test_a_rank_that_is_no_whole_number_of_at_least_1_is_refused(rank):
    with pytest.raises(SpecError, match=f"tensor_train rank={rank!r} must be a whole number of at least 1"):
        TensorTrain(rank)


@pytest.mark.parametrize(
    "shapes", [(), ((8, 8),), ((8, 8), (3,)), ((8, 0), (3, 9)), (8, 8), 8, [[8, 8], [8, 8]], ((2.0, 2), (2, 2))]
)
def test_shapes_that_are_no_pairs_are_refused(shapes):
    with pytest.raises(SpecError, match="must be one pair \\(digit of the column, digit of the row\\) a core"):
        TensorTrain(4, shapes)


def test_shapes_that_do_not_multiply_up_are_refused_at_the_site():
    message = (
        r"tensor_train\{rank=2, shapes=\(\(4, 2\), \(5, 4\), \(2, 3\)\)\} at weight: the digits multiply up to "
        r"40 columns and 24 rows, but the weight has 24 columns and 24 rows"
    )
    with pytest.raises(SpecError, match=message):
        Recipe(TensorTrain(2, ((4, 2), (5, 4), (2, 3)))).at(site_of(weight_of((24, 24))))
    with pytest.raises(SpecError, match=r"the weight has 4 columns and 97 \(or, padded, 108\) rows"):
        TensorTrain(2, ((2, 10), (2, 10))).check(site_of(torch.zeros(97, 4), "embedding"))


@pytest.mark.parametrize(("shapes", "most"), [(SHAPES, 8), (UNEVEN, 16), (((4, 6), (6, 4)), 24)])
def test_a_rank_above_full_is_refused_with_the_range(shapes, most):
    site = site_of(weight_of((24, 24)))
    assert full_rank(shapes) == most
    TensorTrain(most, shapes).check(site)
    message = f"is 24 x 24, and cut into {shapes} no bond needs more than {most}, so rank must be 1 to {most}."
    with pytest.raises(SpecError, match=re.escape(message)):
        TensorTrain(most + 1, shapes).check(site)


@pytest.mark.parametrize(("rank", "most"), [(17, 16), (64, 16), (10_000, 16)])
def test_a_rank_the_papers_digits_cannot_use_is_refused_with_one_they_can(rank, most):
    site = site_of(weight_of((24, 24)))
    TensorTrain(most).check(site)
    with pytest.raises(SpecError, match=rf"needs more than \d+, so rank must be 1 to {most}\."):
        TensorTrain(rank).check(site)


@pytest.mark.parametrize(
    ("rows", "columns", "why"),
    [
        (24, 97, "its 97 columns have the prime factor 97, too large for a digit"),
        (24, 2 * 67, "its 134 columns have the prime factor 67, too large for a digit"),
        (31, 37, "neither side of a 31 x 37 weight can be factored"),
        (1, 1, "neither side of a 1 x 1 weight can be factored"),
        (97, 24, None),
        (24, 24, None),
    ],
)
def test_what_cannot_be_cut_into_digits_is_refused(rows, columns, why):
    assert TensorTrain.refuses(site_of(torch.ones(rows, columns))) == why


@pytest.mark.parametrize(("rows", "columns"), [(384, 384), (1536, 384), (384, 1536), (3072, 768), (24, 24), (97, 64)])
def test_the_space_runs_from_cheap_to_exact_below_three_quarters(rows, columns):
    site = site_of(torch.zeros(rows, columns))
    space = list(TensorTrain.space(site))
    assert 1 <= len(space) <= 7
    stored = [Recipe(s).stored_bytes(site) for s in space]
    assert stored == sorted(stored)
    assert stored[-1] < 0.75 * site.dense_bytes
    for s in space:
        s.check(site)
        last = s.shapes[-1]
        assert math.prod(last) >= s.rank  # no bond wider than what follows it can use


def test_a_vocabulary_is_offered_none():
    assert list(TensorTrain.space(site_of(torch.zeros(4096, 64), "embedding"))) == []
